"""How worker processes start, what they need not load each for itself, and work done in them."""

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from typing import Literal, TypeVar

import torch

from fedveil import interrupts
from fedveil.errors import FedveilError

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")

START_METHOD: Literal["fork", "spawn"] = "fork" if sys.platform == "linux" else "spawn"


def load_before_forking(*modules: str) -> None:
    """Import what every fork of this process would import again; nothing where none are forked.

    Args:
        modules: By name.
    """
    if START_METHOD == "fork":
        for name in modules:
            import_module(name)


def in_processes(
    work: Callable[[_Item], _Found],
    items: Sequence[_Item],
    *,
    workers: int,
    prepare: Callable[[], None] = lambda: None,
    loads: Sequence[str] = (),
) -> Iterator[_Found]:
    """Yield what comes of each item as it comes; no worker outlives this, whatever ends it.

    Args:
        work: Picklable, as the items and what it returns.
        items: In the order in which they begin.
        workers: Processes at a time, at least 1.
        prepare: Called in each of them first; a fork inherits what it holds.
        loads: Modules that they use.

    Raises:
        FedveilError: A worker died; or what ``work`` raises.
    """
    if not items:
        return
    before = set(multiprocessing.active_children())
    count = min(workers, len(items))
    load_before_forking(*loads)
    context = multiprocessing.get_context(START_METHOD)
    pool = ProcessPoolExecutor(count, context, _begin, (prepare,))
    try:
        with interrupts.held():
            futures = [pool.submit(work, item) for item in items]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise FedveilError(
            "a worker process died, perhaps for lack of memory; what was measured is kept: give "
            "the same command again, with fewer --workers"
        ) from None
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(prepare: Callable[[], None]) -> None:
    interrupts.leave_to_parent()
    torch.set_num_threads(1)
    prepare()
