"""The one port of a deployment that strangers can reach, and what they can reach through it.

Flower 1.41 serves three interfaces on one port: that of the nodes, that of whoever submits runs,
and that of the ServerApp's own process. Only the first asks who is speaking: without Flower's
account service anybody who reaches the port can submit a run, register a node, or take the
ServerApp's task and speak to the clients in its place. So the SuperLink listens on loopback, and
this gate hands the nodes' requests through to it, over TLS on both sides, and refuses all else.

It also shortens the wait of idle nodes: a SuperNode that finds no message asks again after three
seconds, so an empty answer is held back for a while, in case a message comes.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn

_Event = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Event]]
_Send = Callable[[_Event], Awaitable[None]]

_FLEET = "/v1/fleet/"
_PULL = f"{_FLEET}pull-messages"
# Neither of Flower's ways for a node to register itself is among them.
_OPEN = frozenset(
    f"{_FLEET}{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
# A node gives up on an answer after five seconds, and what it does not receive is lost.
_HOLD_SECONDS = 2.5
_LOOK_EVERY = 0.1
_LARGEST_QUESTION = 64 * 1024
_OF_ONE_HOP = frozenset({b"host", b"connection", b"transfer-encoding", b"content-length"}) | {
    b"accept-encoding"
}


class Gate:
    """An ASGI application in front of a SuperLink.

    Args:
        superlink: host:port of the SuperLink.
        authority: PEM file of the CA that signed its certificate.
    """

    def __init__(self, superlink: str, *, authority: Path) -> None:
        self._client = httpx.AsyncClient(
            base_url=f"https://{superlink}",
            verify=ssl.create_default_context(cafile=authority),
            headers={"accept-encoding": "identity"},
            trust_env=False,
            timeout=60,
        )

    async def __call__(self, scope: _Event, receive: _Receive, send: _Send) -> None:
        """Hand a node's request through, refuse any other."""
        if scope["type"] != "http":
            return
        if scope["method"] != "POST" or scope["path"] not in _OPEN:
            await _refuse(send)
        elif scope["path"] == _PULL:
            await self._pull(scope, receive, send)
        else:
            await self._pass(scope, receive, send)

    async def _pass(self, scope: _Event, receive: _Receive, send: _Send) -> None:
        request = self._client.build_request(
            "POST", scope["path"], headers=_headers(scope), content=_body(receive)
        )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.TransportError:
            await _unavailable(send)
            return
        try:
            await send(_start(answer))
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()

    async def _pull(self, scope: _Event, receive: _Receive, send: _Send) -> None:
        question = b""
        async for part in _body(receive):
            question += part
            if len(question) > _LARGEST_QUESTION:
                await _refuse(send)
                return
        gone = asyncio.ensure_future(receive())
        deadline = asyncio.get_running_loop().time() + _HOLD_SECONDS
        try:
            while True:
                answer = await self._client.post(
                    scope["path"], headers=_headers(scope), content=question
                )
                # The answer without messages is the empty one.
                if answer.content or answer.status_code != httpx.codes.OK:
                    break
                if asyncio.get_running_loop().time() > deadline:
                    break
                await asyncio.wait([gone], timeout=_LOOK_EVERY)
                if gone.done():
                    return
        except httpx.TransportError:
            await _unavailable(send)
            return
        finally:
            gone.cancel()
        await send(_start(answer))
        await send({"type": "http.response.body", "body": answer.content})


def serve(gate: Gate, *, host: str, port: int, certificate: Path, key: Path) -> None:
    """Serve a gate over TLS until interrupted.

    Args:
        gate: What to serve.
        host: Address to listen on.
        port: Port to listen on.
        certificate: PEM file of the server's certificate.
        key: PEM file of its private key.
    """
    uvicorn.run(
        gate,
        host=host,
        port=port,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
    )


def _headers(scope: _Event) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in scope["headers"] if name not in _OF_ONE_HOP]


async def _body(receive: _Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise httpx.ReadError("the node is gone")
        yield event.get("body", b"")
        more = event.get("more_body", False)


def _start(answer: httpx.Response) -> _Event:
    kept = [
        (name.lower(), value)
        for name, value in answer.headers.raw
        if name.lower() not in _OF_ONE_HOP
    ]
    return {"type": "http.response.start", "status": answer.status_code, "headers": kept}


async def _refuse(send: _Send) -> None:
    await _say(send, 404, b"this address is for the nodes of the federation alone\n")


async def _unavailable(send: _Send) -> None:
    # 503 is one of the answers after which a SuperNode tries again.
    await _say(send, 503, b"the SuperLink does not answer\n")


async def _say(send: _Send, status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
