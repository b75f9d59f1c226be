"""``fedveil audit egress``: what a model that leaves tells of who was in its training."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedveil.analytic import AnalyticClassifier, Statistics, balanced, ridge, rows_of, sums_of
from fedveil.analytic.privacy import GaussianRelease
from fedveil.analytic.ridge import noisy_ridge
from fedveil.attacks.membership.released import (
    calibrated,
    confidence,
    likelihood_ratio,
    loss,
    relative,
)
from fedveil.audit.members import Members
from fedveil.audit.metrics import RATES, ROC_HEAD, Roc, roc_of_one
from fedveil.audit.settings import FEWEST, EgressSettings
from fedveil.data import Images, load_dataset
from fedveil.defenses import parse_defense
from fedveil.errors import FedveilError
from fedveil.federation.evaluation import count_correct
from fedveil.federation.job import Job
from fedveil.federation.server_app import load_job
from fedveil.federation.strategies.analytic import Analytic
from fedveil.federation.task import ClientTask
from fedveil.federation.training import LocalTraining, train_locally
from fedveil.files import json_bytes, write_results
from fedveil.models import build_model
from fedveil.progress import PlainLines
from fedveil.results import learnt_nothing
from fedveil.runs.directory import RunDirectory, origin
from fedveil.runs.secrets import DISTILLED
from fedveil.runs.state_files import load_checkpoint
from fedveil.secure_random import SecureGenerator
from fedveil.wording import quantity

_EXPOSED = 10
_AS_MUCH = 0.8  # of what the audited model learnt, that shadows must
_DRAWS = 1_000
_ALSO_DISTILLED = (
    f"The run's {DISTILLED} was not audited: if that network leaves, too, audit the file."
)
_TAKEN = (
    "That {} was trained on the training images of {} is taken as said: had it been trained on "
    "others, nobody would be found, and that would show nothing."
)


@dataclass(frozen=True)
class Exposure:
    """How well one attack tells members from others.

    Attributes:
        attack: Its name.
        roc: Its operating points, with intervals over images.
        scores: Float64 [N], members first.
    """

    attack: str
    roc: Roc
    scores: Tensor

    def as_json(self) -> dict[str, Any]:
        """Return a row of ``egress.json``."""
        return {"attack": self.attack, **self.roc.as_json()}


@dataclass(frozen=True)
class EgressReport:
    """The result of an audit.

    Attributes:
        subject: What was audited, in words.
        settings: How.
        accuracy: Of the model on members and on the others.
        members: Int64 [M], which training images they are.
        labels: Int64 [M], of the members.
        others: How many images that nobody trained on they were told from.
        rows: One an attack.
        untold: Why something could not be told, sentence by sentence.
        told: Whether it could be told at all that members are not found: the model learnt
            something, and the shadows as much.
        doubles: Images said to be in no training that are doubles of some that are, left out.
    """

    subject: str
    settings: EgressSettings
    accuracy: tuple[float, float]
    members: Tensor
    labels: Tensor
    others: int
    rows: tuple[Exposure, ...]
    untold: tuple[str, ...]
    told: bool = True
    doubles: int = 0

    @property
    def best(self) -> Exposure:
        """The attack by which most members are found at the lowest rate that can be told."""

        def reach(row: Exposure) -> tuple[float, float]:
            told = [found.value for found in row.roc.found if found is not None]
            return (told[-1] if told else 0.0, row.roc.auc.value)

        return max(self.rows, key=reach)

    def exposed(self) -> list[dict[str, Any]]:
        """Return the members that the best attack is surest of, and how many others score so."""
        scores = self.best.scores
        own, strangers = scores[: len(self.members)], scores[len(self.members) :]
        order = own.argsort(descending=True, stable=True)[:_EXPOSED]
        return [
            {
                "image": int(self.members[place]),
                "label": int(self.labels[place]),
                "score": float(own[place]),
                "others_above": int((strangers >= own[place]).sum()),
            }
            for place in order.tolist()
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``egress.json``."""
        return {
            "subject": self.subject,
            "settings": asdict(self.settings),
            **origin(),
            "members": len(self.members),
            "others": self.others,
            "accuracy_members": self.accuracy[0],
            "accuracy_others": self.accuracy[1],
            "rows": [row.as_json() for row in self.rows],
            "best": self.best.attack,
            "exposed": self.exposed(),
            "untold": list(self.untold),
            "told": self.told,
            "doubles": self.doubles,
        }

    def table(self) -> str:
        """Return the rows as lines of text."""
        lines = [
            f"{self.subject}: {len(self.members):,} training images against {self.others:,} others",
            f"accuracy {self.accuracy[0]:.1%} on them, {self.accuracy[1]:.1%} on the others",
            f"{'attack':12}{ROC_HEAD}",
            *(f"{row.attack:12}{row.roc.as_text()}" for row in self.rows),
        ]
        return "\n".join([*lines, *self.untold])

    def write(self, out: Path) -> None:
        """Write egress.json into ``out``, whole or not at all.

        Raises:
            FedveilError: The directory cannot be written.
        """
        content = json_bytes(self.as_json())
        write_results(out, {"egress.json": content})


