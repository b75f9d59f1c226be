"""The first paper's figure 3, made anew, beside what its setting leaves out.

Three parts, each in pieces that are kept as soon as they are finished:

* ``figure3.png``: the paper's own comparison (10 clients, one victim, LeNet, DLG by L-BFGS with 100
  iterations, 8×8 blocks), and beside it the attacker who knows the transformation, and a stronger
  attack.
* Leakage against ``keep``: the strongest attack, naive and adaptive, on many images.
* Accuracy against ``keep``: clients train on transformed images; the delivered model is measured on
  transformed and on plain test images. Whoever uses the model is no one's victim and knows the
  transformation, so they may apply it to their own images first: that accuracy is the price of the
  defence. On plain images the model meets frequencies it was never trained on; that accuracy is
  what is lost when its user is not told.

CIFAR-10 is often stored as JPEG, whose 8×8 blocks are quantised in this very transformation: such
images do for accuracy, never for measuring what the transformation removes. The leakage parts
therefore read another, lossless dataset.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from fedveil.attacks.inversion import build_attack
from fedveil.audit.metrics import psnr
from fedveil.audit.settings import LeakageSettings
from fedveil.audit.watch import ground_truth
from fedveil.data import load_dataset
from fedveil.defenses import parse_defense
from fedveil.errors import FedveilError
from fedveil.federation.server_app import prepare_job
from fedveil.pictures import BLACK, BLUE, GREEN, GREY, ORANGE, Column, draw_images
from fedveil.results import EXACT, IDENTIFIED, LABELS, TO_ORIGINAL, TO_TRAINED
from fedveil.runs.config import TrainConfig
from fedveil.studies.measured import audited, averaging, settings_of, spread, trained, with_interval
from fedveil.studies.settings import KEEPS, DctOptions
from fedveil.studies.study import Piece, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ALL = 64  # coefficients of a block; to keep them all is to do nothing
_NONE = "none"
_EXACT_OF_T = f"{EXACT.heading}, of T(x)"


@dataclass(frozen=True, kw_only=True)
class DctStudy(DctOptions):
    """What is measured.

    Attributes:
        attack: The attack of the sweep.
        figure_attacks: The attacks of figure 3, the published one first.
        clients: Clients, in leakage and in training.
        victim: Which of them is attacked.
        model: What is attacked.
        accuracy_model: What is trained.
        learning_rate: Of the local steps.

    Raises:
        FedveilError: Nothing to measure, or a ``keep`` or an attack that cannot be.
    """

    name: ClassVar[str] = "dct"
    attack: str = "lm"
    figure_attacks: tuple[str, ...] = ("dlg", "lm")
    clients: int = 10
    victim: int = 3
    model: str = "lenet"
    accuracy_model: str = "cnn"
    learning_rate: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for keep in (*self.keeps, self.figure_keep):
            parse_defense(_defense(keep))
        for attack in (self.attack, *self.figure_attacks):
            build_attack(attack)

    @property
    def command(self) -> str:
        """The command that runs this study."""
        keeps = "" if self.keeps == KEEPS else "".join(f" --keep {keep}" for keep in self.keeps)
        return (
            f"fedveil reproduce dct --out DIR --images {self.images} --seeds {self.seeds} "
            f"--dataset {self.dataset} --accuracy-dataset {self.accuracy_dataset}{keeps} "
            f"--figure-images {self.figure_images} --figure-keep {self.figure_keep} "
            f"--rounds {self.rounds} --epochs {self.epochs}"
        )

    @property
    def figure_audits(self) -> dict[str, LeakageSettings]:
        """Directory of each audit of figure 3 to what it audits."""
        return {
            f"figure3-{attack}-{_slug(defense)}": self._audit(attack, defense, self.figure_images)
            for attack in self.figure_attacks
            for defense in (_NONE, _defense(self.figure_keep))
        }

    @property
    def sweep_audits(self) -> dict[str, LeakageSettings]:
        """Directory of each audit of the sweep to what it audits, no defence first."""
        defenses = (_NONE, *map(_defense, self.keeps))
        return {
            f"{self.attack}-{_slug(defense)}": self._audit(self.attack, defense, self.images)
            for defense in defenses
        }

    def sweep_audit(self, defense: str) -> str:
        """Return the directory of the sweep's audit of one defence."""
        return f"{self.attack}-{_slug(defense)}"

    def training(self, defense: str, seed: int) -> TrainConfig:
        """Return the settings of one training run."""
        return averaging(
            dataset=self.accuracy_dataset,
            model=self.accuracy_model,
            defense=defense,
            clients=self.clients,
            rounds=self.rounds,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            seed=seed,
        )

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Directory of each training run to its settings."""
        # A transformation that removes nothing needs no runs of its own.
        defenses = (_NONE, *(_defense(keep) for keep in self.keeps if keep < _ALL))
        return {
            f"{_slug(defense)}-{seed}": self.training(defense, seed)
            for defense in defenses
            for seed in range(self.seeds)
        }

    def check(self) -> None:
        """Refuse what would fail hours later; nothing has been written yet."""
        data = load_dataset(self.dataset)
        for settings in (self.figure_audits | self.sweep_audits).values():
            ground_truth(data, settings)
        prepare_job(self.training(_NONE, 0))

    def pieces(self, out: Path) -> list[Piece]:
        """Return the audits, each with a directory in ``leakage``, and the training runs."""
        audits, leakage = self.figure_audits | self.sweep_audits, out / "leakage"
        return [
            *(
                Piece(name, audited, (self.dataset, self.model, settings, leakage / name))
                for name, settings in audits.items()
            ),
            *(Piece(name, trained, (run, out, name)) for name, run in self.trainings.items()),
        ]

    def result(self, found: Mapping[str, Any], out: Path) -> dict[str, Any]:
        """Return the settings, a row for each defence, and the rows of figure 3."""
        return {
            **settings_of(self),
            "rows": [_row(self, defense, found) for defense in (_NONE, *map(_defense, self.keeps))],
            "figure3": [row for name in self.figure_audits for row in found[name]],
        }

    def table(self, result: Mapping[str, Any]) -> str:
        """Return leakage and accuracy for each keep."""
        head = (
            *("keep", "ceiling, dB", "attacker", TO_ORIGINAL.heading, TO_TRAINED.heading),
            *(_EXACT_OF_T, IDENTIFIED.heading, LABELS.heading),
            *("accuracy on T(x)", "accuracy on x"),
        )
        lines = (
            _cells(row, kind, first=kind == "naive")
            for row in result["rows"]
            for kind in (("naive",) if row["defense"] == _NONE else ("naive", "adaptive"))
        )
        return markdown(head, lines)

    def figures(self, result: Mapping[str, Any], out: Path) -> dict[str, "Figure"]:
        """Draw the paper's figure 3, and what is leaked and learnt for each keep."""
        return {
            "figure3.png": _draw_figure3(self, out / "leakage"),
            "dct.png": _draw(result["rows"]),
        }

    def _audit(self, attack: str, defense: str, images: int) -> LeakageSettings:
        return LeakageSettings(
            clients=self.clients,
            victim=self.victim,
            images=images,
            attacks=(attack,),
            defenses=(defense,),
        )


