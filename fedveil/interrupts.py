"""Requests to end: SIGTERM is answered as Ctrl-C is, so that what is done is kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_BOTH = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: of a scheduler, a container's stop, a shutdown."""


def answer_sigterm() -> None:
    """Let SIGTERM raise where Ctrl-C would; nothing else hears it in a process started by nohup.

    Has no effect outside the main thread, which is the only one that signals reach.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BOTH)


def leave_to_parent() -> None:
    """Let a worker process ignore Ctrl-C, which its parent answers, and end at SIGTERM.

    A fork inherits its parent's answer to SIGTERM, and would print it when the parent ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BOTH)


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


@contextmanager
def held() -> Iterator[None]:
    """Let requests to end wait until the block is over.

    Python runs its own hooks around a fork and drops whatever they raise, so an interrupt that
    came then would be lost. A process that is begun here begins with them waiting, too: it calls
    ``leave_to_parent`` or ``answer_sigterm`` first.
    """
    # The mask is inherited, and hides nothing that another thread of this process takes: for that
    # the answer is put off.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BOTH)
    try:
        with _put_off():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _put_off() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in _BOTH}
    came: list[tuple[int, FrameType | None]] = []
    ours = [number for number in _BOTH if callable(previous[number])]
    for number in ours:
        signal.signal(number, lambda *interrupt: came.append(interrupt))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, previous[number])
        if came:
            handler = previous[signal.Signals(came[0][0])]
            assert callable(handler)
            handler(*came[0])
