"""Both protections and the attack on them, on data that comes with the package."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedveil.audit.leakage import LeakageReport, LeakageSettings, run_leakage_audit
from fedveil.errors import FedveilError
from fedveil.federation.training_run import run_to_completion
from fedveil.files import write_atomically
from fedveil.runs.config import TrainConfig
from fedveil.runs.curves import draw_curves_on
from fedveil.runs.directory import RoundRecord, RunDirectory

_TRAINING = TrainConfig(
    strategy="noise-delta",
    dataset="digits",
    clients=10,
    fraction=0.5,
    rounds=40,
    epochs=2,
    learning_rate=0.1,
    clip=20.0,
    defense="dct:keep=21",
)
_LEAKAGE = LeakageSettings(
    images=8,
    victim=2,
    attacks=("lm",),
    defenses=("none", "dct:keep=3"),
)
_DRAWN = 3


def run_demo(out: Path) -> str:
    """Train under the accuracy cap, then reconstruct images from updates; draw both.

    Writes ``training/`` and ``leakage/`` as the commands they stand for do, ``demo.png`` and
    ``summary.json`` into ``out``. An interrupted demo goes on where it stopped.

    Args:
        out: Directory; made if need be.

    Returns:
        What happened, in a few sentences.

    Raises:
        FedveilError: ``out`` holds something that is not a demo.
    """
    run = out / "training"
    directory = RunDirectory.open(run) if run.is_dir() else RunDirectory.create(run, _TRAINING)
    if directory.config != _TRAINING:
        raise FedveilError(f"{run} is of another demo; remove it, or name another --out")
    training = run_to_completion(directory)
    report = run_leakage_audit("photos", "lenet", _LEAKAGE, out=out / "leakage")
    write_atomically(out / "demo.png", _picture(directory.rounds(), report))
    summary = {"training": training, "leakage": report.as_json()}
    write_atomically(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return _sentences(training, report, out)


def _sentences(training: dict[str, Any], report: LeakageReport, out: Path) -> str:
    plain, naive, adaptive = (row.summary() for row in report.rows)
    return (
        f"The model was trained to {training['accuracy']:.0%}, while no copy that left the server "
        f"was better than {training['copies_max']:.0%}.\n"
        f"From an unprotected update the server rebuilt {plain['exact']:.0%} of the images exactly "
        f"({plain['psnr_original']:.0f} dB).\n"
        f"Under {report.rows[-1].defense} it came within {adaptive['psnr_original']:.0f} dB of the "
        f"originals knowing the transformation, {naive['psnr_original']:.0f} dB not knowing it.\n"
        "What it rebuilt then is the transformed image itself, exactly: the transformation hides "
        "what it removes, and nothing else.\n"
        f"{out / 'demo.png'}  {out / 'summary.json'}"
    )


def _picture(rounds: Sequence[RoundRecord], report: LeakageReport) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), dpi=120, layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    axes = left.subplots()
    draw_curves_on(axes, rounds, cap=_TRAINING.cap)
    axes.set_title("What the owner keeps, and what clients receive", fontsize=11)
    right.suptitle("What the server reads from one update", fontsize=11)
    columns = _columns(report)
    grid = right.subplots(_DRAWN, len(columns))
    # Sky and shadow show nothing, so those with the most detail are drawn; the scores are of all.
    drawn = report.originals.std(dim=(1, 2, 3)).argsort(descending=True)[:_DRAWN].tolist()
    for column, (title, images, scores) in enumerate(columns):
        grid[0, column].set_title(title, fontsize=8)
        for row, index in enumerate(drawn):
            axis = grid[row, column]
            pixels = images[index].clamp(0, 1).permute(1, 2, 0)
            axis.imshow(pixels.numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if scores is not None:
                axis.set_xlabel(f"{scores[index]:.0f} dB", fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _columns(report: LeakageReport) -> list[tuple[str, Tensor, Tensor | None]]:
    plain, naive, adaptive = report.rows
    return [
        ("client's image", report.originals, None),
        ("read from an\nunprotected update", plain.reconstructions, plain.scores["psnr_original"]),
        ("block-DCT,\nattacker unaware", naive.reconstructions, naive.scores["psnr_original"]),
        ("block-DCT,\nattacker aware", adaptive.reconstructions, adaptive.scores["psnr_original"]),
    ]
