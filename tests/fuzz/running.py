"""Feeding targets in child processes that are watched from outside."""

import faulthandler
import multiprocessing
import os
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fedveil.errors import FedveilError
from tests.fuzz.targets import Target

MEMORY = 2 * 2**30
"""Bytes a parser may take beyond what its process had before."""

SECONDS = 10.0
"""Processor seconds that one input may take."""

WAIT = 180.0
"""Seconds on the clock that one input may take, on a busy machine."""


@dataclass
class Tally:
    """What became of the inputs of one target."""

    accepted: int = 0
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0


def inputs(
    target: Target, seeds: list[bytes], seed: int, numbers: range
) -> Iterator[tuple[int, bytes]]:
    """Yield the inputs of a target by number."""
    for number in numbers:
        yield number, target.mutate(Random(f"{target.name}/{seed}/{number}"), seeds)


def outcome(target: Target, content: bytes) -> str:
    """Return "accepted" or "refused".

    Raises:
        Exception: What the parser should not have raised.
    """
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
        try:
            target.parse(content, Path(folder))
        except FedveilError as error:
            if not str(error).strip() or len(str(error)) > 100_000:
                raise AssertionError(f"a message of {len(str(error))} characters") from error
            return "refused"
    return "accepted"


def _scratch() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run_target(target: Target, *, seed: int, count: int, failures: Path) -> Tally:
    """Feed ``count`` inputs to a target, each attempt in a child that may crash or hang."""
    context = multiprocessing.get_context("fork")
    shared = context.Array("q", 4)  # next number, accepted, refused, failed
    tally = Tally()
    seeds = target.seeds()
    started = time.monotonic()
    while shared[0] < count:
        child = context.Process(
            target=_feed, args=(target, seeds, seed, count, shared, failures), daemon=True
        )
        child.start()
        verdict = _watch(child, shared)
        if verdict:
            number = shared[0]
            content = next(inputs(target, seeds, seed, range(number, number + 1)))[1]
            _save(failures, target, number, content, verdict)
            shared[3] += 1
            shared[0] += 1
    tally.accepted, tally.refused, tally.failed = shared[1:4]
    tally.seconds = time.monotonic() - started
    return tally


def _watch(child: Any, shared: Any) -> str | None:
    """Wait for a child; return what went wrong with the input it was at, if anything did."""
    last, since, used = shared[0], time.monotonic(), _processor(child.pid)
    while child.is_alive():
        child.join(0.2)
        if shared[0] != last:
            last, since, used = shared[0], time.monotonic(), _processor(child.pid)
        elif _processor(child.pid) - used > SECONDS or time.monotonic() - since > WAIT:
            child.kill()
            child.join()
            return f"no end after {time.monotonic() - since:.0f} s"
    return None if child.exitcode == 0 else f"the process ended with {child.exitcode}"


def _processor(pid: int) -> float:
    """Return the processor seconds a process has had; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _feed(
    target: Target, seeds: list[bytes], seed: int, count: int, shared: Any, failures: Path
) -> None:
    faulthandler.disable()  # a crash is told by the exit status
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)  # C libraries write there what they think of the input
    warnings.simplefilter("ignore")
    _limit_memory()
    for number, content in inputs(target, seeds, seed, range(shared[0], count)):
        try:
            place = {"accepted": 1, "refused": 2}[outcome(target, content)]
        except Exception:
            _save(failures, target, number, content, traceback.format_exc())
            place = 3
        shared[place] += 1
        shared[0] = number + 1


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _save(failures: Path, target: Target, number: int, content: bytes, why: str) -> None:
    failures.mkdir(parents=True, exist_ok=True)
    (failures / f"{target.name}-{number}.bin").write_bytes(content)
    (failures / f"{target.name}-{number}.txt").write_text(why, errors="replace")


def fuzz(chosen: Sequence[Target], *, seed: int, scale: float, failures: Path) -> dict[str, Tally]:
    """Feed every chosen target its share of inputs, with a line of progress for each."""
    tallies = {}
    for target in chosen:
        count = max(1, round(target.count * scale))
        tally = run_target(target, seed=seed, count=count, failures=failures)
        tallies[target.name] = tally
        print(
            f"{target.name:24}{count:8,} inputs  {tally.accepted:7,} accepted  "
            f"{tally.refused:7,} refused  {tally.failed:5,} failed  {tally.seconds:6.0f} s",
            flush=True,
        )
    return tallies
