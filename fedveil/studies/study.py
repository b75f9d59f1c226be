"""Pieces of long studies: each kept in a file as soon as it is finished, none measured twice."""

import dataclasses
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedveil import interrupts
from fedveil.audit.leakage import LeakageSettings, run_leakage_audit
from fedveil.audit.pieces import plain, read_piece
from fedveil.defenses import parse_defense
from fedveil.errors import FedveilError
from fedveil.federation.evaluation import count_correct
from fedveil.federation.server_app import load_job
from fedveil.federation.training_run import run_to_completion
from fedveil.files import write_atomically
from fedveil.memory import keep_freed_memory
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory, versions

_EVALUATION_BLOCK = 1_000
_PATIENCE_SECONDS = 10.0

OnPiece = Callable[[str, int, int], None]
"""Called as ``on_piece(name, pieces done, pieces in all)``."""


def audited(
    dataset: str,
    model: str,
    settings: LeakageSettings,
    path: Path,
    *,
    checkpoint: Path | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of an audit, from its directory where it is complete.

    Args:
        dataset: What is attacked, by name.
        model: What is trained on it, by name.
        settings: What is audited.
        path: Directory of the audit.
        checkpoint: Weights of the model; freshly initialised ones otherwise.

    Raises:
        FedveilError: The directory is of another audit or damaged, or what the audit refuses.
    """
    stored = path / "leakage.json"
    if not stored.exists():
        run_leakage_audit(dataset, model, settings, out=path, checkpoint=checkpoint)
    content = read_piece(stored)
    # A setting that was added later is as it was before there was one.
    added = {
        field.name: field.default
        for field in dataclasses.fields(LeakageSettings)
        if field.default is not dataclasses.MISSING
    }
    asked = {"dataset": dataset, "model": model, **asdict(settings)}
    if plain(added | content.get("settings", {})) != plain(asked):
        raise other_settings(path)
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def trained(config: TrainConfig, out: Path, name: str) -> dict[str, Any]:
    """Return the accuracies of a training run, from its file where it is complete.

    Args:
        config: The run's settings.
        out: Directory of the study, which keeps runs in ``runs`` and results in ``accuracy``.
        name: Of the run.

    Returns:
        ``plain`` and ``transformed``, accuracies on the report images as they are and as clients
        would have transformed them; ``rounds``, accuracies on the way; ``privacy``, (ε, δ) of
        DP-SGD; ``report_images`` and ``configuration``.

    Raises:
        FedveilError: The directory is of another run or damaged, or what the training refuses.
    """
    stored = out / "accuracy" / f"{name}.json"
    if stored.exists():
        content = read_piece(stored)
        if TrainConfig.check(content.get("configuration", {})) != config:
            raise other_settings(stored)
        return content
    path = out / "runs" / name
    started = (path / "config.json").exists()
    directory = RunDirectory.open(path) if started else RunDirectory.create(path, config)
    if directory.config != config:
        raise other_settings(path)
    summary = run_to_completion(directory)
    content = {
        "configuration": config.model_dump(),
        "report_images": summary["report_images"],
        "plain": summary["accuracy"],
        "transformed": _accuracy_transformed(directory),
        "privacy": summary.get("privacy"),
        "rounds": [record.accuracy for record in directory.rounds()],
    }
    write_atomically(stored, (json.dumps(content, indent=1) + "\n").encode())
    return content


def _accuracy_transformed(run: RunDirectory) -> float:
    """Return the accuracy on the report images as the clients would have transformed them."""
    config = run.config
    job = load_job(config)
    job.model.load_state_dict(run.model())
    transform = parse_defense(config.defense).transform or nn.Identity()
    report, correct = job.evaluation.report, 0
    for start in range(0, len(report), _EVALUATION_BLOCK):
        block = report[start : start + _EVALUATION_BLOCK]
        with torch.no_grad():
            correct += count_correct(job.model, transform(block.pixels), block.labels)
    return correct / len(report)


def other_settings(path: Path) -> FedveilError:
    """Return the refusal of a piece that was measured with other settings."""
    return FedveilError(
        f"{path} was made with other settings; remove it, or name another directory with --out"
    )


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return values with their mean and standard deviation."""
    return {
        "seeds": list(values),
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    }


def png(figure: Any) -> bytes:
    """Return a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def with_interval(row: Mapping[str, Any], name: str, form: str) -> str:
    """Return a column of an audit's row with its interval and its floor, each in one format."""
    low, high, floor = (row.get(f"{name}_{end}") for end in ("low", "high", "floor"))
    text = f"{row[name]:{form}}"
    text += " [one update]" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
    return text if floor is None else f"{text}, floor {floor:{form}}"


@dataclass(frozen=True)
class Piece:
    """Work of its own process, which leaves its result in a file.

    Attributes:
        name: For progress.
        work: What is done; picklable.
        arguments: Of ``work``.
    """

    name: str
    work: Callable[..., object]
    arguments: tuple[Any, ...]


def run_pieces(
    pieces: Sequence[Piece],
    *,
    workers: int,
    on_piece: OnPiece = lambda name, done, total: None,
) -> None:
    """Do pieces of work in processes side by side.

    An interrupt reaches every process, and the call ends when all have cleaned up.

    Args:
        pieces: In the order in which they begin.
        workers: Processes at a time, at least 1.
        on_piece: Called as ``on_piece(name, pieces begun before, pieces in all)`` when one begins.

    Raises:
        FedveilError: A piece failed; those under way are interrupted, and finished ones kept.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting, running = list(pieces), dict[int, tuple[BaseProcess, Any, Piece]]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                piece = waiting.pop(0)
                on_piece(piece.name, len(pieces) - len(waiting) - 1, len(pieces))
                process, receiver = _start(context, piece)
                running[process.sentinel] = (process, receiver, piece)
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                process, receiver, piece = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    told = receiver.recv() if receiver.poll() else f"exit {process.exitcode}"
                    raise FedveilError(f"{piece.name}: {told}")
    finally:
        _stop([process for process, _, _ in running.values()])


def _start(context: BaseContext, piece: Piece) -> tuple[BaseProcess, Any]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(piece, sender))  # type: ignore[attr-defined]
    with interrupts.held():
        process.start()
    sender.close()
    return process, receiver


def _work(piece: Piece, sender: Any) -> None:
    # What a piece is ended by; Ctrl-C is not heard by one that was started under nohup or cron.
    interrupts.answer_sigterm()
    # Several processes would draw their progress bars over one another.
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        piece.work(*piece.arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except FedveilError as error:
        sender.send(str(error))
        sys.exit(2)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
        sys.exit(1)


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            process.terminate()
    for process in processes:
        process.join(_PATIENCE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def described(study: Any) -> dict[str, Any]:
    """Return what stands above a study's rows: its command, date, versions, seeds and settings.

    Args:
        study: A dataclass with ``command`` and ``seeds``, how many.
    """
    return {
        "command": study.command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "seeds": list(range(study.seeds)),
        "settings": plain(asdict(study)),
    }
