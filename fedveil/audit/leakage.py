"""``fedveil audit leakage``: attack what a server really received, and score it."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.attacks.inversion import (
    Inversion,
    LearnedInverse,
    Observation,
    build_attack,
    check_model,
)
from fedveil.audit.adaptive import Attacker, attackers
from fedveil.audit.membership import Recognition, best, picked_out, picked_out_over_rounds, unread
from fedveil.audit.membership import table as membership_table
from fedveil.audit.membership import untold as membership_untold
from fedveil.audit.metrics import bootstrap, median, over_updates, psnr
from fedveil.audit.pieces import Pieces
from fedveil.audit.scoring import Scorer
from fedveil.audit.settings import LeakageSettings
from fedveil.audit.watch import WatchedFederation
from fedveil.data import Dataset, load_dataset
from fedveil.data.load import remarks_on
from fedveil.defenses import Defense, check_defense, parse_defense
from fedveil.files import json_bytes, write_results
from fedveil.models import build_model
from fedveil.pictures import Column, draw_images, png
from fedveil.progress import ProgressBars, say
from fedveil.results import (
    EXACT,
    IDENTIFIED,
    LABELS,
    PICKED_OUT,
    SECONDS,
    SHARES,
    TO_ORIGINAL,
    TO_TRAINED,
    Term,
    exact_of,
)
from fedveil.runs.state_files import load_checkpoint
from fedveil.wording import quantity

_DRAWN = 16
_PUBLIC = 2_000  # test images that an inverse learns from


@dataclass(frozen=True)
class Row:
    """One attack on one defence by one kind of attacker, scored image by image.

    Attributes:
        attack: Its name.
        defense: As written.
        adaptive: Whether the attacker knows the defence.
        reconstructions: [M, C, H, W], each batch in the order that suits the originals best.
        loss: Float64 [V], the attacker's own, a value a batch.
        scores: Column name to [M].
        floors: Column name to [M], what images without content get from the same scorer.
        untold: Of how many updates the attack cannot tell; what stands there is a part of an
            answer, or a weaker attack's.
    """

    attack: str
    defense: str
    adaptive: bool
    reconstructions: Tensor
    loss: Tensor
    scores: dict[str, Tensor]
    floors: dict[str, Tensor]
    untold: int = 0

    def summary(self) -> dict[str, Any]:
        """Return the row of ``leakage.json``: means of shares, medians of the rest."""
        row: dict[str, Any] = {
            "attack": self.attack,
            "defense": self.defense,
            "adaptive": self.adaptive,
            "images": len(self.reconstructions),
            "untold": self.untold,
        }
        for name, values in self.scores.items():
            # A round's images are recovered together, so each update is one draw.
            updates = values.view(len(self.loss), -1)
            if name in SHARES:
                interval = over_updates(updates)
            else:
                interval = bootstrap(median(updates), statistic=median)
            row[name] = interval.value
            # One update tells nothing of how far others lie from it.
            told = name in SHARES or len(updates) > 1
            row[f"{name}_low"] = interval.low if told else None
            row[f"{name}_high"] = interval.high if told else None
        for name, values in self.floors.items():
            middle = values.mean() if name in SHARES else median(values[None])[0]
            row[f"{name}_floor"] = float(middle)
        return row


@dataclass(frozen=True)
class LeakageReport:
    """The result of an audit.

    Attributes:
        dataset: Name of the dataset whose images were attacked.
        model: Name of the model that was attacked.
        settings: What was audited.
        originals: [M, C, H, W], the victim's images.
        trained: Defence to [M, C, H, W], what the victim trained on under it.
        rows: One for each attack, defence and kind of attacker.
        membership: Defence to what membership attacks, which rebuild nothing, recognise.
        unread: What the updates did not hold though others' may, in sentences.
    """

    dataset: str
    model: str
    settings: LeakageSettings
    originals: Tensor
    trained: dict[str, Tensor]
    rows: tuple[Row, ...]
    membership: dict[str, tuple[Recognition, ...]]
    unread: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``leakage.json``."""
        return {
            "settings": {"dataset": self.dataset, "model": self.model, **asdict(self.settings)},
            "rows": [row.summary() for row in self.rows],
            "membership": [
                {"defense": defense, **one.as_json()}
                for defense, found in self.membership.items()
                for one in found
            ],
            "untold": [*membership_untold(self.membership), *self.unread],
        }

    def table(self) -> str:
        """Return the rows, and what membership attacks tell, as lines of text."""
        wide = [max(8, *(len(row.attack) + 2 for row in self.rows))]
        wide += [max(16, *(len(row.defense) + 2 for row in self.rows))]
        lines = [
            f"{'attack':{wide[0]}}{'defence':{wide[1]}}{'attacker':10}"
            + "".join(f"{score.heading:>{_width(score)}}" for score in _COLUMNS)
        ]
        for row in self.rows:
            found = row.summary()
            lines += [_line(found, wide), _floor_line(found, wide)]
            if row.untold:
                lines.append(
                    f"  {row.attack} cannot tell of {row.untold} of "
                    f"{quantity(len(row.loss), 'update')}: its search ended without an "
                    "answer or at its limit, and what stands there is a part of one or a "
                    "weaker attack's, which shows nothing of what there is to find"
                )
        return "\n".join([*lines, *membership_table(self.membership), *self.unread])

    def write(self, out: Path) -> None:
        """Write leakage.json, reconstructions.npz and reconstructions.png into ``out``.

        Each file appears whole or not at all, leakage.json last.

        Raises:
            FedveilError: The directory cannot be made or written.
        """
        # All are made before the first is written: making them takes longer than writing them.
        files = {
            "reconstructions.npz": _arrays(self),
            "reconstructions.png": _picture(self),
            "leakage.json": json_bytes(self.as_json()),
        }
        write_results(out, files)