def _defense(keep: int) -> str:
    return f"dct:keep={keep}"


def _slug(defense: str) -> str:
    return defense.removeprefix("dct:").replace("=", "-")


def _row(study: DctStudy, defense: str, found: Mapping[str, Any]) -> dict[str, Any]:
    leaks = found[study.sweep_audit(defense)]
    naive = next(row for row in leaks if not row["adaptive"])
    adaptive = next((row for row in leaks if row["adaptive"]), naive)
    keep = _ALL if defense == _NONE else int(defense.partition("=")[2])
    learnt = _NONE if keep == _ALL else defense
    runs = [found[f"{_slug(learnt)}-{seed}"] for seed in range(study.seeds)]
    return {
        "defense": defense,
        "keep": keep,
        "ceiling": naive["psnr_ceiling"],
        "ceiling_low": naive["psnr_ceiling_low"],
        "ceiling_high": naive["psnr_ceiling_high"],
        "naive": dict(naive),
        "adaptive": dict(adaptive),
        "trained_with": learnt,
        "accuracy_transformed": spread([run["transformed"] for run in runs]),
        "accuracy_plain": spread([run["plain"] for run in runs]),
    }


def _draw(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), dpi=130, layout="constrained")
    distance, given, learnt = figure.subplots(1, 3)
    swept = [row for row in rows if row["defense"] != _NONE]
    keeps = [row["keep"] for row in swept]
    _line(distance, swept, "naive", "psnr_original", ORANGE, "to x, naive attack", "s--")
    _line(distance, swept, "adaptive", "psnr_original", BLUE, "to x, attack knows T", "o-")
    # The ceiling of a transformation that removes nothing is endless.
    hiding = [row for row in swept if row["keep"] < _ALL]
    ceilings = [row["ceiling"] for row in hiding]
    distance.plot(
        [row["keep"] for row in hiding], ceilings, ":", color=BLACK, label="ceiling: T(x) itself"
    )
    _line(distance, swept, "adaptive", "psnr_trained", GREEN, "to T(x), attack knows T", "^:")
    distance.set(ylabel="PSNR, dB (median)", title="What the server rebuilds")
    told = IDENTIFIED.heading
    _line(given, swept, "naive", IDENTIFIED.key, ORANGE, f"{told}, naive", "s--")
    _line(given, swept, "adaptive", IDENTIFIED.key, BLUE, f"{told}, knows T", "o-")
    _line(given, swept, "adaptive", EXACT.key, GREEN, f"{_EXACT_OF_T}, knows T", "^:")
    given.set(ylabel="share of images", ylim=(-0.03, 1.03), title="What that gives away")
    for name, color, style, label in (
        ("accuracy_transformed", BLUE, "o-", "on transformed images"),
        ("accuracy_plain", ORANGE, "s--", "on plain images"),
    ):
        spread = [row[name] for row in swept]
        learnt.errorbar(
            keeps,
            [s["mean"] for s in spread],
            [s["sd"] for s in spread],
            fmt=style,
            color=color,
            capsize=3,
            label=label,
        )
    learnt.axhline(
        rows[0]["accuracy_plain"]["mean"], color=GREY, linestyle=":", label="without transformation"
    )
    learnt.set(ylabel="test accuracy (mean, sd over seeds)", title="What it costs")
    for axes in (distance, given, learnt):
        axes.set_xscale("log", base=2)
        axes.set_xticks(keeps, [str(keep) for keep in keeps])
        axes.set_xlabel("DCT coefficients kept of 64")
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8)
    return figure


