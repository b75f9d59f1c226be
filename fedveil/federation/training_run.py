"""One training run from its directory to its summary and picture."""

import json
from collections.abc import Callable
from typing import Any

from fedveil.federation.engines.choose import train
from fedveil.federation.progress import RoundProgress
from fedveil.federation.server_app import kept_cap
from fedveil.runs.curves import draw_curves
from fedveil.runs.directory import RoundRecord, RunDirectory
from fedveil.runs.logs import round_log


def run_to_completion(directory: RunDirectory) -> dict[str, Any]:
    """Train until the configured rounds are done and return ``summary.json``.

    A run that is complete already is left as it is.

    Args:
        directory: New, or of an earlier, killed or interrupted run.

    Raises:
        FedveilError: Anything the user can mend.
    """
    with directory.locked():
        return _completed(directory)


def _completed(directory: RunDirectory) -> dict[str, Any]:
    config = directory.config
    cap = kept_cap(config)
    completed = len(directory.rounds())
    if not directory.complete:
        with (
            RoundProgress(rounds=config.rounds, completed=completed, cap=cap) as progress,
            round_log(directory) as log,
        ):
            train(directory, on_round=lambda record: _tell(record, progress, log))
    draw_curves(directory.rounds(), directory.path / "curves.png", cap=cap)
    summary: dict[str, Any] = json.loads((directory.path / "summary.json").read_text())
    return summary


def _tell(record: RoundRecord, *listeners: Callable[[RoundRecord], None]) -> None:
    for listener in listeners:
        listener(record)