_COLUMNS = (EXACT, IDENTIFIED, PICKED_OUT, LABELS, TO_ORIGINAL, TO_TRAINED, SECONDS)
_DIGITS = {TO_ORIGINAL: 1, TO_TRAINED: 1, SECONDS: 2}


def _width(score: Term) -> int:
    return 15 if score is EXACT else len(score.heading) + 2


def _line(row: dict[str, Any], wide: Sequence[int]) -> str:
    kind = "adaptive" if row["adaptive"] else "naive"
    return f"{row['attack']:{wide[0]}}{row['defense']:{wide[1]}}{kind:10}" + _cells(row, "")


def _floor_line(row: dict[str, Any], wide: Sequence[int]) -> str:
    return f"{'':{wide[0]}}{'':{wide[1]}}{'floor':10}" + _cells(row, "_floor")


def _cells(row: dict[str, Any], end: str) -> str:
    cells = []
    for score in _COLUMNS:
        value = row.get(f"{score.key}{end}")
        text = "-" if value is None else f"{value:.0%}" if score.share else ""
        text = text or f"{value:.{_DIGITS[score]}f}"
        cells.append(f"{text + (exact_of(row) if score is EXACT else ''):>{_width(score)}}")
    return "".join(cells)


Progress = Callable[[str, int, int, float], None]


