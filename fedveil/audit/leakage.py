"""``fedveil audit leakage``: attack what a server really received, and score it."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.attacks.inversion import Inversion, Observation, build_attack
from fedveil.audit.metrics import (
    bootstrap,
    exact,
    identified,
    label_accuracy,
    median,
    psnr,
    ssim,
)
from fedveil.audit.observe import observe_clients
from fedveil.data import Dataset, Images
from fedveil.defenses import Defense, parse_defense
from fedveil.errors import FedveilError

CANDIDATES = 100
"""Originals among which a reconstruction must find its own, or as many as there are."""

_DRAWN = 16


class Observe(Protocol):
    """Lets the victim train, and returns what its server has; ``observe_clients`` is one."""

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[Images],
        *,
        classes: int,
        transform: nn.Module | None = None,
    ) -> Observation:
        """Return the observation of one round for each batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class LeakageSettings:
    """What is audited.

    Attributes:
        dataset: Name for the report.
        model: Name for the report.
        clients: Clients among whom the training images are divided at random.
        victim: Which of them is observed.
        images: Its images, one a round.
        attacks: Names from ``fedveil.attacks.inversion.ATTACKS``.
        defenses: As ``fedveil.defenses.parse_defense`` reads them.
        seed: Seeds the division and the choice.

    Raises:
        FedveilError: No images, attacks or defences, or a victim that is none of the clients.
    """

    dataset: str
    model: str
    clients: int = 10
    victim: int = 0
    images: int = 16
    attacks: tuple[str, ...] = ("dlg", "lm")
    defenses: tuple[str, ...] = ("none",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 1:
            raise FedveilError(f"--images {self.images} is out of range: give at least 1")
        if not 0 <= self.victim < self.clients:
            raise FedveilError(
                f"--victim {self.victim} is no client: there are {self.clients}, "
                f"so give 0 to {self.clients - 1}"
            )
        if not self.attacks or not self.defenses:
            raise FedveilError("name at least one --attack and one --defense")


@dataclass(frozen=True)
class Row:
    """One attack on one defence by one kind of attacker, scored image by image.

    Attributes:
        attack: Its name.
        defense: As written.
        adaptive: Whether the attacker knows the defence.
        reconstructions: [V, C, H, W].
        loss: Float64 [V], the attacker's own.
        scores: Column name to [V].
    """

    attack: str
    defense: str
    adaptive: bool
    reconstructions: Tensor
    loss: Tensor
    scores: dict[str, Tensor]

    def summary(self) -> dict[str, Any]:
        """Return the row of ``leakage.json``: means of shares, medians of the rest."""
        row: dict[str, Any] = {
            "attack": self.attack,
            "defense": self.defense,
            "adaptive": self.adaptive,
            "images": len(self.reconstructions),
        }
        for name, values in self.scores.items():
            interval = bootstrap(values, statistic=None if name in _SHARES else median)
            row[name] = interval.value
            row[f"{name}_low"], row[f"{name}_high"] = interval.low, interval.high
        return row


_SHARES = {"exact", "identified", "label_accuracy"}


@dataclass(frozen=True)
class LeakageReport:
    """The result of an audit.

    Attributes:
        settings: What was audited.
        originals: [V, C, H, W], the victim's images.
        trained: Defence to [V, C, H, W], what the victim trained on under it.
        rows: One for each attack, defence and kind of attacker.
    """

    settings: LeakageSettings
    originals: Tensor
    trained: dict[str, Tensor]
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``leakage.json``."""
        return {
            "settings": asdict(self.settings),
            "rows": [row.summary() for row in self.rows],
        }

    def write(self, out: Path) -> None:
        """Write leakage.json, reconstructions.npz and reconstructions.png into ``out``.

        Each file appears whole or not at all.
        """
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "reconstructions.npz", lambda path: _save_arrays(self, path))
        _write(out / "reconstructions.png", lambda path: _draw(self, path))
        text = json.dumps(self.as_json(), indent=2) + "\n"
        _write(out / "leakage.json", lambda path: path.write_text(text))


Progress = Callable[[str, int, int, float], None]


def audit_leakage(
    dataset: Dataset,
    model: nn.Module,
    settings: LeakageSettings,
    *,
    observe: Observe = observe_clients,
    out: Path | None = None,
    progress: Progress | None = None,
) -> LeakageReport:
    """Attack the updates of one victim and score what comes out.

    The attacks receive observations only; originals and labels stay in this function and its
    helpers, for scoring. Under every defence each attack runs twice: as the naive attacker, who
    does not know it, and as the adaptive one, who does.

    Args:
        dataset: Its training images are divided among the clients.
        model: What the server sends, in the mode the client trains in.
        settings: What is audited.
        observe: Lets the victim train and returns what its server has.
        out: Folder for the results; None writes nothing.
        progress: Called as ``progress(step, images done, images, loss)``.

    Raises:
        FedveilError: Fewer images than asked for, or what an attack refuses.
    """
    defenses = [parse_defense(text) for text in settings.defenses]
    attacks = {name: build_attack(name) for name in settings.attacks}
    victims, candidates = _choose(dataset, settings)
    batches = [victims[slice(index, index + 1)] for index in range(len(victims))]
    originals = victims.pixels
    trained: dict[str, Tensor] = {}
    rows = []
    for defense in defenses:
        transform = defense.transform
        with torch.no_grad():
            trained[defense.label] = originals if transform is None else transform(originals)
        informed = observe(model, batches, classes=len(dataset.classes), transform=transform)
        for name, attack in attacks.items():
            for adaptive in (False,) if transform is None else (False, True):
                seen = informed if adaptive else replace(informed, knows=None)
                step = f"{name} on {defense.label}{' (adaptive)' if adaptive else ''}"
                result = attack(seen, progress=_named(progress, step))
                scored = _score(result, victims, trained[defense.label], candidates)
                rows.append(_row(name, defense, adaptive, result, scored))
    report = LeakageReport(settings, originals, trained, tuple(rows))
    if out is not None:
        report.write(out)
    return report


def _choose(dataset: Dataset, settings: LeakageSettings) -> tuple[Images, Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(dataset.train), generator=generator)
    own = order.tensor_split(settings.clients)[settings.victim]
    if len(own) < settings.images:
        raise FedveilError(
            f"--images {settings.images} is too many: client {settings.victim} of "
            f"{settings.clients} has {len(own)} images; ask for fewer, or for fewer clients"
        )
    chosen = own[: settings.images]
    others = order[~torch.isin(order, chosen)][: max(0, CANDIDATES - len(chosen))]
    return dataset.train[chosen], dataset.train[torch.cat([chosen, others])].pixels


def _score(
    result: Inversion, victims: Images, trained: Tensor, candidates: Tensor
) -> dict[str, Tensor]:
    # Everybody knows the range of pixels; transformed ones may lie a little outside it.
    images = result.images[:, 0].float()
    clipped = images.clamp(0, 1)
    originals = victims.pixels
    own = torch.arange(len(victims))
    as_trained = clipped if torch.equal(trained, originals) else images
    return {
        "exact": exact(as_trained, trained).double(),
        "identified": identified(images, candidates, own).double(),
        "label_accuracy": label_accuracy(result.labels, victims.labels[:, None]),
        "psnr_original": psnr(clipped, originals),
        "psnr_trained": psnr(as_trained, trained),
        "ssim_original": ssim(clipped, originals),
        "psnr_ceiling": psnr(trained.clamp(0, 1), originals),
        "seconds_per_image": result.seconds.double(),
    }


def _row(
    attack: str, defense: Defense, adaptive: bool, result: Inversion, scores: dict[str, Tensor]
) -> Row:
    images = result.images[:, 0].float()
    return Row(attack, defense.label, adaptive, images, result.loss, scores)


def _named(progress: Progress | None, step: str) -> Callable[[int, int, float], None] | None:
    if progress is None:
        return None
    return lambda done, total, loss: progress(step, done, total, loss)


def _write(path: Path, produce: Callable[[Path], object]) -> None:
    # Same folder, so that the rename is atomic; same suffix, since writers look at it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    scratch = Path(name)
    try:
        produce(scratch)
        scratch.chmod(0o644)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _save_arrays(report: LeakageReport, path: Path) -> None:
    arrays: dict[str, Any] = {"originals": report.originals.numpy()}
    for label, images in report.trained.items():
        arrays[f"trained/{label}"] = images.numpy()
    for row in report.rows:
        key = f"{row.attack}/{row.defense}/{'adaptive' if row.adaptive else 'naive'}"
        arrays[f"images/{key}"] = row.reconstructions.numpy()
        arrays[f"loss/{key}"] = row.loss.numpy()
    np.savez_compressed(path, **arrays)


def _draw(report: LeakageReport, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _columns(report)
    count = min(len(report.originals), _DRAWN)
    figure = Figure(figsize=(1.5 * len(columns), 1.6 * count + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, len(columns), squeeze=False)
    for place, (title, images, scores) in enumerate(columns):
        axes[0][place].set_title(title, fontsize=7)
        for index in range(count):
            axis = axes[index][place]
            pixels = images[index].clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if scores is not None:
                axis.set_xlabel(f"{scores[index]:.1f} dB", fontsize=6)
    figure.savefig(path, dpi=150)


def _columns(report: LeakageReport) -> list[tuple[str, Tensor, Tensor | None]]:
    columns: list[tuple[str, Tensor, Tensor | None]] = [("original", report.originals, None)]
    for label, images in report.trained.items():
        if not torch.equal(images, report.originals):
            scores = psnr(images.clamp(0, 1), report.originals)
            columns.append((f"trained on\n{label}", images, scores))
        for row in report.rows:
            if row.defense == label:
                kind = "adaptive" if row.adaptive else "naive"
                title = f"{row.attack}, {kind}" if label != "none" else row.attack
                columns.append((title, row.reconstructions, row.scores["psnr_original"]))
    return columns
