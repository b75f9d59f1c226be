"""Every protection's price in accuracy against what clients can still steal."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedveil.audit.settings import TheftSettings
from fedveil.audit.theft import OWNER, THIEF, TheftReport, points, run_theft_audit
from fedveil.pictures import BLUE, GREEN, GREY, ORANGE
from fedveil.studies.comparison import Arm, ArmRun, Comparison, check_known, finals
from fedveil.studies.noise import PAPER
from fedveil.studies.settings import TheftOptions
from fedveil.studies.study import Piece, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NEAR = 0.05  # of a figure's height, which a name takes
_USUAL = TheftOptions()
_Found = tuple[ArmRun, TheftReport | None]


@dataclass(frozen=True, kw_only=True)
class TheftStudy:
    """What is trained and audited.

    Attributes:
        trainings: A comparison of arms for each dataset; the first arm of each partition is its
            baseline. A run each arm and seed, audited by ``thieves`` thieves.
        labels: As of ``TheftSettings``.
        colluders: As of ``TheftSettings``.
        thieves: Thieves of each run; seeds and thieves together are the samples of an interval.
        workers: Worker processes of an audit; one a core by default.
        command: The command that runs this study.
    """

    name: ClassVar[str] = "theft-study"
    trainings: tuple[Comparison, ...]
    labels: tuple[int, ...] = (10, 50, 100, 600)
    colluders: tuple[int, ...] = _USUAL.colluders
    thieves: int = _USUAL.thieves
    workers: int | None = None
    command: str = "fedveil reproduce theft --out DIR"

    @property
    def runs(self) -> tuple[tuple[Comparison, Arm, int], ...]:
        """Every run of the study."""
        return tuple((t, arm, seed) for t in self.trainings for arm in t.arms for seed in t.seeds)

    def check(self) -> None:
        """Refuse settings of an arm that could not be trained; nothing has been written yet."""
        self._audit(Path())
        for training in self.trainings:
            training.check()

    def pieces(self, out: Path) -> list[Piece]:
        """Return every run of every arm, each with its audit."""
        return [
            Piece(training.run_name(arm, seed), self.run, (training, arm, seed, out))
            for training, arm, seed in self.runs
        ]

    def run(self, training: Comparison, arm: Arm, seed: int, out: Path) -> _Found:
        """Train one arm with one seed and audit it; audits are kept under ``out/audits``."""
        run = training.run(arm, seed, out)
        if _unaudited(arm.settings):
            return run, None
        settings = self._audit(out / "runs" / run.name)
        audits = out / "audits" / run.name
        return run, run_theft_audit(settings, out=audits, workers=self.workers)

    def _audit(self, run: Path) -> TheftSettings:
        labels, colluders = self.labels, self.colluders
        return TheftSettings(run=run, labels=labels, colluders=colluders, thieves=self.thieves)

    def result(self, found: Mapping[str, _Found], out: Path) -> dict[str, Any]:
        """Return the settings, and a row for each arm with its seeds' audits pooled."""
        return {
            "settings": {
                "labels": list(self.labels),
                "colluders": list(self.colluders),
                "thieves": self.thieves,
                "trainings": [
                    {"common": dict(t.common), "seeds": list(t.seeds)} for t in self.trainings
                ],
            },
            "rows": [
                _row(training, arm, [found[training.run_name(arm, s)] for s in training.seeds])
                for training in self.trainings
                for arm in training.arms
            ],
        }

    def table(self, result: Mapping[str, Any]) -> str:
        """Return two tables: the frontier, and the whole audit of every arm."""
        head = ("dataset", "partition", "protection", "final accuracy of w")
        audit = (
            *("dataset", "partition", "protection", "colluders", "labels", "alone", "direct"),
            *("thief's choice", "advantage", "owner's view", "advantage", "attack"),
        )
        audits = (
            _audit_cells(row, labels, colluders)
            for row in result["rows"]
            if row["theft"]
            for colluders in result["settings"]["colluders"]
            for labels in result["settings"]["labels"]
        )
        frontier = markdown((*head, *(case.title for case in _CASES)), map(_cells, result["rows"]))
        return (
            f"Worst theft advantage, by the owner's view:\n\n{frontier}\n"
            f"The whole audit:\n\n{markdown(audit, audits)}"
        )

    def figures(self, result: Mapping[str, Any], out: Path) -> dict[str, "Figure"]:
        """Draw final accuracy against theft advantage."""
        return {"theft-study.png": _draw(result["rows"])}


_COMMON = {
    "model": "cnn",
    "clients": 100,
    "fraction": 0.1,
    "cap": 0.6,
    "rounds": 20,
    "deliver": "last",
}
# What a client that trains alone needs to come far; the baseline trains alike.
_LONG = {
    "batch_size": 20,
    "learning_rate": 0.1,
    "decay": True,
    "momentum": 0.9,
    "clip": 1.0,
}
# w is the same to the bit under secure aggregation, which hides sums from the server alone.
_SUMS = {"strategy": "analytic", "rounds": 1, "fraction": 1.0, "secure_aggregation": False}
_PROTECTED = {"strategy": "protected", "distillation_steps": 120}


