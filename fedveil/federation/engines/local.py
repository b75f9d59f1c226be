"""The local engine: a Flower grid whose nodes run in this machine's worker processes."""

import atexit
import contextlib
import copy
import multiprocessing
import os
import signal
import socket
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Literal, Self
from uuid import uuid4

from flwr.app import Message, RecordDict, UserConfigValue
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedveil import interrupts
from fedveil.errors import FedveilError
from fedveil.federation.engines.worker import (
    FIRST_NODE_ID,
    ClientCallable,
    Packed,
    Result,
    Setting,
    WorkOrder,
    error_reply,
    load_client_app,
    pack,
    receive,
    send,
    unpack,
    usable_cores,
    work,
)
from fedveil.forks import START_METHOD

_RUN_ID = 1
_ATTEMPTS = 2
# As often as Flower's own in-memory grid looks for replies.
_PULL_SECONDS = 0.1
_PATIENCE_SECONDS = 2.0


@dataclass
class _Task:
    """A message on its way: the caller's object is not kept, so later changes to it do no harm."""

    message: Message
    head: bytes
    tokens: tuple[int, ...]
    attempts: int = 0
    started: float = 0.0

    @property
    def id(self) -> str:
        return self.message.metadata.message_id

    @property
    def node_id(self) -> int:
        return self.message.metadata.dst_node_id

    @property
    def kind(self) -> tuple[int, str]:
        """What decides how long it takes."""
        return self.node_id, self.message.metadata.message_type

    @property
    def expired(self) -> bool:
        metadata = self.message.metadata
        return time.time() > metadata.created_at + metadata.ttl


