"""``fedveil audit sums``: what sums over clients' images tell of those images."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.analytic import (
    FRACTION_BITS,
    AnalyticClassifier,
    Layout,
    Statistics,
    load_classifier,
    rows_of,
)
from fedveil.analytic.privacy import GaussianRelease, noise_sharers, traceable
from fedveil.attacks.inversion.feature_maps import FeatureInversion, SpanInversion
from fedveil.attacks.membership.leverage import Column, Leverage, Tracing
from fedveil.audit.members import Members
from fedveil.audit.metrics import RATES, ROC_HEAD, Roc, roc_of_one
from fedveil.audit.settings import FEWEST, SumsSettings
from fedveil.data import Images
from fedveil.errors import FedveilError
from fedveil.features import FeatureMap, slow_beneath
from fedveil.federation.server_app import load_job
from fedveil.federation.strategies.analytic import Analytic, summed_so_far
from fedveil.files import json_bytes, write_results
from fedveil.pictures import draw_images, png
from fedveil.progress import PlainLines
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory, origin
from fedveil.secure_random import SecureGenerator
from fedveil.wording import quantity

_MOST_STRANGERS = 10_000
_SLOW_STEPS, _SLOW_IMAGES = 200, 2


@dataclass(frozen=True)
class Told:
    """How well images in sums are told from others.

    Attributes:
        holder: Whose sums they are.
        attack: ``leverage``; or by public images ``tracing`` or, in the sum of a class, ``column``.
        seen: Whether the server of this run held them.
        images: Images in the sums.
        roc: Its operating points.
    """

    holder: str
    attack: str
    seen: bool
    images: int
    roc: Roc

    def as_json(self) -> dict[str, Any]:
        """Return a row of ``sums.json``."""
        return {
            "holder": self.holder,
            "attack": self.attack,
            "seen": self.seen,
            "images": self.images,
            **self.roc.as_json(),
        }


@dataclass(frozen=True)
class Rebuilt:
    """Images rebuilt from sums, each beside what public images alone would give.

    Attributes:
        candidates: Of each the images that it may be, float in [0, 1], [M, C, H, W]: all of its
            class at its client. One of several is searched in the span of its client's sums.
        alone: From its client's sums, float in [0, 1], [N, C, H, W].
        together: From the round's, where the column is that of all images of the class.
        nearest: Public images whose features are nearest to those in the client's column: the floor
            is how much they look like the candidates.
    """

    candidates: tuple[Tensor, ...]
    alone: Tensor
    together: Tensor
    nearest: Tensor

    @property
    def originals(self) -> Tensor:
        """The candidate that each image from one client's sums is nearest to, [N, C, H, W]."""
        found = zip(self.alone, self.candidates, strict=True)
        return torch.stack([some[_correlations(one, some).argmax()] for one, some in found])

    def as_json(self) -> dict[str, Any]:
        """Return ``rebuilt`` of ``sums.json``: mean correlations with the nearest candidate."""
        return {
            "images": len(self.candidates),
            "lone": sum(len(some) == 1 for some in self.candidates),
            "from_one_client": _mean_correlation(self.alone, self.candidates),
            "from_the_round": _mean_correlation(self.together, self.candidates),
            "floor": _mean_correlation(self.nearest, self.candidates),
        }


