"""``fedveil audit theft``: what clients can make of the copies they were sent."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedveil.attacks.theft import ATTACKS, COMBINATIONS, Stolen, TheftObservation
from fedveil.audit.map_thieves import ATTACKS_ON_MAPS, MapThieves
from fedveil.audit.metrics import Interval, bootstrap
from fedveil.audit.settings import TheftSettings
from fedveil.audit.thieves import AuditedRun, Thief
from fedveil.errors import FedveilError
from fedveil.federation.engines.worker import usable_cores
from fedveil.files import check_directory, json_bytes, write_atomically, write_results
from fedveil.forks import in_processes
from fedveil.pictures import BLACK, BLUE, GREEN, GREY, ORANGE, png
from fedveil.progress import ProgressBars
from fedveil.runs.directory import origin
from fedveil.types import Weights

THIEF, OWNER = "best by the thief's holdout", "best by the owner's view"
"""Rows of the best of the suite; see ``TheftReport``."""

_CORE = ("direct", "batch-norm", "probe", "fine-tune", "retrain-noised")
_ALL = tuple(ATTACKS)
_ONE = (("last", _ALL), ("averaged", _CORE), ("every", ("cluster",)))
_SEVERAL = (("last", _CORE), ("colluding", _ALL), ("every", ("cluster",)))


@dataclass(frozen=True)
class Attempt:
    """One attack of one thief.

    Attributes:
        attack: Its name, with the combination of copies before it.
        accuracy: On the report images, which the thief never sees.
        held_out: Accuracy and confidence on the thief's own held-out images.
    """

    attack: str
    accuracy: float
    held_out: tuple[float, float]


@dataclass(frozen=True)
class Theft:
    """All that one thief tried.

    Attributes:
        thief: Who.
        clients: Partitions of the clients that colluded.
        labels_held: Labelled images they really had, fewer where their shares are smaller.
        attempts: With the copies, an attack each.
        alone: Without them: the same attacks on a fresh initialisation.
    """

    thief: Thief
    clients: tuple[int, ...]
    labels_held: int
    attempts: tuple[Attempt, ...]
    alone: tuple[Attempt, ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Theft":
        """Read what ``asdict`` made and JSON kept."""
        return cls(
            thief=Thief(**content["thief"]),
            clients=tuple(content["clients"]),
            labels_held=int(content["labels_held"]),
            attempts=tuple(map(_attempt, content["attempts"])),
            alone=tuple(map(_attempt, content["alone"])),
        )


def _attempt(content: Mapping[str, Any]) -> Attempt:
    accuracy, confidence = content["held_out"]
    return Attempt(content["attack"], float(content["accuracy"]), (accuracy, confidence))


def steal(run: AuditedRun, thief: Thief) -> Theft:
    """Let one thief try every attack, and train alone with the same search; score both.

    Raises:
        FedveilError: No round had as many clients as collude.
    """
    observation = run.observation(thief)
    alone = replace(observation, copies=(), noised=())
    return Theft(
        thief,
        run.clients(thief),
        len(observation.labelled),
        tuple(_attempts(run.accuracy, observation, thief.colluders)),
        tuple(_tried(run.accuracy, alone, _ALL, "")),
    )


def steal_by_map(thieves: MapThieves, thief: Thief) -> Theft:
    """Let one thief try every head on the map that was sent, and on one of its own; score both.

    Raises:
        FedveilError: No round had as many clients as collude.
    """
    through = thieves.seen_by(thief)
    attempts, alone = (
        tuple(_tried(seen.accuracy, seen.observation, ATTACKS_ON_MAPS, "")) for seen in through
    )
    labels_held = len(through[0].observation.labelled)
    return Theft(thief, thieves.run.clients(thief), labels_held, attempts, alone)


_Accuracy = Callable[[Weights], float]


def _attempts(accuracy: _Accuracy, observation: TheftObservation, colluders: int) -> list[Attempt]:
    tried: list[Attempt] = []
    for name, attacks in _ONE if colluders == 1 else _SEVERAL:
        combination = COMBINATIONS[name]
        if combination.applies(observation):
            prefix = "" if name == "last" else f"{name} + "
            tried += _tried(accuracy, combination(observation), attacks, prefix)
    return tried


def _tried(
    accuracy: _Accuracy, observation: TheftObservation, attacks: Sequence[str], prefix: str
) -> list[Attempt]:
    return [
        _scored(accuracy, f"{prefix}{name}", ATTACKS[name](observation))
        for name in attacks
        if ATTACKS[name].applies(observation)
    ]


def _scored(accuracy: _Accuracy, name: str, stolen: Stolen) -> Attempt:
    seen = (stolen.score.accuracy, stolen.score.confidence)
    return Attempt(name, accuracy(stolen.weights), seen)


@dataclass(frozen=True)
class TheftReport:
    """The result of an audit.

    Every row has accuracy, alone and advantage, the difference, as means over thieves with 95 %
    bootstrap intervals; ``alone`` is training alone on the same labelled images. Rows of single
    attacks and ``THIEF`` measure a thief that chooses among attacks, and among ways to train alone,
    by its own holdout. ``OWNER`` is what the owner has to fear: of the attacks that every thief
    tried the one with the greatest mean accuracy on the report images, against the greatest of
    training alone.

    Attributes:
        settings: What was audited.
        reference: Accuracy of w on the report images, at the end of the run.
        thefts: All thefts.
        sent: What clients were sent, in words.
    """

    settings: TheftSettings
    reference: float
    thefts: tuple[Theft, ...]
    sent: str = "copies of a model"

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of ``theft.json``."""
        return [
            row
            for labels in self.settings.labels
            for colluders in self.settings.colluders
            for row in self._rows(labels, colluders)
        ]

    def row(self, attack: str, labels: int, colluders: int) -> dict[str, Any]:
        """Return one row; ``attack`` is of ``ATTACKS``, a combination with one, or a best."""
        return next(r for r in self._rows(labels, colluders) if r["attack"] == attack)

    def _rows(self, labels: int, colluders: int) -> list[dict[str, Any]]:
        thefts = [
            theft
            for theft in self.thefts
            if (theft.thief.labels, theft.thief.colluders) == (labels, colluders)
        ]
        alone = [_by_holdout(theft.alone) for theft in thefts]
        chosen = [_by_holdout(theft.attempts) for theft in thefts]
        common = {
            "labels": labels,
            "colluders": colluders,
            "labels_held": [theft.labels_held for theft in thefts],
            "thieves": len(thefts),
        }
        named = _by_name([theft.attempts for theft in thefts])
        owner, owner_alone = (
            max(_by_name(arms).values(), key=_mean)
            for arms in ([t.attempts for t in thefts], [t.alone for t in thefts])
        )
        return [
            *(_row(name, tried, alone) | common for name, tried in named.items()),
            _row(THIEF, chosen, alone) | common,
            _row(OWNER, owner, owner_alone) | common,
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``theft.json``."""
        return {
            "settings": {**asdict(self.settings), "run": str(self.settings.run)},
            "reference": self.reference,
            "sent": self.sent,
            **origin(),
            "rows": self.rows(),
            "untold": list(self.untold()),
            "thefts": [asdict(theft) for theft in self.thefts],
        }

    def table(self) -> str:
        """Return the bests as lines of text."""
        lines = [
            f"clients were sent {self.sent}; w, kept by the server: {self.reference:.1%}",
            f"{'labels':>6} {'colluders':>9} {'alone':>7} {'direct':>7}   "
            f"{'thief chooses':15}{'advantage':23}{'owner fears':15}{'advantage':23}by",
        ]
        lines += [
            self._line(labels, colluders)
            for colluders in self.settings.colluders
            for labels in self.settings.labels
        ]
        return "\n".join([*lines, *self.untold()])

    def untold(self) -> Iterator[str]:
        """Yield what the rows cannot tell, as thieves' shares had not the labels they ask for."""
        for labels in self.settings.labels:
            held = [theft.labels_held for theft in self.thefts if theft.thief.labels == labels]
            if held and min(held) < labels:
                told = f"{min(held)}" if min(held) == max(held) else f"{min(held)} to {max(held)}"
                yield (
                    f"Thieves who were to hold {labels:,} labelled images held {told}: their "
                    f"clients have no more, and nothing is told of {labels:,}."
                )

    def _line(self, labels: int, colluders: int) -> str:
        direct, thief, owner = (
            self.row(name, labels, colluders) for name in ("direct", THIEF, OWNER)
        )
        return (
            f"{labels:6} {colluders:9} {thief['alone']:7.1%} {direct['accuracy']:7.1%}   "
            f"{thief['accuracy']:<15.1%}{points(thief):23}{owner['accuracy']:<15.1%}"
            f"{points(owner):23}{owner['chosen'][0]}"
        )

    def write(self, out: Path) -> None:
        """Write theft.png and theft.json into ``out``, each whole or not at all.

        Raises:
            FedveilError: The directory cannot be written.
        """
        files = {
            "theft.png": _draw(self),
            "theft.json": json_bytes(self.as_json()),
        }
        write_results(out, files)


def cells(settings: TheftSettings) -> tuple[Thief, ...]:
    """Return every thief of an audit."""
    return tuple(
        Thief(labels, colluders, number)
        for labels in settings.labels
        for colluders in settings.colluders
        for number in range(settings.thieves)
    )


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
    sent = run.sent
    reference = run.accuracy(run.delivered())
    for thief in cells(settings):
        run.clients(thief)  # so that too many colluders are refused before anything is written
    (out / "thieves").mkdir(parents=True, exist_ok=True)
    thefts = {thief: _stored(run, thief, out) for thief in cells(settings)}
    missing = [thief for thief, theft in thefts.items() if theft is None]
    # Thieves who are the same clients, and so have the same map of their own, one after another.
    missing.sort(key=lambda thief: (thief.number, thief.colluders))
    before = len(thefts) - len(missing)
    with ProgressBars() as bars:
        bars.begin("thieves", before, len(thefts))
        stolen = in_processes(
            partial(_steal, settings),
            missing,
            workers=workers or usable_cores(),
            # The second is loaded by the first optimiser.
            loads=("sklearn.cluster", "torch._dynamo"),
        )
        for number, theft in enumerate(stolen, start=before + 1):
            _store(run, theft, out)
            thefts[theft.thief] = theft
            bars("thieves", number, len(thefts), str(theft.thief))
    done = tuple(theft for theft in thefts.values() if theft)
    report = TheftReport(settings, reference, done, sent)
    report.write(out)
    return report


def _steal(settings: TheftSettings, thief: Thief) -> Theft:
    run, thieves = _audited(settings.run, settings.seed)
    return steal_by_map(thieves, thief) if thieves else steal(run, thief)


@lru_cache(maxsize=1)
def _audited(path: Path, seed: int) -> tuple[AuditedRun, MapThieves | None]:
    run = AuditedRun(path, seed)
    features = run.feature_map
    return run, None if features is None else MapThieves(run, features)


def _path(out: Path, thief: Thief) -> Path:
    return out / "thieves" / f"{thief}.json"


def _store(run: AuditedRun, theft: Theft, out: Path) -> None:
    content = {"audited": run.identity, "theft": asdict(theft)}
    write_atomically(_path(out, theft.thief), json_bytes(content))


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


def _by_holdout(attempts: Sequence[Attempt]) -> Attempt:
    return max(attempts, key=lambda attempt: attempt.held_out)


def _by_name(arms: Sequence[Sequence[Attempt]]) -> dict[str, list[Attempt]]:
    """Return the attempts of each attack that every thief made."""
    names = [attempt.attack for attempt in arms[0]]
    tried = {name: [a for arm in arms for a in arm if a.attack == name] for name in names}
    return {name: found for name, found in tried.items() if len(found) == len(arms)}


def _mean(attempts: Sequence[Attempt]) -> float:
    return float(np.mean([attempt.accuracy for attempt in attempts]))


def _row(name: str, attempts: Sequence[Attempt], alone: Sequence[Attempt]) -> dict[str, Any]:
    accuracy = torch.tensor([a.accuracy for a in attempts], dtype=torch.float64)
    without = torch.tensor([a.accuracy for a in alone], dtype=torch.float64)
    measured = {"accuracy": accuracy, "alone": without, "advantage": accuracy - without}
    row: dict[str, Any] = {"attack": name}
    for column, values in measured.items():
        row |= _interval(column, bootstrap(values))
    return row | {
        "chosen": [attempt.attack for attempt in attempts],
        "chosen_alone": [attempt.attack for attempt in alone],
    }


def _interval(column: str, interval: Interval) -> dict[str, float]:
    return {
        column: interval.value,
        f"{column}_low": interval.low,
        f"{column}_high": interval.high,
    }


def points(row: Mapping[str, Any]) -> str:
    """Return a row's advantage with its interval, as text; of a single thief there is none."""
    if len(row["chosen"]) == 1:
        return f"{row['advantage']:+.1%} (one thief)"
    low, high = row["advantage_low"], row["advantage_high"]
    return f"{row['advantage']:+.1%} [{low:+.1%}, {high:+.1%}]"


_LINES: tuple[tuple[str, str, str, str], ...] = (
    ("direct", ORANGE, "s--", "the last copy as it came"),
    (THIEF, BLUE, "o-", THIEF),
    (OWNER, GREEN, "^-", OWNER),
)


def _draw(report: TheftReport) -> bytes:
    from matplotlib.figure import Figure

    settings = report.settings
    columns = len(settings.colluders)
    figure = Figure(figsize=(3.6 * columns + 0.6, 6.2), dpi=130, layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False, sharex=True, sharey="row")
    for column, colluders in enumerate(settings.colluders):
        upper, lower = grid[0][column], grid[1][column]
        upper.axhline(report.reference, color=BLACK, linewidth=1, label="w, kept by the server")
        alone = [report.row(THIEF, n, colluders) for n in settings.labels]
        _line(upper, settings.labels, alone, "alone", GREY, "d:", "training alone")
        for attack, color, style, label in _LINES:
            rows = [report.row(attack, n, colluders) for n in settings.labels]
            _line(upper, settings.labels, rows, "accuracy", color, style, label)
            if attack != "direct":
                _line(lower, settings.labels, rows, "advantage", color, style, label)
        lower.axhline(0, color=GREY, linewidth=0.8)
        many = "one thief" if colluders == 1 else f"{colluders} colluders"
        upper.set(title=many, ylim=(0, 1.02))
        lower.set(xlabel="labelled images")
        # Zero labels have a place of their own, to the left of the logarithm's first decade.
        lower.set_xscale("symlog", linthresh=10)
        lower.set_xticks(settings.labels, [str(n) for n in settings.labels])
        lower.minorticks_off()
        for axes in (upper, lower):
            axes.grid(alpha=0.2)
    grid[0][0].set_ylabel("accuracy on report images")
    grid[1][0].set_ylabel("theft advantage over training alone")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9)
    return png(figure)


def _line(
    axes: Any,
    labels: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    column: str,
    color: str,
    style: str,
    name: str,
) -> None:
    values = [row[column] for row in rows]
    axes.plot(labels, values, style, color=color, label=name, markersize=4)
    low, high = ([row[f"{column}_{end}"] for row in rows] for end in ("low", "high"))
    axes.fill_between(labels, low, high, color=color, alpha=0.15, linewidth=0)
