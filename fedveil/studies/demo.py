"""Both directions at once, the two papers' protections, and what attacks leave of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.analytic import FRACTION_BITS, Statistics, load_classifier, quantised, ridge
from fedveil.audit.leakage import LeakageReport, Row, run_leakage_audit
from fedveil.audit.members import Members
from fedveil.audit.settings import LeakageSettings, SumsSettings, TheftSettings
from fedveil.audit.sums import Told, audit_sums
from fedveil.audit.theft import OWNER, run_theft_audit
from fedveil.features import features_of
from fedveil.federation.server_app import load_job
from fedveil.files import json_bytes, write_atomically
from fedveil.pictures import BLUE, GREY, ORANGE, Column, draw_images, png
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from fedveil.studies.measured import run_of

_Found = dict[str, float | None]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_SUMS = TrainConfig(dataset="digits", clients=20)
_COPIES = TrainConfig(
    strategy="noise-delta",
    dataset="digits",
    clients=10,
    fraction=0.5,
    rounds=40,
    epochs=2,
    learning_rate=0.1,
    clip=20.0,
)
_LABELS, _COLLUDERS, _THIEVES = 10, 2, 3
_LEAKAGE = LeakageSettings(
    images=8,
    victim=2,
    attacks=("lm",),
    defenses=("none", "dct:keep=3"),
)
_DRAWN = 3


@dataclass(frozen=True)
class _Kept:
    """What the owner has of a run, and what a thief makes of it.

    Attributes:
        owner: Accuracy of w.
        copy: Of the best model that any client received; of the sums, of a map without a head.
        thief: Of the best thief.
        alone: Of whoever has the same images and labels, and received nothing.
    """

    owner: float
    copy: float
    thief: float
    alone: float


def run_demo(out: Path) -> str:
    """Train by sums and by capped copies, attack both, and read images from updates; draw it.

    Writes ``sums/``, ``copies/``, ``theft/`` and ``leakage/`` as the commands they stand for do,
    ``demo.png`` and ``summary.json`` into ``out``. An interrupted demo goes on where it stopped.

    Args:
        out: Directory; made if need be.

    Returns:
        What happened, in a few sentences.

    Raises:
        FedveilError: ``out`` holds something that is not a demo.
    """
    sums, of_sums = run_of(_SUMS, out / "sums")
    copies, of_copies = run_of(_COPIES, out / "copies")
    kept = {
        "capped copies": _stolen(copies, of_copies, out / "theft"),
        "sums": _not_stolen(sums, of_sums),
    }
    found = _found_in_sums(sums)
    report = run_leakage_audit("photos", "lenet", _LEAKAGE, out=out / "leakage")
    write_atomically(out / "demo.png", _picture(kept, report, found))
    summary = {
        "training": {"sums": of_sums, "copies": of_copies},
        "kept": {name: vars(one) for name, one in kept.items()},
        "tpr_at_1": {name.replace("\n", " "): share for name, share in found.items()},
        "leakage": report.as_json(),
    }
    write_atomically(out / "summary.json", json_bytes(summary))
    return _sentences(kept, report, found, out)


def _stolen(run: RunDirectory, known: dict[str, Any], out: Path) -> _Kept:
    settings = TheftSettings(
        run=run.path, labels=(_LABELS,), colluders=(_COLLUDERS,), thieves=_THIEVES
    )
    worst = run_theft_audit(settings, out=out).row(OWNER, _LABELS, _COLLUDERS)
    return _Kept(known["accuracy"], known["copies_max"], worst["accuracy"], worst["alone"])


def _not_stolen(directory: RunDirectory, known: dict[str, Any]) -> _Kept:
    """Let thieves learn from the map, which is all they got, as they would without the run."""
    job = load_job(directory.config)
    features = load_classifier(directory.model()).features
    report = job.evaluation.report
    asked = quantised(features_of(features, report.raw)).double() * 2.0**-FRACTION_BITS
    shares = Members.of(directory.config, job.dataset.train).shares
    found = []
    for share in shares[:_THIEVES]:
        own = job.dataset.train[share[:_LABELS]]
        rows = quantised(features_of(features, own.raw))
        head = ridge(Statistics.of(rows, own.labels, classes=len(job.dataset.classes)))
        named = (asked @ head.weight.T + head.bias).argmax(1)
        found.append(float((named == report.labels).double().mean()))
    alone = sum(found) / len(found)
    return _Kept(known["accuracy"], known["copies_max"], alone, alone)


def _found_in_sums(directory: RunDirectory) -> _Found:
    """Return which share of images is found in sums where 1 % of strangers are."""
    report = audit_sums(directory.path, SumsSettings(rebuilt=0), out=None)
    of_all, of_one = ([row for row in report.rows if row.seen == seen] for seen in (True, False))
    assert report.forecast is not None  # there is no noise
    return {
        "one client's\nsums": _most_found(of_one),
        "the sums of\nall clients": _most_found(of_all),
        "the same, by many\npublic images": report.forecast["tpr_at_1"],
    }


def _most_found(rows: list[Told]) -> float | None:
    shares = [row.roc.found[0] for row in rows]
    return max((share.value for share in shares if share is not None), default=None)


def _sentences(kept: dict[str, _Kept], report: LeakageReport, found: _Found, out: Path) -> str:
    plain, _, adaptive = report.rows
    shown = _most_detailed(report)
    copies, sums = kept["capped copies"], kept["sums"]
    one, everybody, traced = (_found(share) for share in found.values())
    return (
        f"Copies below a cap: w is right on {copies.owner:.0%}, no copy on more than "
        f"{copies.copy:.0%}; {_COLLUDERS} clients with {_LABELS} labels make "
        f"{copies.thief:.0%} of theirs, and {copies.alone:.0%} without them.\n"
        f"Sums: w is right on {sums.owner:.0%}; clients received nothing that was learnt, and "
        f"whoever has {_LABELS} labels gets to {sums.alone:.0%} with or without it.\n"
        f"From an unprotected update the server rebuilt {plain.summary()['exact']:.0%} of the "
        f"images exactly; under {adaptive.defense} those shown came back at "
        f"{_decibels(adaptive, shown)} dB: the transformed images themselves, exactly.\n"
        f"Of the images in one client's sums {one} were found where 1 % of strangers are; in "
        f"the sums of all clients, which is what the server learns, {everybody}. Whoever has as "
        f"many public images is to be expected to find {traced}; noise (--epsilon) prevents it.\n"
        f"{out / 'demo.png'}  {out / 'summary.json'}"
    )


def _most_detailed(report: LeakageReport) -> list[int]:
    """Return which images are drawn: sky and shadow show nothing. The scores are of all."""
    return report.originals.std(dim=(1, 2, 3)).argsort(descending=True)[:_DRAWN].tolist()


def _decibels(row: Row, shown: list[int]) -> str:
    values = sorted(float(row.scores["psnr_original"][index]) for index in shown)
    return f"{values[0]:.0f} to {values[-1]:.0f}"


def _found(share: float | None) -> str:
    return "nobody can tell how many" if share is None else f"{share:.0%}"


def _picture(kept: dict[str, _Kept], report: LeakageReport, found: _Found) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), dpi=120, layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(4, 6, 4), squeeze=False)[0]
    _draw_kept(left.subplots(), kept)
    _draw_images(middle, report)
    _draw_found_in_sums(right.subplots(), found)
    return png(figure)


def _draw_kept(axes: "Axes", kept: dict[str, _Kept]) -> None:
    bars = {
        "owner's model": ([one.owner for one in kept.values()], BLUE),
        f"thief: {_COLLUDERS} clients, {_LABELS} labels": (
            [one.thief for one in kept.values()],
            ORANGE,
        ),
        "the same labels alone": ([one.alone for one in kept.values()], GREY),
    }
    width = 0.8 / len(bars)
    for place, (label, (heights, color)) in enumerate(bars.items()):
        drawn = axes.bar(
            [x + (place - 1) * width for x in range(len(kept))],
            heights,
            width,
            label=label,
            color=color,
        )
        axes.bar_label(drawn, [f"{height:.0%}" for height in heights], fontsize=8)
    axes.set_xticks(range(len(kept)), list(kept))
    axes.set(ylim=(0, 1.35), yticks=(0, 0.5, 1), ylabel="accuracy")
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    axes.set_title("What the owner keeps, and a thief gets", fontsize=11)


def _draw_images(figure: "SubFigure", report: LeakageReport) -> None:
    figure.suptitle("What the server reads from one update", fontsize=11)
    columns = _columns(report)
    grid = figure.subplots(_DRAWN, len(columns))
    draw_images(grid, columns, _most_detailed(report), size=8)


def _draw_found_in_sums(axes: "Axes", found: _Found) -> None:
    heights = [share or 0.0 for share in found.values()]
    drawn = axes.bar(list(found), heights, 0.5, color=ORANGE)
    texts = ["cannot tell" if share is None else f"{share:.0%}" for share in found.values()]
    axes.bar_label(drawn, texts, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.axhline(0.01, color=GREY, linestyle=":")
    axes.set(ylim=(0, 1.15), yticks=(0, 0.5, 1))
    axes.set_title("Images found in sums\n(1 % of strangers are)", fontsize=11)


def _columns(report: LeakageReport) -> list[Column]:
    plain, naive, adaptive = report.rows
    return [
        ("client's image", report.originals, None),
        ("read from an\nunprotected update", plain.reconstructions, plain.scores["psnr_original"]),
        ("block-DCT,\nattacker unaware", naive.reconstructions, naive.scores["psnr_original"]),
        ("block-DCT,\nattacker aware", adaptive.reconstructions, adaptive.scores["psnr_original"]),
    ]
