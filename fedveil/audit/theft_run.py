"""A theft audit from its settings: thieves in worker processes, each kept as soon as it is done."""

import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch

from fedveil import interrupts
from fedveil.audit.theft import Theft, TheftReport, TheftSettings, steal
from fedveil.audit.thieves import AuditedRun, Thief
from fedveil.errors import FedveilError
from fedveil.federation.engines.worker import usable_cores
from fedveil.files import check_directory, write_atomically
from fedveil.progress import ProgressBars

_START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def run_theft_audit(
    settings: TheftSettings, *, out: Path, workers: int | None = None
) -> TheftReport:
    """Audit a run, and write theft.json and theft.png.

    Every thief's result is kept under ``out/thieves`` as soon as it is there; those of an earlier,
    interrupted audit of the same run are not made again.

    Args:
        settings: What is audited.
        out: Directory for the results.
        workers: Worker processes, one a core by default; results do not depend on it.

    Raises:
        FedveilError: Anything the user can mend.
    """
    if workers is not None and workers < 1:
        raise FedveilError(f"--workers {workers} is out of range: give at least 1")
    check_directory(out)
    run = AuditedRun(settings.run, settings.seed)
    run.check_stealable()
    reference = run.accuracy(run.delivered())
    for thief in settings.cells:
        run.clients(thief)  # so that too many colluders are refused before anything is written
    (out / "thieves").mkdir(parents=True, exist_ok=True)
    thefts = {thief: _stored(run, thief, out) for thief in settings.cells}
    missing = [thief for thief, theft in thefts.items() if theft is None]
    before = len(thefts) - len(missing)
    with ProgressBars() as bars:
        bars.begin("thieves", before, len(thefts))
        stolen = _stolen(settings, missing, workers or usable_cores())
        for number, theft in enumerate(stolen, start=before + 1):
            _store(run, theft, out)
            thefts[theft.thief] = theft
            bars("thieves", number, len(thefts), str(theft.thief))
    done = tuple(theft for theft in thefts.values() if theft)
    report = TheftReport(settings, reference, done)
    report.write(out)
    return report


def _stolen(settings: TheftSettings, thieves: Sequence[Thief], workers: int) -> Iterator[Theft]:
    """Yield each thief's result as it comes; no worker outlives this, whatever ends it."""
    if not thieves:
        return
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(thieves)), multiprocessing.get_context(_START_METHOD), _prepare_worker
    )
    try:
        futures: list[Future[Theft]] = [
            pool.submit(_work, settings.run, settings.seed, thief) for thief in thieves
        ]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise FedveilError(
            "a worker process of the audit died, perhaps for lack of memory; what was measured is "
            "kept: give the same command again, with fewer --workers"
        ) from None
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare_worker() -> None:
    interrupts.leave_to_parent()
    torch.set_num_threads(1)


def _work(run: Path, seed: int, thief: Thief) -> Theft:
    return steal(_audited(run, seed), thief)


@lru_cache(maxsize=1)
def _audited(run: Path, seed: int) -> AuditedRun:
    return AuditedRun(run, seed)


def _path(out: Path, thief: Thief) -> Path:
    return out / "thieves" / f"{thief}.json"


def _store(run: AuditedRun, theft: Theft, out: Path) -> None:
    content = {"audited": run.identity, "theft": asdict(theft)}
    write_atomically(_path(out, theft.thief), (json.dumps(content) + "\n").encode())


def _stored(run: AuditedRun, thief: Thief, out: Path) -> Theft | None:
    path = _path(out, thief)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        audited, theft = content["audited"], Theft.from_json(content["theft"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedveilError(f"{path} is damaged ({error}); remove it to measure anew") from None
    if not run.is_same(audited):
        raise FedveilError(
            f"{path} is of another run or seed; remove it, or name another directory with --out"
        )
    return theft