Progress = Callable[[int, int], None]


class Learning(Protocol):
    """How a model of the audited kind is made of other images."""

    def __call__(self, own: Images, fitted: Images, level: float, seed: int) -> nn.Module:
        """Return one that learnt from images.

        Args:
            own: All that it learns from.
            fitted: Those of them that it is compared on.
            level: Mean loss of the audited model on images that it learnt from.
            seed: Of this model.
        """


@dataclass(frozen=True)
class LearningByDescent:
    """Minibatches until the images are fitted as well as the audited model fits its own.

    Attributes:
        fresh: Returns an untrained model of the same kind for a seed.
        training: How it trains.
        epochs: Most passes.
    """

    fresh: Callable[[int], nn.Module]
    training: LocalTraining
    epochs: int

    def __call__(self, own: Images, fitted: Images, level: float, seed: int) -> nn.Module:
        """Return one that learnt from images, as of ``Learning``."""
        model, generator = self.fresh(seed), torch.Generator().manual_seed(seed)
        one_pass = replace(self.training, epochs=1, decay=False)
        for _ in range(self.epochs):
            train_locally(model, own, one_pass, generator=generator)
            fit = confidence(model, fitted)
            if float(torch.nn.functional.softplus(-fit).mean()) <= level:
                break
        return model


@dataclass(frozen=True)
class LearningBySums:
    """The ridge that images determine on the audited classifier's own map, noise and all.

    Attributes:
        classifier: The audited one.
        release: The noise of the run's sums; None for none.
        most_images: Images that a client sums at most.
        public: Sums of the server's own images, which its ridge of noisy ones takes besides.
        balanced: Whether the audited one's classes are as likely.
    """

    classifier: AnalyticClassifier
    release: GaussianRelease | None = None
    most_images: int = 1
    public: Statistics | None = None
    balanced: bool = False

    def __call__(self, own: Images, fitted: Images, level: float, seed: int) -> nn.Module:
        """Return one that learnt from images, as of ``Learning``; nothing is left to stop at."""
        del fitted, level, seed
        features, release = self.classifier.features, self.release
        rows = rows_of(features, own.raw)
        classes, size = self.classifier.classes, features.dimension
        sums = Statistics.of(rows, own.labels, classes=classes, dimension=size)
        if release is None:
            head = ridge(sums, views=features.views)
            head = balanced(head, sums) if self.balanced else head
        else:
            most = self.most_images
            sums = release.noised(sums, SecureGenerator(), most_images=most, sharers=1)
            head = noisy_ridge(sums, noise=release.scale(most), images=len(own), public=self.public)
        made = AnalyticClassifier(features, classes)
        steepness = float(self.classifier.steepness)
        made.load_state_dict(made.with_head(head, steepness=steepness))
        return made.eval()