@dataclass
class _Worker:
    process: BaseProcess
    channel: socket.socket
    task: _Task | None = None
    held: set[int] = field(default_factory=set)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Kill the worker where what it is sent or sends is cut short by an interrupt.

        Nobody could tell where on its channel the next piece begins.
        """
        try:
            yield
        except BaseException:
            self.process.kill()
            raise

    def stop(self) -> None:
        self.channel.close()
        self.process.terminate()
        self.process.join(_PATIENCE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Buffers:
    """Numbers the buffers of waiting messages, so that a worker is sent each of them once.

    Strategies let messages share one payload. A buffer is recognised by identity, which is safe
    because bytes never change and the number outlives no reference to them.
    """

    def __init__(self) -> None:
        self._next = 0
        self._tokens: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._buffers: dict[int, bytes] = {}

    def add(self, buffer: bytes) -> int:
        token = self._tokens.get(id(buffer))
        if token is None:
            token, self._next = self._next, self._next + 1
            self._tokens[id(buffer)] = token
            self._buffers[token] = buffer
            self._users[token] = 0
        self._users[token] += 1
        return token

    def release(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._users[token] -= 1
            if not self._users[token]:
                del self._users[token]
                del self._tokens[id(self._buffers.pop(token))]

    def shared(self, token: int) -> bool:
        return self._users[token] > 1

    def __contains__(self, token: int) -> bool:
        return token in self._users

    def __getitem__(self, token: int) -> bytes:
        return self._buffers[token]


class LocalGrid(Grid):
    """Runs a Flower client app in this machine's worker processes.

    Messages, records, strategies and mods are Flower's; only the grid and its workers are ours. An
    idle worker takes the next message, those known to take longest first; replies come back in the
    order of the messages. Each worker computes with one thread. A node's state lives here and
    travels with its messages, so any worker can act for any node.

    A worker that dies is replaced and its message tried once more; a second death answers it with
    an error. An exception in the client app answers with its text. Replies that come after
    ``send_and_receive`` has timed out are thrown away.

    The grid has no thread of its own: work goes forward while one of its calls waits, and a worker
    keeps its finished reply until then. Memory therefore holds at most one unread reply a worker,
    and one copy of a shared payload a worker. Use it from one thread.

    On Linux workers are forked, which shares with them, at no cost, what is already loaded
    (PyTorch, the client app, its data); elsewhere they are spawned, and a client app given as an
    object must be picklable. Make the grid before starting threads of your own.

    Args:
        client_app: A client app, or ``package.module:attribute`` to import it from.
        nodes: Number of nodes; node i has ``{"partition-id": i, "num-partitions": nodes}``.
        workers: Number of processes; one a core by default, and never more than nodes.
        run_config: Run configuration every client app sees.
        start_method: How workers start, where the default will not do: "spawn" for clients that
            compute on a GPU this process has already used.

    Raises:
        FedveilError: The client app cannot be imported, or a number is below 1.

    Example:
        >>> with LocalGrid("package.client_app:app", nodes=100) as grid:
        ...     result = FedAvg(fraction_train=0.1).start(grid, arrays, num_rounds=3)
    """

    def __init__(
        self,
        client_app: ClientCallable | str,
        *,
        nodes: int,
        workers: int | None = None,
        run_config: Mapping[str, UserConfigValue] | None = None,
        start_method: Literal["fork", "spawn"] | None = None,
    ) -> None:
        workers = usable_cores() if workers is None else workers
        if nodes < 1 or workers < 1:
            raise FedveilError(f"nodes = {nodes} and workers = {workers}: both must be at least 1")
        self._forked = (start_method or START_METHOD) == "fork"
        if isinstance(client_app, str):
            loaded = load_client_app(client_app)
            client_app = loaded if self._forked else client_app
        self._setting = Setting(client_app, nodes, _RUN_ID, dict(run_config or {}), os.getpid())
        self._queue: deque[_Task] = deque()
        self._parked: defaultdict[int, deque[_Task]] = defaultdict(deque)
        self._busy_nodes: set[int] = set()
        self._open: set[str] = set()
        self._replies: dict[str, Message] = {}
        self._states: dict[int, Packed] = {}
        self._seconds: dict[tuple[int, str], float] = {}
        self._buffers = _Buffers()
        self._closed = False
        self._workers: list[_Worker] = []
        self.set_run(Run.create_empty(_RUN_ID))
        for _ in range(min(workers, nodes)):
            self._workers.append(self._hire())
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, even in the middle of a message. A second call does nothing."""
        if self._closed or os.getpid() != self._setting.parent:
            return
        self._closed = True
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.stop()

    def set_run(self, run: Run) -> None:
        """Set the run whose number new messages carry."""
        self._run = run
        TaskIdentity.run_id = run.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        TaskIdentity.task_id = 0

    @property
    def run(self) -> Run:
        """The run; a copy."""
        return Run(**vars(self._run))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message; ``flwr.app.Message`` itself does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the node ids in the order of the partition ids; the same in every run."""
        return list(range(FIRST_NODE_ID, FIRST_NODE_ID + self._setting.nodes))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their ids, in order.

        A message is read here, once: changing it or its records afterwards does not change what the
        node receives.

        Raises:
            ValueError: A message is itself a reply, or its time to live is not positive.
            RuntimeError: The grid is closed.
        """
        if self._closed:
            raise RuntimeError("this LocalGrid is closed")
        tasks = [self._read(message) for message in messages]
        self._open.update(task.id for task in tasks)
        # The longest last would leave one worker busy and the others idle.
        unknown = float("inf")
        self._queue.extend(
            sorted(tasks, key=lambda task: self._seconds.get(task.kind, unknown), reverse=True)
        )
        self._hand_out()
        return [task.id for task in tasks]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, in the order of ``message_ids``; each only once.

        Waits up to 0.1 seconds for the first of them while work is under way, so that it can be
        called in a loop. An id that is unknown, or was answered before, has no reply.
        """
        ids = list(message_ids)
        deadline = time.monotonic() + _PULL_SECONDS
        self._advance(0)
        while not any(i in self._replies for i in ids) and any(i in self._open for i in ids):
            if (left := deadline - time.monotonic()) <= 0:
                break
            self._advance(left)
        return self._collect(ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return their replies, in order.

        Args:
            messages: Any number to any nodes; those to one node run one after another.
            timeout: Seconds to wait. What has not come by then is missing from the result and is
                thrown away when it comes; messages that no worker has begun are withdrawn.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        ids = self.push_messages(messages)
        try:
            while not self._open.isdisjoint(ids):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._advance(left)
        finally:
            self._abandon(ids)
        return self._collect(ids)

    def _read(self, message: Message) -> _Task:
        metadata = message.metadata
        if metadata.reply_to_message_id or metadata.ttl <= 0:
            raise ValueError(f"not a message to send: {metadata}")
        metadata.__dict__["_message_id"] = str(uuid4())  # as Flower's own grids do
        packed = pack(message)
        tokens = tuple(self._buffers.add(buffer) for buffer in packed.buffers)
        envelope = make_message(copy.copy(metadata), RecordDict())
        return _Task(envelope, packed.head, tokens)

    def _collect(self, ids: list[str]) -> list[Message]:
        return [self._replies.pop(i) for i in ids if i in self._replies]

    def _abandon(self, ids: list[str]) -> None:
        late = self._open.intersection(ids)
        if not late:
            return
        self._open -= late
        for queue in (self._queue, *self._parked.values()):
            for task in [task for task in queue if task.id in late]:
                queue.remove(task)
                self._buffers.release(task.tokens)

    def _advance(self, timeout: float | None) -> None:
        """Wait for the first worker that has something to say, and take in what all have."""
        self._hand_out()
        talking = {worker.channel: worker for worker in self._workers if worker.task}
        for channel in wait(list(talking), timeout) if talking else ():
            self._take_in(talking[channel])  # type: ignore[index]

    def _hand_out(self) -> None:
        idle = [worker for worker in self._workers if worker.task is None]
        while self._queue and idle:
            task = self._queue.popleft()
            if task.node_id - FIRST_NODE_ID not in range(self._setting.nodes):
                self._fail(task, ErrorCode.NODE_UNAVAILABLE, f"there is no node {task.node_id}")
            elif task.node_id in self._busy_nodes:
                self._parked[task.node_id].append(task)
            elif task.expired:
                self._fail(task, ErrorCode.MESSAGE_UNAVAILABLE, "its time to live is over")
            else:
                self._start(idle.pop(), task)

    def _start(self, worker: _Worker, task: _Task) -> None:
        task.started = time.monotonic()
        task.attempts += 1
        worker.task = task
        self._busy_nodes.add(task.node_id)
        state = self._states.get(task.node_id)
        fresh = tuple(token for token in dict.fromkeys(task.tokens) if token not in worker.held)
        keep = tuple(token for token in fresh if self._buffers.shared(token))
        drop = tuple(token for token in worker.held if token not in self._buffers)
        worker.held.difference_update(drop)
        worker.held.update(keep)
        job = WorkOrder(
            node_id=task.node_id,
            head=task.head,
            tokens=task.tokens,
            fresh=fresh,
            keep=keep,
            drop=drop,
            state=state.head if state else None,
        )
        # A worker that has died meanwhile is noticed where all deaths are: when it is listened to.
        buffers = [self._buffers[token] for token in fresh] + list(state.buffers if state else ())
        with contextlib.suppress(OSError), worker.whole():
            send(worker.channel, job, buffers)

    def _take_in(self, worker: _Worker) -> None:
        task = worker.task
        assert task is not None
        try:
            with worker.whole():
                result, buffers = receive(worker.channel)
        except (EOFError, OSError):
            self._replace(worker, task)
            return
        worker.task = None
        self._seconds[task.kind] = time.monotonic() - task.started
        self._close_task(task, result, buffers)

    def _close_task(self, task: _Task, result: Result, buffers: list[bytes]) -> None:
        if result.state is not None:
            self._states[task.node_id] = Packed(result.state, tuple(buffers[result.buffers :]))
        self._let_go(task)
        # The worker gets its next message before this one's reply is looked at.
        self._hand_out()
        if task.id in self._open:
            self._answer(task, unpack(Packed(result.head, tuple(buffers[: result.buffers]))))

    def _let_go(self, task: _Task) -> None:
        self._buffers.release(task.tokens)
        self._busy_nodes.discard(task.node_id)
        if parked := self._parked.pop(task.node_id, None):
            self._queue.extendleft(reversed(parked))

    def _replace(self, worker: _Worker, task: _Task) -> None:
        worker.stop()
        self._workers[self._workers.index(worker)] = self._hire(instead_of=worker)
        if task.id not in self._open:
            self._let_go(task)
        elif task.attempts < _ATTEMPTS:
            self._busy_nodes.discard(task.node_id)
            self._queue.appendleft(task)
        else:
            self._busy_nodes.discard(task.node_id)
            self._fail(
                task,
                ErrorCode.CLIENT_APP_CRASHED,
                f"node {task.node_id}: its worker process {_how_it_ended(worker.process)}, "
                f"{task.attempts} times",
            )
        self._hand_out()

    def _fail(self, task: _Task, code: int, reason: str) -> None:
        self._let_go(task)
        if task.id in self._open:
            self._answer(task, error_reply(task.message, code, reason))

    def _answer(self, task: _Task, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        self._open.discard(task.id)
        self._replies[task.id] = reply

    def _hire(self, instead_of: _Worker | None = None) -> _Worker:
        ours, theirs = socket.socketpair()
        others = [worker.channel for worker in self._workers if worker is not instead_of]
        context: BaseContext = multiprocessing.get_context("fork" if self._forked else "spawn")
        process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=work,
            args=(self._setting, theirs, [*others, ours] if self._forked else ()),
            name="fedveil-worker",
            daemon=False,  # a client app may itself start processes, as a data loader does
        )
        with interrupts.held():
            process.start()
        theirs.close()
        return _Worker(process, ours)


def _how_it_ended(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with status {code}"
