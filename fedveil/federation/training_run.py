"""One training run from its directory to its summary and picture."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fedveil.federation.engines.choose import train
from fedveil.federation.server_app import kept_cap
from fedveil.progress import ProgressBars
from fedveil.runs.curves import draw_curves
from fedveil.runs.directory import RoundRecord, RunDirectory, fallen_from
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
            ProgressBars(left=True) as bars,
            round_log(directory) as log,
        ):
            bars.begin("round", completed, config.rounds)
            seen = directory.rounds()
            show = partial(_show, bars, seen=seen, rounds=config.rounds, cap=cap)
            train(directory, on_round=lambda record: _tell(record, seen.append, show, log))
    draw_curves(directory.rounds(), directory.path / "curves.png", cap=cap)
    summary: dict[str, Any] = json.loads((directory.path / "summary.json").read_text())
    return summary


def _show(
    bars: ProgressBars,
    record: RoundRecord,
    *,
    seen: Sequence[RoundRecord],
    rounds: int,
    cap: float | None,
) -> None:
    text = f"accuracy {record.accuracy:.1%}"
    if before := fallen_from(seen):
        text += f", fallen from {before.accuracy:.1%} in round {before.round}"
    if cap is not None:
        text += f"  copies {max(record.copies):.1%} (cap {cap:.0%})"
    bars("round", record.round, rounds, text)


def _tell(record: RoundRecord, *listeners: Callable[[RoundRecord], None]) -> None:
    for listener in listeners:
        listener(record)