def _line(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    kind: str,
    column: str,
    color: str,
    label: str,
    style: str,
) -> None:
    keeps = [row["keep"] for row in rows]
    # Hollow and larger, so that what lies beneath another line is seen around it.
    size, fill = (9, "none") if kind == "naive" else (5, color)
    values = [row[kind][column] for row in rows]
    axes.plot(keeps, values, style, color=color, label=label, markersize=size, mfc=fill)
    # One update tells no interval, and has no band.
    low, high = (
        [math.nan if (end := row[kind][f"{column}_{side}"]) is None else end for row in rows]
        for side in ("low", "high")
    )
    axes.fill_between(keeps, low, high, color=color, alpha=0.2, linewidth=0)


def _draw_figure3(study: DctStudy, folder: Path) -> "Figure":
    from matplotlib.figure import Figure

    columns = _figure3_columns(study, folder)
    count = study.figure_images
    figure = Figure(figsize=(1.5 * len(columns), 1.65 * count + 0.6), dpi=130, layout="constrained")
    draw_images(figure.subplots(count, len(columns), squeeze=False), columns, range(count), size=8)
    return figure


def _figure3_columns(study: DctStudy, folder: Path) -> list[Column]:
    """Return titles, images and their PSNR to the originals, which come first."""
    defense = _defense(study.figure_keep)
    columns: list[tuple[str, Tensor]] = []
    for attack in study.figure_attacks:
        plain = _arrays(folder / f"figure3-{attack}-{_NONE}")
        hidden = _arrays(folder / f"figure3-{attack}-{_slug(defense)}")
        if not columns:
            columns = [
                ("original", plain["originals"]),
                (f"transformed,\nkeep {study.figure_keep}", hidden[f"trained/{defense}"]),
            ]
        columns += [
            (f"{attack} on\noriginal", plain[f"images/{attack}/{_NONE}/naive"]),
            (f"{attack} on\ntransformed", hidden[f"images/{attack}/{defense}/naive"]),
            (f"{attack},\nknows T", hidden[f"images/{attack}/{defense}/adaptive"]),
        ]
    originals = columns[0][1]
    return [
        ("original", originals, None),
        *((title, images, psnr(images.clamp(0, 1), originals)) for title, images in columns[1:]),
    ]


def _arrays(folder: Path) -> dict[str, Tensor]:
    try:
        with np.load(folder / "reconstructions.npz") as stored:
            return {name: torch.from_numpy(stored[name]) for name in stored.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise FedveilError(
            f"{folder / 'reconstructions.npz'} is damaged ({error}); remove {folder} to attack anew"
        ) from None


def _cells(row: Mapping[str, Any], kind: str, *, first: bool) -> list[str]:
    scores = row[kind]
    # A ceiling where nothing is removed is the rounding of the transformation, no finding.
    endless = row["keep"] == _ALL
    keep = "none" if row["defense"] == _NONE else str(row["keep"])
    ceiling = "none" if endless else f"{row['ceiling']:.1f}"
    transformed, plain = row["accuracy_transformed"], row["accuracy_plain"]
    return [
        keep if first else "",
        ceiling if first else "",
        "knows T" if kind == "adaptive" else "naive",
        with_interval(scores, TO_ORIGINAL, ".1f"),
        with_interval(scores, TO_TRAINED, ".1f"),
        with_interval(scores, EXACT, ".0%"),
        with_interval(scores, IDENTIFIED, ".0%"),
        f"{scores['label_accuracy']:.0%}",
        f"{transformed['mean']:.1%} ± {transformed['sd']:.1%}" if first else "",
        f"{plain['mean']:.1%} ± {plain['sd']:.1%}" if first else "",
    ]