def _arms(
    iid_rate: float, shards_rate: float, *, augment: str, label_share: float
) -> tuple[Arm, ...]:
    iid = {"learning_rate": iid_rate, "clip": 20.0}
    shards = {"learning_rate": shards_rate, "clip": 20.0}
    long = {**_LONG, "epochs": 30, "augment": augment}
    # A client of two classes needs fewer steps, and has two images in each of them.
    short = {**long, "epochs": 5}
    taught = {**_PROTECTED, "label_share": label_share}
    unlabelled = Arm("protected, no labels", "iid", {**long, **_PROTECTED})
    bias = {"noise": "output.bias", "temperature": 1.0, "smoothing": 0.8, "sigma_limit": 1e6}
    return (
        Arm("fedavg", "iid", {**iid, "strategy": "fedavg"}),
        Arm("fedavg, trained alike", "iid", {**long, "strategy": "fedavg"}),
        # What the server's labelled images are worth without any client: its training is ignored.
        Arm("server alone", "iid", {**long, "epochs": 1, **_PROTECTED, "label_share": 1.0}),
        Arm("protected", "iid", {**long, **taught}),
        *([unlabelled] if label_share else []),
        Arm("protected, 3 shared rounds", "iid", {**long, **taught, "shared_rounds": 3}),
        Arm("analytic", "iid", _SUMS),
        Arm("noise-delta", "iid", {**iid, "strategy": "noise-delta"}),
        Arm("fedavg", "shards:2", {**shards, "strategy": "fedavg"}),
        Arm("fedavg, trained alike", "shards:2", {**short, "strategy": "fedavg"}),
        Arm("protected", "shards:2", {**short, **taught, "share_unlabelled": True}),
        Arm("noise-delta", "shards:2", {**shards, **bias, "strategy": "noise-delta"}),
        Arm("noise-pair", "iid", PAPER),
        Arm("noise-pair", "shards:2", PAPER),
    )


# The rates of fedavg and of the noise arms are those of the noise study; those of protected were
# chosen on mnist@1+6/12, which shares no image with the folds reported here, and on cifar10@1/6,
# which is training images. Images of MNIST alternate between two sources of writers, so one fold
# of each is joined.
THEFT = TheftStudy(
    trainings=(
        Comparison(
            common={**_COMMON, "dataset": "mnist@4+5/12"},
            arms=_arms(0.2, 0.05, augment="crop:2,rotate:15,zoom:0.15,shear:0.15", label_share=0.0),
            prefix="mnist ",
        ),
        Comparison(
            common={**_COMMON, "dataset": "cifar10"},
            arms=_arms(0.1, 0.05, augment="crop:4,flip", label_share=0.9),
            prefix="cifar10 ",
        ),
    )
)


def select(study: TheftStudy, wanted: TheftOptions) -> TheftStudy:
    """Return a part of a study, or with other rounds, seeds or thieves.

    Args:
        study: The whole.
        wanted: What is kept of it, beside ``fedavg``, and what is other.

    Raises:
        FedveilError: The study has no such dataset, partition or protection.
    """
    known = tuple(training.common["dataset"] for training in study.trainings)
    shares = tuple(dict.fromkeys(arm.partition for t in study.trainings for arm in t.arms))
    check_known("--dataset", wanted.datasets, known)
    check_known("--partition", wanted.partitions, shares)
    changed = {} if wanted.rounds is None else {"rounds": wanted.rounds}
    kept = (t for t in study.trainings if t.common["dataset"] in (wanted.datasets or known))
    return replace(
        study,
        trainings=tuple(
            replace(
                training.of(wanted.arms).on(wanted.partitions or shares),
                common={**training.common, **changed},
                seeds=tuple(range(wanted.seeds)),
            )
            for training in kept
        ),
        thieves=wanted.thieves,
        colluders=wanted.colluders,
        labels=wanted.labels,
        workers=wanted.workers,
        command=_command(
            study.command,
            ("dataset", wanted.datasets),
            ("partition", wanted.partitions),
            ("arm", wanted.arms),
            ("rounds", tuple(changed.values())),
            ("seeds", (wanted.seeds,)),
            ("thieves", (wanted.thieves,)),
            ("colluders", () if wanted.colluders == study.colluders else wanted.colluders),
            ("labels", () if wanted.labels == study.labels else wanted.labels),
        ),
    )


def _command(start: str, *options: tuple[str, Sequence[object]]) -> str:
    words = (f"--{name} {shlex.quote(str(value))}" for name, values in options for value in values)
    return " ".join((start, *words))


