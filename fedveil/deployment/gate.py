"""The one port of a deployment that strangers can reach, and what they can reach through it.

Flower 1.41 serves three interfaces on one port: that of the nodes, that of whoever submits runs,
and that of the ServerApp's own process. Only the first asks who is speaking: without Flower's
account service anybody who reaches the port can submit a run, register a node, or take the
ServerApp's task and speak to the clients in its place. So the SuperLink listens on loopback, and
this gate hands the nodes' requests through to it, over TLS on both sides, and refuses all else.
Whoever is no node of the deployment is refused by the headers of the request: nothing of it is kept
or handed on, and it holds no connection that a node could need.

It also shortens the wait of idle nodes: a SuperNode that finds no message asks again after three
seconds, so an empty answer is held back for a while, in case a message comes.
"""

import asyncio
import contextlib
import json
import logging
import ssl
from asyncio.sslproto import SSLProtocol
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, ClassVar

import httpx
import uvicorn
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.error import ApiErrorCode
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedveil.deployment.admission import (
    Allowance,
    Node,
    Refusals,
    Register,
    authenticated,
    object_asked_for,
    objection,
    policy_refusals,
)

_Event = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Event]]
_Send = Callable[[_Event], Awaitable[None]]

_FLEET = "/v1/fleet/"
_PULL = f"{_FLEET}pull-messages"
_PUSH = f"{_FLEET}push-messages"
_ACTIVATE = f"{_FLEET}activate-node"
_PUSH_OBJECT = f"{_FLEET}push-object"
_PULL_OBJECT = f"{_FLEET}pull-object"
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
# Names and sizes of what an answer consists of, a few hundred bytes for each tensor.
_LARGEST_LIST = 8 * 1024 * 1024
# Flower sends tensors in pieces of this size, however large the model is.
_LARGEST_OBJECT = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 1024 * 1024
_QUESTION_SECONDS = 20.0
_SILENCE_SECONDS = 30.0
_DRAIN_SECONDS = 5.0
_AT_ONCE = 16  # requests of one node
_HANDSHAKE_SECONDS = 10
_REQUEST_SECONDS = 10.0  # until a connection has sent the headers of its first request
_CONNECTIONS = 256  # from one address; several nodes may share one

_log = logging.getLogger("uvicorn.error")
_OF_ONE_HOP = frozenset({b"host", b"connection", b"transfer-encoding", b"content-length"}) | {
    b"accept-encoding"
}


class Gate:
    """An ASGI application in front of a SuperLink.

    Args:
        superlink: host:port of the SuperLink.
        authority: PEM file of the CA that signed its certificate.
        register: The nodes that may pass.
        refusals: Where it is kept what their policies refuse.
    """

    def __init__(
        self, superlink: str, *, authority: Path, register: Register, refusals: Refusals
    ) -> None:
        self._register, self._refusals = register, refusals
        self._busy: Counter[int] = Counter()
        self._allowances: defaultdict[int, Allowance] = defaultdict(Allowance)
        self._client = httpx.AsyncClient(
            base_url=f"https://{superlink}",
            verify=ssl.create_default_context(cafile=authority),
            headers={"accept-encoding": "identity"},
            trust_env=False,
            timeout=60,
            # Only nodes get as far, each with a limit of its own.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
        )

    async def __call__(self, scope: _Event, receive: _Receive, send: _Send) -> None:
        """Hand a node's request through, refuse any other."""
        if scope["type"] != "http":
            return
        if scope["method"] != "POST" or scope["path"] not in _OPEN:
            await _refuse(send)
            return
        node = authenticated(_text(scope), self._register)
        if node is None:
            await _turn_away(scope["path"], send)
        elif self._busy[node.number] >= _AT_ONCE:
            await _say(send, 503, "this node asks too much at once")
        else:
            self._busy[node.number] += 1
            try:
                await self._admit(node, scope, receive, send)
            finally:
                self._busy[node.number] -= 1

    async def _admit(self, node: Node, scope: _Event, receive: _Receive, send: _Send) -> None:
        try:
            await self._answer(node, scope, receive, send)
        except _TooLargeError:
            # A connection that is closed while the node still sends loses it the answer.
            await _drain(receive)
            await _say(send, 413, "the request is too large")

    async def _answer(self, node: Node, scope: _Event, receive: _Receive, send: _Send) -> None:
        path = scope["path"]
        if path == _PUSH_OBJECT:
            body = _limited(receive, _LARGEST_OBJECT)
            await self._pass(scope, _spending(body, self._allowances[node.number]), send)
            return
        most = _LARGEST_LIST if path == _PUSH else _LARGEST_QUESTION
        try:
            async with asyncio.timeout(_QUESTION_SECONDS):
                question = b"".join([part async for part in _limited(receive, most)])
        except (TimeoutError, httpx.ReadError):
            await _say(send, 408, "the request took too long")
            return
        if wrong := objection(path.removeprefix(_FLEET), question, node):
            _log.warning("refused %s: %s", path, wrong)
            await _say(send, 403, wrong)
        elif path == _PULL:
            await self._pull(node, question, scope, receive, send)
        else:
            if path == _PUSH:
                for reason in policy_refusals(question):
                    self._refusals.note(node, reason)
            sent = await self._pass(scope, _once(question), send)
            if path == _PULL_OBJECT:
                self._allowances[node.number].handed(object_asked_for(question), sent)

    async def _pass(self, scope: _Event, body: AsyncIterator[bytes], send: _Send) -> int:
        """Hand a question and its answer through; return the answer's bytes."""
        request = self._client.build_request(
            "POST", scope["path"], headers=_headers(scope), content=body
        )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.TransportError:
            await _unavailable(send)
            return 0
        sent = 0
        try:
            await send(_start(answer))
            async for part in answer.aiter_raw():
                sent += len(part)
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()
        return sent

    async def _pull(
        self, node: Node, question: bytes, scope: _Event, receive: _Receive, send: _Send
    ) -> None:
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
        if answer.content and answer.status_code == httpx.codes.OK:
            self._allowances[node.number].asked()
        await send(_start(answer))
        await send({"type": "http.response.body", "body": answer.content})