def audit_egress(
    model: nn.Module,
    learning: Learning,
    used: Images,
    unused: Images,
    settings: EgressSettings,
    *,
    subject: str,
    progress: Progress = lambda done, total: None,
) -> EgressReport:
    """Tell images that a model was trained on from images that it was not, by what it answers.

    Shadows are trained on half of the audited images each, every image in half of them, so that
    each image is compared with models that held it and models that did not. The images that are
    told apart are thereby known to the attacker, as in the sources: this is the worst case.

    Args:
        model: What leaves.
        learning: How shadows are made.
        used: Images it was trained on, as they were trained on.
        unused: Images that nobody trained on, treated alike.
        settings: How.
        subject: What is audited, in words.
        progress: Called as ``progress(shadows done, shadows in all)``.

    Raises:
        FedveilError: Fewer than 20 images of either kind, doubles left out; or answers of the
            model, or of a shadow, that are no numbers.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    apart = unused[~unused.doubles_of(used)]
    members, pool, beside = _drawn(used, apart, settings, generator)
    count, strangers = len(members), len(pool) - len(members)
    target = confidence(model, pool)
    _check_finite(target, "the model")
    level = _mean_loss(target[:count])
    scores, fits = {"loss": loss(target)}, []
    if settings.shadows:
        shadows, held = _shadows(learning, pool, beside, settings, level, generator, progress)
        _check_finite(shadows, "a model trained to compare it with (--shadows 0 trains none)")
        fits = [_mean_loss(known[own]) for known, own in zip(shadows, held, strict=True)]
        population = torch.arange(len(pool)) >= count
        scores["calibrated"] = calibrated(target, shadows)
        scores["lira"] = likelihood_ratio(target, shadows, held)
        scores["rmia"] = relative(target, shadows, population, held)
    rows = tuple(
        Exposure(name, roc_of_one(values[:count], values[count:]), values)
        for name, values in scores.items()
    )
    accuracy = (_right(model, pool[:count]), _right(model, pool[count:]))
    weak = tuple(_weaknesses(accuracy[0], pool[:count].labels, level, fits))
    doubles = len(unused) - len(apart)
    return EgressReport(
        subject,
        settings,
        accuracy,
        members,
        pool.labels[:count],
        strangers,
        rows,
        (*weak, *_untold(strangers, doubles, settings)),
        told=not weak,
        doubles=doubles,
    )


def _drawn(
    used: Images, unused: Images, settings: EgressSettings, generator: torch.Generator
) -> tuple[Tensor, Images, Images]:
    """Return which of the used are told from others, both together, and the shadows' companions."""
    # An image that a shadow holds twice, or that its twin tells it, it would always hold.
    firsts = used.firsts
    used = used[firsts]
    if min(len(used), len(unused)) < FEWEST:
        raise FedveilError(
            f"trained on: {quantity(len(used), 'image')}, others: {len(unused)}, doubles left out; "
            f"an egress audit needs at least {FEWEST} of each"
        )
    drawn = torch.randperm(len(used), generator=generator)
    count = min(settings.images, len(used), len(unused))
    strangers = unused[torch.randperm(len(unused), generator=generator)]
    # A rate of one in a thousand needs a thousand strangers; but a shadow, which holds half of all,
    # must not hold more than the model did, or it fits them less well.
    strangers = strangers[: max(count, min(_DRAWS, 2 * len(used) - count))]
    pool = Images.joined([used[drawn[:count]], strangers])
    room = min(settings.companions, len(used) - len(pool) // 2)
    return firsts[drawn[:count]], pool, used[drawn[count : count + max(0, room)]]


def audit_run(path: Path, settings: EgressSettings, *, out: Path | None) -> EgressReport:
    """Audit the model that a run delivered.

    Those who were in its training are the images of the clients whose answers were averaged; the
    others are the report images, which nothing was learnt or chosen on.

    Args:
        path: Directory of the run.
        settings: How.
        out: Directory for egress.json; None writes nothing.

    Raises:
        FedveilError: The run is not complete, or has images at each client that are not here.
    """
    directory = RunDirectory.open(path)
    config = directory.config
    if config.engine == "deployed":
        raise FedveilError(
            f"{path} was trained on images that only its clients hold: an egress audit needs them; "
            "let each site run fedveil audit egress MODEL --dataset ITS-FOLDER --model NAME"
        )
    job = load_job(config)
    directory.check_images(job.dataset.digest)
    job.model.load_state_dict(directory.model())
    transform = parse_defense(config.defense).transform
    with _shown() as progress:
        report = audit_egress(
            job.model,
            _learning_of(job, settings),
            _members(directory, job).transformed(transform),
            job.evaluation.report.transformed(transform),
            settings,
            subject=str(path),
            progress=progress,
        )
    if directory.secrets.path(DISTILLED).is_file():
        report = replace(report, untold=(*report.untold, _ALSO_DISTILLED))
    if out is not None:
        report.write(out)
    return report


def audit_model(
    weights: Path, dataset: str, model: str, settings: EgressSettings, *, out: Path | None
) -> EgressReport:
    """Audit a model in a file, trained on the training images of a dataset.

    Args:
        weights: File of the weights.
        dataset: As ``load_dataset`` reads it; its test images are those nobody trained on.
        model: As ``build_model`` reads it.
        settings: How.
        out: Directory for egress.json; None writes nothing.

    Raises:
        FedveilError: Anything the user can mend.
    """
    data = load_dataset(dataset, seed=settings.seed)
    classes = len(data.classes)
    released = build_model(model, data.shape, classes, seed=settings.seed)
    load_checkpoint(released, weights)
    with _shown() as progress:
        report = audit_egress(
            released,
            LearningByDescent(
                lambda seed: build_model(model, data.shape, classes, seed=seed),
                LocalTraining(),
                settings.epochs,
            ),
            data.train,
            data.test,
            settings,
            subject=str(weights),
            progress=progress,
        )
    report = replace(report, untold=(*report.untold, _TAKEN.format(weights, dataset)))
    if out is not None:
        report.write(out)
    return report


def _learning_of(job: Job, settings: EgressSettings) -> Learning:
    config, dataset = job.config, job.dataset
    if isinstance(job.model, AnalyticClassifier):
        bound = Members.of(config, dataset.train).bound
        release = Analytic.release_of(config)
        public = sums_of(job.model, job.evaluation.calibration) if release else None
        return LearningBySums(job.model, release, bound or 1, public, config.balanced)
    classes = len(dataset.classes)
    return LearningByDescent(
        lambda seed: build_model(config.model, dataset.shape, classes, seed=seed),
        ClientTask.of(config, dataset).training,
        settings.epochs,
    )


def _members(directory: RunDirectory, job: Job) -> Images:
    """Return the images of the clients whose answers were used."""
    members = Members.of(job.config, job.dataset.train)
    took_part = {client for record in directory.rounds() for client in record.clients}
    clients = sorted(took_part) or range(job.config.clients)
    return Images.joined([members.images(client) for client in clients])


@contextmanager
def _shown() -> Iterator[Callable[[int, int], None]]:
    plain = PlainLines()
    yield lambda done, total: plain("shadows", done, total, "trained")


def _shadows(
    learning: Learning,
    pool: Images,
    beside: Images,
    settings: EgressSettings,
    level: float,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Return φ [S, N] under each shadow, and which images it held, bool [S, N]."""
    known, held = [], torch.zeros(settings.shadows, len(pool), dtype=torch.bool)
    for number in range(settings.shadows):
        # Of each pair of shadows the second holds what the first does not.
        if number % 2:
            held[number] = ~held[number - 1]
        else:
            half = torch.randperm(len(pool), generator=generator)[: len(pool) // 2]
            held[number, half] = True
        fitted = pool[held[number]]
        shadow = learning(
            Images.joined([fitted, beside]), fitted, level, settings.seed + number + 1
        )
        known.append(confidence(shadow, pool))
        progress(number + 1, settings.shadows)
    return torch.stack(known), held


def _check_finite(answers: Tensor, whose: str) -> None:
    if bool(answers.isfinite().all()):
        return
    raise FedveilError(
        f"{whose} answers images with numbers that are not finite: of such answers nobody can tell "
        "who was in the training"
    )


def _mean_loss(confidences: Tensor) -> float:
    return float(torch.nn.functional.softplus(-confidences).mean())


def _weaknesses(
    accuracy: float, labels: Tensor, level: float, fits: Sequence[float]
) -> Iterator[str]:
    """Say why it would show nothing if no member was found."""
    commonest = float(labels.bincount().max()) / len(labels)
    if learnt_nothing(accuracy, commonest, len(labels)):
        yield (
            f"The model is right on {accuracy:.1%} of its training images, and naming the "
            f"commonest class on {commonest:.1%}: it learnt nothing, or it is not asked as it was "
            "trained (other images, labels in another order, another normalisation)."
        )
    shares = labels.bincount().double() / len(labels)
    unlearnt = float(-torch.xlogy(shares, shares).sum())
    if fits and unlearnt - statistics.fmean(fits) < _AS_MUCH * (unlearnt - level):
        yield (
            f"The models trained to compare with fit their images at a loss of "
            f"{statistics.fmean(fits):.3f}, and the model its own at {level:.3f}, where one that "
            f"knows no more than how common classes are has {unlearnt:.3f}: they learnt too little "
            "to be compared with; give more --epochs, or more --companions."
        )
    elif fits and level >= unlearnt:
        yield (
            f"The model fits its own images at a loss of {level:.3f}, which is no less than the "
            f"{unlearnt:.3f} of knowing how common classes are: at its scale of answers no model "
            "can be trained to compare with."
        )


def _untold(strangers: int, doubles: int, settings: EgressSettings) -> Iterator[str]:
    if doubles:
        yield (
            f"Of the images said to be in no training {doubles:,} are doubles of images that are, "
            "and were left out."
        )
    for rate in RATES:
        if strangers * rate < 1:
            yield (
                f"A false-positive rate of {rate:.1%} cannot be told from {strangers} images that "
                f"nobody trained on: {round(1 / rate):,} are needed."
            )
    if not settings.shadows:
        yield "Without shadows only the loss was tried, which finds few at low rates."


def _right(model: nn.Module, images: Images) -> float:
    return count_correct(model, images.pixels, images.labels) / len(images)
