"""A worker process of the local engine, and how it and its grid speak.

Messages travel as pickles of protocol 5 whose large arrays stay outside the pickle: ``bytes``
cannot be changed, so each is handed to the socket as it is and shared between messages without a
copy.
Pickle is safe here because both ends are one program: a worker is its grid's own child.
"""

import copyreg
import importlib
import io
import logging
import os
import pickle
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flwr.app import Array, Context, Error, Message, RecordDict, UserConfig
from flwr.common.constant import (
    NUM_PARTITIONS_KEY,
    PARTITION_ID_KEY,
    SUPERLINK_NODE_ID,
    ErrorCode,
)

from fedveil import interrupts
from fedveil.errors import FedveilError
from fedveil.memory import keep_freed_memory

ClientCallable = Callable[[Message, Context], Message]

# Node 1 is Flower's server; partition 0 is the first node after it.
FIRST_NODE_ID = SUPERLINK_NODE_ID + 1

# Below this a separate read costs more than the copy it saves.
_OUTSIDE_THE_PICKLE = 16 * 1024
_LENGTH = struct.Struct("!Q")
_PARENT_CHECK_SECONDS = 0.5

_logger = logging.getLogger(__name__)


def usable_cores() -> int:
    """Return how many cores this process may run on, which a container or taskset may limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Packed(NamedTuple):
    """A pickle and the large buffers that belong to it, in order."""

    head: bytes
    buffers: tuple[bytes, ...] = ()


class WorkOrder(NamedTuple):
    """What the grid sends a worker, followed by the ``fresh`` buffers and those of the state.

    Attributes:
        node_id: The node to act as.
        head: Pickle of the message.
        tokens: Number of each buffer of the message, in order.
        fresh: Those of ``tokens`` that follow; the worker holds the others already.
        keep: Those to hold, because further messages share them.
        drop: Held ones that no message needs any more.
        state: Pickle of the node's state; None while it is empty.
    """

    node_id: int
    head: bytes
    tokens: tuple[int, ...]
    fresh: tuple[int, ...]
    keep: tuple[int, ...]
    drop: tuple[int, ...]
    state: bytes | None


class Result(NamedTuple):
    """What a worker answers, followed by the buffers of the reply and of the state.

    Attributes:
        head: Pickle of the reply.
        buffers: How many buffers belong to it; the rest belong to the state.
        state: Pickle of the node's new state; None where it stays as it was.
    """

    head: bytes
    buffers: int
    state: bytes | None


def _reduce_array(array: Array) -> tuple[type[Array], tuple[Any, ...]]:
    # Through the constructor, which leaves the caches of Flower's own serialisation behind.
    data: Any = array.data
    if len(data) >= _OUTSIDE_THE_PICKLE:
        data = pickle.PickleBuffer(data)
    return Array, (array.dtype, tuple(array.shape), array.stype, data)


_REDUCERS: Any = copyreg.dispatch_table.copy()
_REDUCERS[Array] = _reduce_array


def pack(value: object) -> Packed:
    """Pickle ``value``, leaving the bytes of its large arrays where they are."""
    buffers: list[bytes] = []
    stream = io.BytesIO()

    def outside(buffer: pickle.PickleBuffer) -> None:
        with memoryview(buffer) as view:
            buffers.append(view.obj if isinstance(view.obj, bytes) else view.tobytes())

    pickler = pickle.Pickler(stream, protocol=5, buffer_callback=outside)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(value)
    return Packed(stream.getvalue(), tuple(buffers))


def unpack(packed: Packed) -> Any:
    """Undo ``pack``; arrays take the very ``bytes`` objects given, without a copy."""
    return pickle.loads(packed.head, buffers=packed.buffers)


def send(channel: socket.socket, head: object, buffers: Sequence[bytes] = ()) -> None:
    """Send ``head`` and then each of ``buffers``.

    Raises:
        OSError: The other end is gone.
    """
    pickled = pickle.dumps((head, [len(buffer) for buffer in buffers]), protocol=5)
    channel.sendall(_LENGTH.pack(len(pickled)) + pickled)
    for buffer in buffers:
        channel.sendall(buffer)


def receive(channel: socket.socket) -> tuple[Any, list[bytes]]:
    """Return the head and the buffers of what ``send`` sent.

    Raises:
        EOFError: The other end is gone.
        OSError: The same, while it was sending.
    """
    (length,) = _LENGTH.unpack(_receive_exactly(channel, _LENGTH.size))
    head, sizes = pickle.loads(_receive_exactly(channel, length))
    return head, [_receive_exactly(channel, size) for size in sizes]


def _receive_exactly(channel: socket.socket, size: int) -> bytes:
    # One call fills one object of the right size. A signal may cut it short.
    data = channel.recv(size, socket.MSG_WAITALL)
    while len(data) < size:
        more = channel.recv(size - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError("the other end of the channel is gone")
        data += more
    return data


def load_client_app(path: str) -> ClientCallable:
    """Import a client app.

    Args:
        path: ``package.module:attribute``.

    Raises:
        FedveilError: It cannot be imported, or is not callable.
    """
    module, _, attribute = path.partition(":")
    try:
        app = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise FedveilError(
            f"client app {path!r} could not be imported: {error}. "
            "Give package.module:attribute, importable from here"
        ) from error
    if not callable(app):
        raise FedveilError(f"client app {path!r} is a {type(app).__name__}, not a ClientApp")
    return app  # type: ignore[no-any-return]


def error_reply(message: Message, code: int, reason: str) -> Message:
    """Return the reply that says why ``message`` has none."""
    return Message(Error(code=code, reason=reason), reply_to=message)


@dataclass(frozen=True)
class Setting:
    """What a worker needs to know once.

    Attributes:
        client_app: A client app, or where to import it from.
        nodes: Number of nodes.
        run_id: Of every context.
        run_config: Of every context.
        parent: Process id of the grid.
    """

    client_app: ClientCallable | str
    nodes: int
    run_id: int
    run_config: UserConfig
    parent: int


def work(setting: Setting, channel: socket.socket, inherited: Sequence[socket.socket]) -> None:
    """Answer jobs until the grid closes the channel.

    Args:
        setting: What does not change.
        channel: Where jobs come from and results go to.
        inherited: The grid's own ends, which a forked child holds too: while it does, its siblings
            would not see the grid close them.
    """
    # First of all: a grid that closes at once ends its workers before they have begun.
    _isolate(setting.parent)
    for other in inherited:
        other.close()
    app = setting.client_app
    client = load_client_app(app) if isinstance(app, str) else app
    held: dict[int, bytes] = {}
    try:
        while True:
            job, buffers = receive(channel)
            result, answer = _answer(client, setting, job, buffers, held)
            del buffers
            send(channel, result, answer)
            del answer
    except (EOFError, OSError):
        return


def _isolate(parent: int) -> None:
    # Ctrl-C reaches the whole process group; the grid decides what becomes of its workers.
    interrupts.leave_to_parent()
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    keep_freed_memory()
    # Workers run side by side, and the thread count changes float32 results.
    os.environ["OMP_NUM_THREADS"] = "1"
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        # A fork copies the generators: all workers would draw the same "random" numbers.
        torch.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def _exit_with(parent: int) -> None:
    # A worker deep in a computation reads no channel, and a killed grid closes nothing in order.
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)


def _answer(
    client: ClientCallable,
    setting: Setting,
    job: WorkOrder,
    buffers: list[bytes],
    held: dict[int, bytes],
) -> tuple[Result, tuple[bytes, ...]]:
    for token in job.drop:
        del held[token]
    fresh = len(job.fresh)
    arrived = dict(zip(job.fresh, buffers[:fresh], strict=True))
    held.update({token: arrived[token] for token in job.keep})
    known = held | arrived
    message: Message = unpack(Packed(job.head, tuple(known[token] for token in job.tokens)))
    before = Packed(job.state, tuple(buffers[fresh:])) if job.state is not None else None
    context = _context(setting, job.node_id, before)
    try:
        reply = pack(_checked(client(message, context), message))
        after = _changed_state(context.state, before)
    except (Exception, SystemExit) as error:  # the client app may raise anything
        _logger.debug("node %d: %s", job.node_id, traceback.format_exc())
        reply, after = pack(_failure(message, error)), None
    state_head, state_buffers = after or Packed(b"")
    result = Result(reply.head, len(reply.buffers), state_head if after else None)
    return result, reply.buffers + state_buffers


def _context(setting: Setting, node_id: int, state: Packed | None) -> Context:
    return Context(
        run_id=setting.run_id,
        node_id=node_id,
        node_config={
            PARTITION_ID_KEY: node_id - FIRST_NODE_ID,
            NUM_PARTITIONS_KEY: setting.nodes,
        },
        state=RecordDict() if state is None else unpack(state),
        run_config=dict(setting.run_config),
    )


def _changed_state(state: RecordDict, before: Packed | None) -> Packed | None:
    if before is None and not state:
        return None
    after = pack(state)
    # Buffers compare by identity first, so an untouched large state costs nothing here.
    return None if after == before else after


def _checked(reply: object, message: Message) -> Message:
    if not isinstance(reply, Message):
        raise TypeError(f"the client app returned a {type(reply).__name__}, not a Message")
    if reply.metadata.reply_to_message_id != message.metadata.message_id:
        raise ValueError(
            "the client app returned a Message that is no reply; "
            "return Message(content, reply_to=message)"
        )
    return reply


def _failure(message: Message, error: BaseException) -> Message:
    reason = f"{type(error).__name__}: {error}"
    return error_reply(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
