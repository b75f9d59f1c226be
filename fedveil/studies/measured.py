"""What studies are made of: audits and training runs, each kept and not measured twice."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedveil.audit.leakage import run_leakage_audit
from fedveil.audit.pieces import plain, read_piece
from fedveil.audit.settings import LeakageSettings
from fedveil.defenses import parse_defense
from fedveil.errors import FedveilError
from fedveil.federation.evaluation import count_correct
from fedveil.federation.server_app import load_job
from fedveil.federation.training_run import run_to_completion
from fedveil.files import json_bytes, write_results
from fedveil.results import Term, renamed
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory

_EVALUATION_BLOCK = 1_000


def audited(
    dataset: str,
    model: str,
    settings: LeakageSettings,
    path: Path,
    *,
    checkpoint: Path | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of an audit, as of ``report_of``."""
    rows: list[dict[str, Any]] = report_of(dataset, model, settings, path, checkpoint)["rows"]
    return rows


def report_of(
    dataset: str,
    model: str,
    settings: LeakageSettings,
    path: Path,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Return the content of an audit's ``leakage.json``; audit where there is none.

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
        raise _other_settings(path)
    return {**content, "rows": [renamed(row) for row in content["rows"]]}


def averaging(**settings: Any) -> TrainConfig:
    """Return the settings of a run of plain averaging over all clients, to its last round."""
    common = {"strategy": "fedavg", "fraction": 1.0, "deliver": "last"}
    # Each round; the last counts on all.
    return TrainConfig.check({**common, "report_images": 500, **settings})


def run_of(config: TrainConfig, path: Path) -> tuple[RunDirectory, dict[str, Any]]:
    """Return a run that is complete, and its summary; train what is missing of it.

    Args:
        config: The run's settings.
        path: Its directory; made if need be.

    Raises:
        FedveilError: The directory is of another run or damaged, or what the training refuses.
    """
    started = (path / "config.json").exists()
    directory = RunDirectory.open(path) if started else RunDirectory.create(path, config)
    # The number of workers changes no result, only when it is there.
    if directory.config.model_copy(update={"workers": config.workers}) != config:
        raise _other_settings(path)
    return directory, run_to_completion(directory)


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
            raise _other_settings(stored)
        return content
    directory, summary = run_of(config, out / "runs" / name)
    content = {
        "configuration": config.model_dump(),
        "report_images": summary["report_images"],
        "plain": summary["accuracy"],
        "transformed": _accuracy_transformed(directory),
        "privacy": summary.get("privacy"),
        "rounds": [record.accuracy for record in directory.rounds()],
    }
    write_results(stored.parent, {stored.name: json_bytes(content)})
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


def _other_settings(path: Path) -> FedveilError:
    """Return the refusal of a piece that was measured with other settings."""
    return FedveilError(
        f"{path} was made with other settings; remove it, or name another directory with --out"
    )


def settings_of(study: Any) -> dict[str, Any]:
    """Return the seeds and settings of a study, a dataclass with ``seeds``, how many."""
    return {"seeds": list(range(study.seeds)), "settings": plain(asdict(study))}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return values with their mean and standard deviation."""
    return {
        "seeds": list(values),
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    }


def with_interval(row: Mapping[str, Any], score: Term, form: str) -> str:
    """Return a column of an audit's row with its interval and its floor, each in one format."""
    low, high, floor = (row.get(f"{score.key}_{end}") for end in ("low", "high", "floor"))
    text = f"{row[score.key]:{form}}"
    text += " [one update]" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
    return text if floor is None else f"{text}, floor {floor:{form}}"
