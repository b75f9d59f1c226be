"""``fedveil audit trace``: a leaked file against a run's archive, as a table and as JSON."""

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from fedveil.audit.trace import Lineup, Suspect, Trace, lineups, trace
from fedveil.errors import FedveilError
from fedveil.files import write_atomically
from fedveil.progress import ProgressBars
from fedveil.runs.archive import Archive
from fedveil.runs.directory import RunDirectory, versions
from fedveil.runs.secrets import MODEL
from fedveil.runs.state_files import read_state
from fedveil.types import Weights

_UNNAMED_SHOWN = 3
_LEAST = -99  # a smaller power of ten is printed as this
# Training, pruning or quantising w moves it by more than this part of a layer's root mean square.
_SAME = 1e-3


def run_trace(leaked: Path, run: Path, *, alpha: float, out: Path | None) -> str:
    """Trace a leaked file and return what to tell the user.

    Args:
        leaked: File of the leaked model's tensors.
        run: Directory of the run it may have come from.
        alpha: Chance to name anybody innocent.
        out: JSON file to write; ``None``: none.

    Raises:
        FedveilError: A file is missing, damaged or does not fit, or copies carry no fingerprints.
    """
    state = read_state(leaked, option="LEAKED")
    directory = RunDirectory.open(run)
    archive = Archive.open(directory.path, directory.noise_key())
    found = trace(state, _watched(archive), alpha=alpha)
    is_w = _is_delivered(state, directory)
    if out:
        described = {"leaked": str(leaked), "run": str(run), **as_json(found), "is_w": is_w}
        try:
            write_atomically(out, (json.dumps(described, indent=2) + "\n").encode(), mode=0o600)
        except OSError as error:
            raise FedveilError(f"--out {out}: {error.strerror}") from None
    return report(found, is_w=is_w)


def as_json(found: Trace) -> dict[str, Any]:
    """Return a trace as plain values."""
    return {
        "named": list(found.named),
        "alpha": found.alpha,
        "tests": found.tests,
        "values_compared": found.values,
        "decoys": _decoys(found),
        "clients": [_described(suspect) for suspect in found.suspects],
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
    }


def report(found: Trace, *, is_w: bool) -> str:
    """Return a trace as lines of text: who is named, and on what grounds."""
    named = [s for s in found.suspects if s.client in found.named]
    others = [s for s in found.suspects if s.client not in found.named]
    lines = [f"{'client':>8}{'z':>9}{'p':>11}  {'verdict':9}rounds of the copies in the leak"]
    lines += [_line(suspect, "named") for suspect in named]
    lines += [_line(suspect, "not named") for suspect in others[:_UNNAMED_SHOWN]]
    decoys = _decoys(found)
    lines.append(
        f"{len(named)} of {len(found.suspects)} clients named. The chance to name anybody innocent "
        f"is at most {found.alpha:g} ({found.tests} tests). Keys that nobody got: "
        f"{decoys['keys']}, z {decoys['mean']:+.2f} ± {decoys['sd']:.2f}, at most "
        f"{decoys['max']:.1f}."
    )
    if is_w:
        lines.append(
            "The file is w itself, which no client was ever sent: look for the leak at the server, "
            "or at the party w was delivered to."
        )
    elif not named:
        lines.append(
            "No copy of this run is found in it: it is another model, or one in which training, "
            "distillation or a rearrangement of its neurons has left nothing of the copies' values."
        )
    return "\n".join(lines)


def _line(suspect: Suspect, verdict: str) -> str:
    rounds = ", ".join(map(str, suspect.rounds))
    if verdict == "named" and not rounds:
        rounds = "all together"
    return (
        f"{suspect.client:>8}{suspect.z:>9.1f}{_power(suspect):>11}  {verdict:9} {rounds}".rstrip()
    )


def _power(suspect: Suspect) -> str:
    exponent = suspect.log10_p
    if exponent < _LEAST:
        return f"<1e{_LEAST}"
    return f"{10**exponent:.2g}" if exponent > -4 else f"1e{math.floor(exponent)}"


def _described(suspect: Suspect) -> dict[str, Any]:
    return {
        "client": suspect.client,
        "rounds": list(suspect.rounds),
        "z": suspect.z,
        "p": 10**suspect.log10_p,
        "log10_p": suspect.log10_p,
        "scores": {str(number): score for number, score in sorted(suspect.scores.items())},
    }


def _decoys(found: Trace) -> dict[str, float]:
    z = found.decoys
    return {"keys": len(z), "mean": fmean(z), "sd": stdev(z), "max": max(z)}


def _watched(archive: Archive) -> Iterator[Lineup]:
    with ProgressBars(transient=True) as bars:
        for lineup in lineups(archive):
            bars.begin("rounds", archive.rounds.index(lineup.round), len(archive.rounds), "")
            yield lineup


def _is_delivered(state: Weights, run: RunDirectory) -> bool:
    if not run.secrets.path(MODEL).is_file():
        return False
    delivered = run.model()
    common = [
        (state[name].float(), value)
        for name, value in delivered.items()
        if name in state and state[name].shape == value.shape and value.is_floating_point()
    ]
    return len(common) > 0 and all(_close(a, b) for a, b in common)


def _close(value: Tensor, wanted: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(value - wanted) <= _SAME * wanted.norm())