@dataclass(frozen=True)
class SumsReport:
    """The result of an audit.

    Attributes:
        subject: The run.
        settings: How.
        dimension: D.
        classes: K.
        release: The noise of the run; None without.
        public: Images that the attacker has besides.
        strangers: Images that are in no sum, nor among those.
        rows: What the server held, and what one client's sums would be.
        rebuilt: Images rebuilt from them; None where none could be.
        untold: Why something could not be told, sentence by sentence.
    """

    subject: str
    settings: SumsSettings
    dimension: int
    classes: int
    release: GaussianRelease | None
    public: int
    strangers: int
    rows: tuple[Told, ...]
    rebuilt: Rebuilt | None
    untold: tuple[str, ...]

    @property
    def allowed(self) -> dict[str, float] | None:
        """What noise leaves possible to the best attack on an image; None without noise."""
        if self.release is None:
            return None
        area, found = self.release.allows
        return {"auc": area, "tpr_at_1": found}

    @property
    def epsilon(self) -> float | None:
        """ε of the run; None without noise."""
        return None if self.release is None else self.release.epsilon

    @property
    def forecast(self) -> dict[str, float] | None:
        """What tracing the server's sums comes to with as many public images; None under noise."""
        if self.release is not None:
            return None
        images = next(row.images for row in self.rows if row.seen)
        area, found = traceable(self.dimension, images=images, public=images, classes=self.classes)
        return {"public": images, "auc": area, "tpr_at_1": found}

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``sums.json``."""
        return {
            "subject": self.subject,
            "settings": asdict(self.settings),
            **origin(),
            "dimension": self.dimension,
            "epsilon": self.epsilon,
            "public": self.public,
            "strangers": self.strangers,
            "forecast": self.forecast,
            "allowed": self.allowed,
            "rows": [row.as_json() for row in self.rows],
            "rebuilt": self.rebuilt.as_json() if self.rebuilt else None,
            "untold": list(self.untold),
        }

    def table(self) -> str:
        """Return the rows as lines of text."""
        width = max(len(row.holder) for row in self.rows) + 2
        lines = [
            f"{self.subject}: sums of {self.dimension:,} features"
            + (f", ε = {self.epsilon:g}" if self.epsilon else ""),
            f"{'sums of':{width}}{'images':>8}  {'attack':10}{ROC_HEAD}",
            *(
                f"{row.holder:{width}}{row.images:8,}  {row.attack:10}{row.roc.as_text()}"
                + ("" if row.seen else "  (not seen in this run)")
                for row in self.rows
            ),
        ]
        if self.forecast:
            lines.append(
                f"with {self.forecast['public']:,} public images of the same kind tracing comes to "
                f"an area of {self.forecast['auc']:.2f} and {self.forecast['tpr_at_1']:.0%} found "
                "at 1 %, by its formula"
            )
        if self.allowed:
            lines.append(
                f"noise leaves the best of all attacks {self.allowed['tpr_at_1']:.0%} found at 1 %"
            )
        if self.rebuilt:
            found = self.rebuilt.as_json()
            lines.append(
                f"{quantity(found['images'], 'image')} rebuilt, correlation with the original: "
                f"{found['from_one_client']:.2f} from one client's sums, "
                f"{found['from_the_round']:.2f} from the round's, {found['floor']:.2f} the nearest "
                "public image"
            )
        return "\n".join([*lines, *self.untold])

    def write(self, out: Path) -> None:
        """Write sums.png, where images were rebuilt, and sums.json, each whole or not at all.

        Raises:
            FedveilError: The directory cannot be written.
        """
        content = json_bytes(self.as_json())
        picture = {"sums.png": _picture(self.rebuilt)} if self.rebuilt else {}
        write_results(out, {**picture, "sums.json": content})


def audit_sums(path: Path, settings: SumsSettings, *, out: Path | None) -> SumsReport:
    """Tell who is in the sums of an analytic run, and rebuild who is alone in a part of them.

    Membership is told by leverage, and by tracing with public images, in the sums that the server
    held, and in those of one client, which is what it holds without secure aggregation, of two
    releases that differ by that client, or when all others collude with it. The public images are
    the server's own, and such report images as are not needed to be told from those in the sums.
    What a client's column of H is for a class of which it has one image is that image's features,
    and those are inverted; so is the same class's column of the whole sum. Of a class of which it
    has several one is searched in the span of its sums, where that is not the whole space.

    Args:
        path: Directory of the run.
        settings: How.
        out: Directory for the results; None writes nothing.

    Raises:
        FedveilError: It is no complete analytic run, its clients hold the images, or those that
            are here are not those in its sums.
    """
    case = _Case.of(path)
    plain = PlainLines()
    case.check(plain)
    generator = torch.Generator().manual_seed(settings.seed)
    if len(case.strangers) < FEWEST:
        raise FedveilError(
            f"{path} has {quantity(len(case.report), 'report image')}, doubles left out; an audit "
            f"of sums needs at least {FEWEST} that are in none: give the run more --report-images"
        )
    if not len(case.public):
        raise FedveilError(
            f"every calibration image of {path} is a double of one in its sums, so an attacker has "
            "no public one: give the run calibration images of its own"
        )
    rows = tuple(_told(case, settings, generator))
    rebuilt = _rebuilt(case, settings, generator, plain) if settings.rebuilt else None
    report = SumsReport(
        str(path),
        settings,
        case.dimension,
        case.classifier.classes,
        case.release,
        len(case.public),
        len(case.strangers),
        rows,
        rebuilt,
        tuple(_untold(case, len(case.strangers), settings, rebuilt)),
    )
    if out is not None:
        report.write(out)
    return report


@dataclass(frozen=True)
class _Case:
    """A run, and all that the server and the clients had.

    Attributes:
        path: Its directory.
        config: Its settings.
        classifier: w, with the map.
        sums: What the server holds in the end.
        noise: Standard deviation of the noise on their diagonal; 0 without.
        images: What each client summed, by partition.
        bound: How many of its images a client summed at most; None for all.
        own: The server's images that are in no sum.
        report: Images nobody learnt of.
        doubles: How many more of both are doubles of images in the sums.
    """

    path: Path
    config: TrainConfig
    classifier: AnalyticClassifier
    sums: Statistics
    noise: float
    images: Mapping[int, Images]
    bound: int | None
    own: Images
    report: Images
    doubles: int

    @classmethod
    def of(cls, path: Path) -> "_Case":
        directory = RunDirectory.open(path)
        config = directory.config
        if config.strategy != "analytic":
            raise FedveilError(
                f"{path} is a run of strategy {config.strategy}, whose clients return no sums over "
                "images; what they return is attacked by fedveil audit leakage"
            )
        if config.engine == "deployed":
            raise FedveilError(
                f"{path} was trained on images that only its clients hold, and an audit of sums "
                "needs them: audit a run on a dataset of the same kind, with as many images a "
                "client and features, on engine local"
            )
        job = load_job(config)
        directory.check_images(job.dataset.digest)
        classifier = load_classifier(directory.model())
        layout = Layout(classifier.features.dimension, classifier.classes)
        checkpoint = directory.checkpoint()
        if checkpoint is None or not checkpoint.state.memory:
            raise FedveilError(f"{path} has no sums yet: end it with fedveil train --resume {path}")
        sums, heard, noise = summed_so_far(layout, checkpoint.state.memory)
        members = Members.of(config, job.dataset.train)
        images = {client: members.images(client) for client in heard}
        inside, split = Images.joined([*images.values()]), job.evaluation
        # Of an image in the sums no double is public, and none is a stranger.
        own, report = (some[~some.doubles_of(inside)] for some in (split.calibration, split.report))
        doubles = len(split.calibration) + len(split.report) - len(own) - len(report)
        bound = members.bound
        return cls(path, config, classifier, sums, noise, images, bound, own, report, doubles)

    @property
    def features(self) -> FeatureMap:
        return self.classifier.features

    @property
    def dimension(self) -> int:
        """D."""
        return self.features.dimension

    @property
    def public(self) -> Images:
        """Images of the attacker's that are in no sum."""
        return Images.joined([self.own, self.report[: self._spared]])

    @property
    def strangers(self) -> Images:
        """Images in no sum that the attacker must tell from those that are."""
        return self.report[self._spared :][:_MOST_STRANGERS]

    @property
    def _spared(self) -> int:
        """How many report images the attacker has: a thousand are needed to tell low rates."""
        return min(len(self.report) // 2, max(0, len(self.report) - round(1 / RATES[-1])))

    @property
    def release(self) -> GaussianRelease | None:
        return Analytic.release_of(self.config)

    @property
    def most_images(self) -> int:
        """Images that the noise hides."""
        return (self.bound or 1) if self.release and self.release.unit == "client" else 1

    def rows(self, images: Images) -> Tensor:
        """Return what an image adds to the sums, int16 [N, width]."""
        return rows_of(self.features, images.raw)

    def of_client(self, images: Images) -> Statistics:
        """Return a client's sums, without noise."""
        rows, classes = self.rows(images), self.classifier.classes
        return Statistics.of(rows, images.labels, classes=classes, dimension=self.dimension)

    @property
    def sharers(self) -> int:
        """How many clients' noise is enough together."""
        return noise_sharers(len(self.images) if self.config.secure_aggregation else None)

    @property
    def noise_alone(self) -> float:
        """Standard deviation of the noise that one client adds; 0 without."""
        if self.release is None:
            return 0.0
        return self.release.scale(self.most_images) / math.sqrt(self.sharers)

    def released(self, sums: Statistics) -> Statistics:
        """Return a client's sums with the noise that it adds in this run."""
        if self.release is None:
            return sums
        most, sharers = self.most_images, self.sharers
        return self.release.noised(sums, SecureGenerator(), most_images=most, sharers=sharers)

    def check(self, plain: PlainLines) -> None:
        """Refuse images that are not those in the sums: who is in them could not be told by others.

        Raises:
            FedveilError: As above.
        """
        if self.release is not None:
            return
        layout = Layout(self.dimension, self.classifier.classes)
        total = Statistics.nothing(layout)
        for done, images in enumerate(self.images.values(), start=1):
            total = total + self.of_client(images)
            plain("sums of clients", done, len(self.images), "made again")
        if not torch.equal(total.words, self.sums.words):
            raise FedveilError(
                f"the images of {self.config.dataset} here are not those in the sums of "
                f"{self.path}, or its map gives others here; an audit of them would tell nothing: "
                "audit where the run was made"
            )


def _told(case: _Case, settings: SumsSettings, generator: torch.Generator) -> Iterator[Told]:
    clients = list(case.images.values())
    everybody = quantity(len(clients), "client")
    whole = _Held(everybody, True, case.sums, case.noise, Images.joined(clients))
    yield from _by_each_attack(case, whole, settings, generator)
    # Neither the client with the most images, which hide one another best, nor that with the least.
    middle = sorted(clients, key=len)[len(clients) // 2]
    if len(middle) >= 2:
        seen = not case.config.secure_aggregation
        sums = case.released(case.of_client(middle))
        alone = _Held("one client", seen, sums, case.noise_alone, middle)
        yield from _by_each_attack(case, alone, settings, generator)


@dataclass(frozen=True)
class _Held:
    """Sums that are attacked.

    Attributes:
        holder: Whose they are.
        seen: Whether the server of this run held them.
        sums: Themselves.
        noise: Standard deviation of the noise on their diagonal; 0 without.
        members: The images in them.
    """

    holder: str
    seen: bool
    sums: Statistics
    noise: float
    members: Images


def _by_each_attack(
    case: _Case, held: _Held, settings: SumsSettings, generator: torch.Generator
) -> Iterator[Told]:
    count = len(held.members)
    some = held.members[torch.randperm(count, generator=generator)[: settings.images]]
    asked = Images.joined([some, case.strangers])
    rows = case.rows(asked)[:, : case.dimension]
    tracing, public = Tracing(noise=held.noise), case.of_client(case.public)
    scores = {
        "leverage": Leverage()(held.sums, rows, asked.labels),
        "tracing": tracing(held.sums, rows, asked.labels, images=count, public=public),
    }
    if case.release is None:
        views = case.features.views
        scores["column"] = Column()(held.sums, rows, asked.labels, public=public, views=views)
    for attack, score in scores.items():
        roc = roc_of_one(score[: len(some)], score[len(some) :])
        yield Told(held.holder, attack, held.seen, count, roc)


def _rebuilt(
    case: _Case, settings: SumsSettings, generator: torch.Generator, plain: PlainLines
) -> Rebuilt | None:
    slow = slow_beneath(case.features) is not None
    most = min(settings.rebuilt, _SLOW_IMAGES) if slow else settings.rebuilt
    targets = list(_targets(case))[:most]
    if not targets:
        return None
    count = len(targets)
    plain("images of one client's class", 0, count, "rebuilt")
    sums = [case.released(case.of_client(case.images[target.client])) for target in targets]
    labels = torch.tensor([target.label for target in targets])
    single = torch.stack([one.moments[:, t.label] for one, t in zip(sums, targets, strict=True)])
    together = case.sums.moments[:, labels].T
    attack = FeatureInversion(starts=1, steps=_SLOW_STEPS) if slow else FeatureInversion()
    public = case.own.pixels
    found = attack(case.features, torch.cat([single, together]), public, generator)
    alone = found[:count]
    spanned = [place for place, target in enumerate(targets) if len(target.candidates) > 1]
    for place in spanned:
        alone[place] = SpanInversion()(
            case.features, [sums[place]], labels[[place]], alone[[place]], generator
        )[0]
    own = case.rows(case.own)[:, : case.dimension].double() * 2.0**-FRACTION_BITS
    near = (F.normalize(own, dim=1) @ F.normalize(single, dim=1).T).argmax(0)
    plain("images of one client's class", count, count, "rebuilt")
    candidates = tuple(target.candidates for target in targets)
    return Rebuilt(candidates, alone, found[count:], public[near])


@dataclass(frozen=True)
class _Target:
    """A class of one client of which an image is rebuilt.

    Attributes:
        client: Its partition.
        label: The class.
        candidates: The client's images of the class, float in [0, 1], [M, C, H, W].
    """

    client: int
    label: int
    candidates: Tensor


def _targets(case: _Case) -> Iterator[_Target]:
    """Yield of each class the client with the fewest images of it, single images first.

    Several cannot be told apart where noise or as many images as features fill the whole space.
    """
    found = []
    for label in range(case.classifier.classes):
        held = {client: images[images.labels == label] for client, images in case.images.items()}
        some = {
            client: own
            for client, own in held.items()
            if len(own) == 1 or (len(own) > 1 and _spans_a_part(case, client))
        }
        if some:
            client = min(some, key=lambda one: len(some[one]))
            found.append(_Target(client, label, some[client].pixels))
    yield from sorted(found, key=lambda target: len(target.candidates))


def _spans_a_part(case: _Case, client: int) -> bool:
    """Say whether a client's sums leave out some part of the space, which is worth searching."""
    if case.release is not None or slow_beneath(case.features) is not None:
        return False
    filled = case.features.views * len(case.images[client])
    return filled < case.dimension + case.classifier.classes


def _untold(
    case: _Case, strangers: int, settings: SumsSettings, rebuilt: Rebuilt | None
) -> Iterator[str]:
    if case.doubles:
        yield (
            f"Of the images said to be in no sum {case.doubles:,} are doubles of images that are, "
            "and were left out."
        )
    for rate in RATES:
        if strangers * rate < 1:
            yield (
                f"A false-positive rate of {rate:.1%} cannot be told from {strangers} images that "
                f"are in no sum: {round(1 / rate):,} are needed (--report-images of the run)."
            )
    if settings.rebuilt and rebuilt is None:
        yield (
            "No client is in the sums that has a single image of some class, and none whose images "
            "could be searched for in the span of its sums (fewer than features, no noise, no "
            "backbone), so no image was rebuilt; a client's sums tell the mean of its images of a "
            "class."
        )
    yield (
        "A server that chooses the map can choose one that singles an image out: "
        "docs/both-ways.md, Limits. What was tried here holds for the map of this run."
    )


def _mean_correlation(images: Tensor, candidates: Sequence[Tensor]) -> float:
    """Return the mean correlation with the nearest of what each image may be.

    A map that takes mirror images for alike cannot tell which of the two it was.
    """
    found = zip(images, candidates, strict=True)
    return fmean(float(_correlations(one, some).max()) for one, some in found)


def _correlations(image: Tensor, candidates: Tensor) -> Tensor:
    """Return the correlations of one image with several, or with these mirrored if that is more."""
    both = torch.cat([candidates, candidates.flip(3)]).flatten(1)
    one, others = (x - x.mean(-1, keepdim=True) for x in (image.flatten(), both))
    upright, mirrored = F.cosine_similarity(one[None], others).chunk(2)
    return torch.maximum(upright, mirrored)


def _picture(rebuilt: Rebuilt) -> bytes:
    from matplotlib.figure import Figure

    columns = (
        ("original", rebuilt.originals, None),
        ("from one\nclient's sums", rebuilt.alone, None),
        ("from the\nround's sums", rebuilt.together, None),
        ("nearest\npublic image", rebuilt.nearest, None),
    )
    count = len(rebuilt.candidates)
    figure = Figure(figsize=(6, 1.5 * count + 0.5), dpi=150, layout="constrained")
    grid = figure.subplots(count, len(columns), squeeze=False)
    draw_images(grid, columns, range(count), size=8)
    return png(figure)