def audit_leakage(
    dataset: Dataset,
    model: nn.Module,
    settings: LeakageSettings,
    *,
    model_name: str | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> LeakageReport:
    """Attack the updates of one victim and score what comes out.

    A federation runs over the local engine, and its server notes what the victim sends. The attacks
    receive that observation only; originals and labels stay in this function and its helpers, for
    scoring. Under every defence each attack runs as the naive attacker, who does not know it, and
    as the adaptive ones of ``fedveil.audit.adaptive``, who do.

    Args:
        dataset: What the clients hold.
        model: What the server sends, with its weights; clients train it in training mode.
        settings: What is audited.
        model_name: What the report calls the model; None for the name of its class.
        out: Folder for the results, in which an audit that was cut short goes on; None writes
            nothing.
        progress: Called as ``progress(step, images done, images, loss)``.

    Raises:
        FedveilError: Fewer images than asked for, what an attack refuses, or ``out`` holds what
            another audit has finished.
    """
    attacked_model = model_name or type(model).__name__
    pieces = Pieces.of(out, settings.described(dataset.name, attacked_model))
    federation = WatchedFederation(dataset, model, settings)
    defenses = _tried_out(federation, settings)
    used = federation.ground_truth()
    parts = []
    for defense in defenses:
        rounds = federation.follow(defense) if settings.repeats > 1 else ()
        # What is rebuilt is rebuilt from the first: the others are of the same images.
        seen = rounds[0].select(torch.tensor([0])) if rounds else federation.observe(defense)
        parts.append(
            attacked(
                dataset,
                settings,
                defense,
                seen,
                used,
                rounds=rounds,
                pieces=pieces,
                progress=progress,
            )
        )
    report = replace(joined(parts), model=attacked_model)
    if out is not None:
        report.write(out)
    pieces.close()
    return report


def _tried_out(federation: WatchedFederation, settings: LeakageSettings) -> list[Defense]:
    """Return the defences, after a look at whether model, defences and attacks can be."""
    dataset = federation.data
    check_model(
        federation.model,
        dataset.shape,
        len(dataset.classes),
        images=settings.batch * settings.aggregate,
        batch_statistics=True,
    )
    defenses = [parse_defense(text) for text in settings.defenses]
    for defense in defenses:
        check_defense(defense, federation.model, dataset.shape)
        federation.try_out(defense)
    for attack in settings.attacks:
        build_attack(attack)
    return defenses


def run_leakage_audit(
    dataset: str,
    model: str,
    settings: LeakageSettings,
    *,
    out: Path | None,
    checkpoint: Path | None = None,
) -> LeakageReport:
    """Audit a dataset and a model by their names.

    Args:
        dataset: As ``fedveil.data.load_dataset`` reads it.
        model: As ``fedveil.models.build_model`` reads it.
        settings: What is audited.
        out: Directory for the results; ``None`` writes nothing.
        checkpoint: Trained weights for the model; freshly initialised by the seed otherwise, which
            is the worst case for the client.

    Raises:
        FedveilError: Anything the user can mend.
    """
    data, built = prepared(dataset, model, settings.seed)
    if checkpoint:
        load_checkpoint(built, checkpoint)
    with shown() as show:
        return audit_leakage(data, built, settings, model_name=model, out=out, progress=show)


def prepared(dataset: str, model: str, seed: int) -> tuple[Dataset, nn.Module]:
    """Return a dataset and a model by their names, and say what is remarkable about the images."""
    data = load_dataset(dataset, seed=seed)
    built = build_model(model, data.shape, len(data.classes), seed=seed)
    for sentence in remarks_on(data.left_out, data.remarks):
        say(f"{dataset}: {sentence}")
    return data, built.train()  # as the clients will, whatever mode the factory leaves it in


@contextmanager
def shown() -> Iterator[Progress]:
    """Show how far an audit is, as it says it."""
    with ProgressBars() as bars:
        bars.begin("federation", 0, None, "")
        yield lambda step, done, total, loss: bars(step, done, total, f"loss {loss:.2g}")


def joined(parts: Sequence[LeakageReport]) -> LeakageReport:
    """Return the reports on several defences of the same images as one."""
    return replace(
        parts[0],
        trained={label: images for part in parts for label, images in part.trained.items()},
        rows=tuple(row for part in parts for row in part.rows),
        membership={label: found for part in parts for label, found in part.membership.items()},
        unread=tuple(dict.fromkeys(sentence for part in parts for sentence in part.unread)),
    )


def attacked(
    dataset: Dataset,
    settings: LeakageSettings,
    defense: Defense,
    informed: Observation,
    used: Tensor,
    *,
    rounds: Sequence[Observation] = (),
    pieces: Pieces = Pieces(),  # noqa: B008 (frozen)
    progress: Progress | None = None,
) -> LeakageReport:
    """Run the settings' attacks on one observation, and score them.

    Args:
        dataset: Where the images, the candidates and the strangers are from.
        settings: What is audited.
        defense: What the clients did.
        informed: What the server has, with all public knowledge of the defence.
        used: Int64 [M], which training images are behind it, one update after the other.
        rounds: Further rounds of the same images, each with other clients' updates after the
            victim's, for membership to be told by all of them together.
        pieces: What was found already, and where to keep what is found.
        progress: As of ``audit_leakage``.

    Raises:
        FedveilError: What an attack refuses.
    """
    scorer = Scorer.of(dataset, used, defense.transform, settings.seed)
    told = picked_out(defense, informed, dataset, used, seed=settings.seed)
    if rounds:
        told += picked_out_over_rounds(defense, rounds, dataset, used, seed=settings.seed)
    measure = _Measure(scorer, told, defense)
    undo = _inverse(dataset, defense, settings, progress)
    rows = [
        measure.row(label, attacker, found)
        for name in settings.attacks
        for label, attacker, found in _attempts(name, defense, informed, undo, pieces, progress)
    ]
    return LeakageReport(
        dataset=dataset.name,
        model=type(informed.model).__name__,
        settings=settings,
        originals=scorer.victims.pixels,
        trained={defense.label: scorer.trained},
        rows=tuple(rows),
        membership={defense.label: told},
        unread=unread(informed),
    )


def _attempts(
    name: str,
    defense: Defense,
    informed: Observation,
    undo: Callable[[Tensor], Tensor] | None,
    pieces: Pieces,
    progress: Progress | None,
) -> Iterator[tuple[str, Attacker, Inversion]]:
    """Yield every attacker that one attack serves, by what name, and what each finds."""
    attack = build_attack(name)
    found: dict[int, Inversion] = {}
    for attacker in attackers(defense, informed, attack.uses, inverse=undo is not None):
        label = f"{name}+inverse" if attacker.inverse else name
        step = f"{label} on {defense.label}{' (adaptive)' if attacker.adaptive else ''}"
        # The inverse goes on top of what the attacker before it has found already.
        seen = attacker.observation
        if id(seen) not in found:
            run = partial(attack, seen, progress=_named(progress, step))
            piece = f"{name} on {defense.label}, {len(found)}"
            found[id(seen)] = pieces.inversion(piece, seen, run)
        result = found[id(seen)]
        undone = _undone(result, undo) if attacker.inverse and undo is not None else result
        yield label, attacker, undone


@dataclass(frozen=True)
class _Measure:
    """Makes a row of what an attacker found, beside what images without content get.

    Attributes:
        scorer: Holds the truth.
        told: What membership attacks recognised.
        defense: What the clients did.
        floors: What was measured already, by whether the attacker transforms candidates.
    """

    scorer: Scorer
    told: Sequence[Recognition]
    defense: Defense
    floors: dict[bool, dict[str, Tensor]] = field(default_factory=dict)

    def row(self, attack: str, attacker: Attacker, result: Inversion) -> Row:
        transforms = self.defense.transform is not None
        knows = attacker.adaptive and not attacker.inverse and transforms
        images, scores = self.scorer.score(result, knows=knows)
        if knows not in self.floors:
            self.floors[knows] = self.scorer.floors(result.images.shape[1], knows=knows)
        floor = dict(self.floors[knows])
        closest = best(self.told, adaptive=attacker.adaptive)
        if closest is not None:
            scores[PICKED_OUT.key] = closest.picked.flatten()
            floor[PICKED_OUT.key] = torch.full_like(scores[PICKED_OUT.key], closest.chance)
        kind = (attack, self.defense.label, attacker.adaptive)
        untold = 0 if result.untold is None else int(result.untold.sum())
        return Row(*kind, images, result.loss, scores, floor, untold)


def _inverse(
    dataset: Dataset, defense: Defense, settings: LeakageSettings, progress: Progress | None
) -> Callable[[Tensor], Tensor] | None:
    """Return what a network learnt to undo a transformation on test images, nobody's training."""
    if not settings.inverse or defense.transform is None:
        return None
    step = _named(progress, f"learning to undo {defense.label}")
    public = dataset.test[:_PUBLIC].pixels
    return LearnedInverse(seed=settings.seed).fit(defense.transform, public, progress=step)


def _undone(result: Inversion, undo: Callable[[Tensor], Tensor]) -> Inversion:
    victims, batch = result.images.shape[:2]
    images = undo(result.images.flatten(0, 1)).double()
    return replace(result, images=images.reshape(victims, batch, *images.shape[1:]), originals=None)


def _named(progress: Progress | None, step: str) -> Callable[[int, int, float], None] | None:
    if progress is None:
        return None
    return lambda done, total, loss: progress(step, done, total, loss)


def _arrays(report: LeakageReport) -> bytes:
    arrays: dict[str, Any] = {"originals": report.originals.numpy()}
    for label, images in report.trained.items():
        arrays[f"trained/{label}"] = images.numpy()
    for row in report.rows:
        key = f"{row.attack}/{row.defense}/{'adaptive' if row.adaptive else 'naive'}"
        arrays[f"images/{key}"] = row.reconstructions.numpy()
        arrays[f"loss/{key}"] = row.loss.numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _picture(report: LeakageReport) -> bytes:
    from matplotlib.figure import Figure

    columns = _columns(report)
    count = min(len(report.originals), _DRAWN)
    size = (1.5 * len(columns), 1.6 * count + 0.6)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(count, len(columns), squeeze=False)
    draw_images(grid, columns, range(count), size=7)
    return png(figure)


def _columns(report: LeakageReport) -> list[Column]:
    columns: list[Column] = [("original", report.originals, None)]
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