class _TooLargeError(Exception):
    """A body is longer than its path allows."""


class _Connection(SSLProtocol):
    """TLS that must be agreed on before long, on one of not too many connections.

    asyncio counts and times nothing before TLS is agreed on, when strangers hold what costs least.
    """

    _open: ClassVar[Counter[str]] = Counter()
    _address: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection; one too many of its address is closed."""
        address = transport.get_extra_info("peername")[0]
        if self._open[address] >= _CONNECTIONS:
            assert isinstance(transport, asyncio.Transport)
            transport.abort()
            return
        self._open[address] += 1
        self._address = address
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Take it off the count."""
        if self._address is None:
            return
        self._open[self._address] -= 1
        if not self._open[self._address]:
            del self._open[self._address]
        super().connection_lost(exc)


class _Patience(H11Protocol):
    """HTTP on a connection that must say what it wants before long."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._late = self.loop.call_later(_REQUEST_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        if self._late:
            self._late.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None:
            self.transport.abort()


def serve(gate: Gate, *, host: str, port: int, certificate: Path, key: Path) -> None:
    """Serve a gate over TLS until interrupted.

    Args:
        gate: What to serve.
        host: Address to listen on.
        port: Port to listen on.
        certificate: PEM file of the server's certificate.
        key: PEM file of its private key.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    def connection(**given: Any) -> _Connection:
        return _Connection(
            asyncio.get_running_loop(),
            _Patience(**given),
            context,
            waiter=None,  # type: ignore[arg-type]  # of whoever connects; this accepts
            server_side=True,
            ssl_handshake_timeout=_HANDSHAKE_SECONDS,
        )

    uvicorn.run(
        gate,
        host=host,
        port=port,
        http=connection,  # type: ignore[arg-type]  # any factory of protocols will do
        loop="asyncio",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
    )


def _headers(scope: _Event) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in scope["headers"] if name not in _OF_ONE_HOP]


def _text(scope: _Event) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def _limited(receive: _Receive, most: int) -> AsyncIterator[bytes]:
    """Yield a body as it comes, at most so many bytes and with no long silence."""
    more, size = True, 0
    while more:
        try:
            async with asyncio.timeout(_SILENCE_SECONDS):
                event = await receive()
        except TimeoutError:
            raise httpx.ReadError("the node sends no more") from None
        if event["type"] == "http.disconnect":
            raise httpx.ReadError("the node is gone")
        part = event.get("body", b"")
        if (size := size + len(part)) > most:
            raise _TooLargeError
        yield part
        more = event.get("more_body", False)


async def _drain(receive: _Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass


async def _spending(body: AsyncIterator[bytes], allowance: Allowance) -> AsyncIterator[bytes]:
    async for part in body:
        if not allowance.spend(len(part)):
            raise _TooLargeError
        yield part


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _start(answer: httpx.Response) -> _Event:
    kept = [
        (name.lower(), value)
        for name, value in answer.headers.raw
        if name.lower() not in _OF_ONE_HOP
    ]
    return {"type": "http.response.start", "status": answer.status_code, "headers": kept}


async def _refuse(send: _Send) -> None:
    await _say(send, 404, "this address is for the nodes of the federation alone")


async def _unavailable(send: _Send) -> None:
    # 503 is one of the answers after which a SuperNode tries again.
    await _say(send, 503, "the SuperLink does not answer")


async def _turn_away(path: str, send: _Send) -> None:
    told = "only nodes that are registered here are answered: fedveil deploy register"
    if path == _ACTIVATE:
        # After a 401 a SuperNode ends without a word; of this it says what it was told.
        await _say(send, 400, told, code=int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED))
    else:
        await _say(send, 401, told)


async def _say(send: _Send, status: int, detail: str, **more: int) -> None:
    # As FastAPI says it: a SuperNode reads no other form.
    text = json.dumps({"detail": detail, **more}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
    # Closed, so that nothing more of what was refused is read.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