def _unaudited(settings: Mapping[str, Any]) -> str | None:
    """Return why there is nothing to audit, in the table's words; None where there is."""
    if settings["strategy"] == "fedavg":
        return "sent w itself"
    return "learnt from no client" if settings.get("label_share") == 1.0 else None


def _row(training: Comparison, arm: Arm, found: Sequence[_Found]) -> dict[str, Any]:
    audits = [audit for _, audit in found if audit is not None]
    return {
        "dataset": training.common["dataset"],
        "partition": arm.partition,
        "arm": arm.name,
        "settings": dict(arm.settings),
        **finals([run for run, _ in found]),
        "theft": _pooled(audits).rows() if audits else [],
    }


def _pooled(audits: Sequence[TheftReport]) -> TheftReport:
    return TheftReport(
        settings=audits[0].settings,
        reference=float(np.mean([audit.reference for audit in audits])),
        thefts=tuple(theft for audit in audits for theft in audit.thefts),
    )


@dataclass(frozen=True)
class _Case:
    """A column of the table and a colour of the figure: the worst advantage of some audits."""

    title: str
    colluders: int
    least: int
    most: int
    color: str
    marker: str


_CASES = (
    _Case("one thief, up to 49 labels", 1, 0, 49, ORANGE, "s"),
    _Case("one thief, 50 labels and more", 1, 50, 10**9, BLUE, "o"),
    _Case("two colluders, 50 labels and more", 2, 50, 10**9, GREEN, "^"),
)


def _worst(row: Mapping[str, Any], case: _Case) -> Mapping[str, Any] | None:
    """Return the greatest advantage of a case by the owner's view; None where none was audited."""
    found = [
        theft
        for theft in row["theft"]
        if theft["attack"] == OWNER
        and theft["colluders"] == case.colluders
        and case.least <= theft["labels"] <= case.most
    ]
    return max(found, key=lambda theft: theft["advantage"], default=None)


def _draw(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["dataset"], row["partition"]) for row in rows))
    figure = Figure(figsize=(4.4 * len(panels) + 0.6, 4.4), dpi=130, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (dataset, partition) in zip(grid, panels, strict=True):
        here = [row for row in rows if (row["dataset"], row["partition"]) == (dataset, partition)]
        axes.axvline(0, color=GREY, linewidth=0.8)
        for case in _CASES:
            _draw_case(axes, here, case)
        _name_rows(axes, here)
        axes.set(title=f"{dataset}, {partition}", xlabel="theft advantage, the owner's view")
        axes.grid(alpha=0.2)
    grid[0].set_ylabel("final accuracy of w")
    handles, names = grid[0].get_legend_handles_labels()
    columns = 3 if len(panels) > 1 else 1
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9)
    return figure


def _name_rows(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Mark each arm's accuracy by a line, with its name above it or below the name before."""
    bottom, top = axes.get_ylim()
    place = float("inf")
    for row in sorted(rows, key=lambda row: row["final_mean"], reverse=True):
        accuracy = row["final_mean"]
        place = min(accuracy, place - (top - bottom) * _NEAR)
        axes.annotate(
            row["arm"],
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
        )
        axes.axhline(accuracy, color=GREY, linewidth=0.5, linestyle=":")


def _draw_case(axes: Any, rows: Sequence[Mapping[str, Any]], case: _Case) -> None:
    found = [(row, worst) for row in rows if (worst := _worst(row, case))]
    if not found:
        return
    advantages = [worst["advantage"] for _, worst in found]
    ends = [
        [worst["advantage"] - worst["advantage_low"] for _, worst in found],
        [worst["advantage_high"] - worst["advantage"] for _, worst in found],
    ]
    axes.errorbar(
        advantages,
        [row["final_mean"] for row, _ in found],
        yerr=[row["final_sd"] for row, _ in found],
        xerr=np.maximum(ends, 0),
        fmt=case.marker,
        color=case.color,
        markersize=5,
        capsize=2,
        label=case.title,
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["dataset"],
        row["partition"],
        row["arm"],
        f"{row['final_mean']:.1%} ± {row['final_sd']:.1%}",
        *(_advantage(row, case) for case in _CASES),
    ]


def _audit_cells(row: Mapping[str, Any], labels: int, colluders: int) -> list[str]:
    direct, thief, owner = (
        next(
            theft
            for theft in row["theft"]
            if (theft["attack"], theft["labels"], theft["colluders"]) == (name, labels, colluders)
        )
        for name in ("direct", THIEF, OWNER)
    )
    return [
        row["dataset"],
        row["partition"],
        row["arm"],
        str(colluders),
        str(labels),
        f"{thief['alone']:.1%}",
        f"{direct['accuracy']:.1%}",
        f"{thief['accuracy']:.1%}",
        points(thief),
        f"{owner['accuracy']:.1%}",
        points(owner),
        owner["chosen"][0],
    ]


def _advantage(row: Mapping[str, Any], case: _Case) -> str:
    worst = _worst(row, case)
    return points(worst) if worst else _unaudited(row["settings"]) or "not audited"
