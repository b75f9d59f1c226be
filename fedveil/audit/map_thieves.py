"""Thieves of a run that sent a feature map alone: what it is worth beside a map of their own."""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from fedveil.attacks.theft import TheftObservation
from fedveil.audit.thieves import MOST_UNLABELLED, AuditedRun, Thief
from fedveil.data import Images
from fedveil.data.augmentation import Augmentation
from fedveil.errors import FedveilError
from fedveil.features import FeatureMap, blocks_of_features, project
from fedveil.types import Copy, Weights

ATTACKS_ON_MAPS = ("direct", "probe", "fine-tune", "cluster")
"""Names of the attacks that need no more than a head: a map has nothing else to be changed."""

_MOST_COMPONENTS = 512
_MOST_OWN = 1_000  # of a thief's images that a map is made of


@dataclass(frozen=True)
class ThroughMap:
    """What a thief sees through one map, where an image is its features.

    Attributes:
        observation: Its architecture is a linear layer, and its images are rows [N, D', 1, 1].
        report: The report images, seen so.
    """

    observation: TheftObservation
    report: Images

    def accuracy(self, weights: Weights) -> float:
        """Return the accuracy of a head on the report images."""
        with torch.inference_mode():
            named = self.observation.model(weights)(self.report.raw).argmax(1)
        return float((named == self.report.labels).double().mean())


class MapThieves:
    """Thieves who learn heads on the map that was sent, and on one that they could have alone.

    Alone, a thief makes a dictionary of its own images by the same options, and has a public
    backbone as well as those who were sent its name. The features of both are projected on their
    first 512 principal components on the thief's images. A network trained from nothing is open to
    both and is left out: the better of it and of each could only bring the two nearer.

    Args:
        run: Of strategy analytic.
        features: What its clients were sent.
    """

    def __init__(self, run: AuditedRun, features: FeatureMap) -> None:
        self.run = run
        self.features = features
        self._maps = lru_cache(maxsize=2)(self._made)

    def seen_by(self, thief: Thief) -> tuple[ThroughMap, ThroughMap]:
        """Return what a thief sees through the map that was sent, and through its own.

        Raises:
            FedveilError: No round had as many clients as collude, or they have one image.
        """
        clients, seed = self.run.clients(thief), self.run.own_seed(thief)
        sent, own = self._maps(clients, seed)
        # A map without a head holds nothing of what the thief wants to have.
        received = Copy(self.run.rounds[-1].round, clients[0], {})
        return self._seen(thief, sent, (received,)), self._seen(thief, own, ())

    def _made(self, clients: tuple[int, ...], seed: int) -> tuple["_Rows", "_Rows"]:
        index = torch.cat([self.run.shares[client] for client in clients]).sort().values
        if len(index) < 2:
            raise FedveilError(
                f"client {clients[0]} has 1 image, of which no map can be made: audit with another "
                "--seed, or more --colluders"
            )
        pixels = self.run.job.dataset.train.raw[index]
        some = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:_MOST_OWN]
        own = self.features.remade(pixels[some], seed=seed)
        reports = self._report, _features(own, self.run.report.raw)
        return (
            _rows(self.features, index, _features(self.features, pixels), reports[0], some),
            _rows(own, index, _features(own, pixels), reports[1], some),
        )

    @cached_property
    def _report(self) -> Tensor:
        return _features(self.features, self.run.report.raw)

    def _seen(self, thief: Thief, rows: "_Rows", copies: tuple[Copy, ...]) -> ThroughMap:
        labelled, unlabelled = self.run.images_of(thief)
        dataset, seed = self.run.job.dataset, self.run.own_seed(thief)
        observation = TheftObservation(
            architecture=_head(rows.report.shape[1], len(dataset.classes), seed),
            copies=copies,
            labelled=Images(rows.at(labelled), dataset.train.labels[labelled]),
            unlabelled=rows.at(unlabelled[:MOST_UNLABELLED]),
            noised=(),
            honest=lambda model, images: None,  # clients of such a run train nothing
            augmentation=Augmentation(),
            seed=seed,
        )
        return ThroughMap(observation, Images(rows.report, self.run.report.labels))


@dataclass(frozen=True)
class _Rows:
    """Images as one map shows them.

    Attributes:
        index: int64 [M], ascending: which training images a thief has.
        own: Float32 [M, D', 1, 1], these.
        report: Float32 [R, D', 1, 1], the report images.
    """

    index: Tensor
    own: Tensor
    report: Tensor

    def at(self, index: Tensor) -> Tensor:
        return self.own[torch.searchsorted(self.index, index)]


def _rows(features: FeatureMap, index: Tensor, own: Tensor, report: Tensor, some: Tensor) -> _Rows:
    count = min(_MOST_COMPONENTS, features.dimension, len(some) - 1)
    projected = project(features, own[some], count)
    own, report = (projected.of_inner(rows)[..., None, None] for rows in (own, report))
    scale = own.square().mean().sqrt().clamp(min=1e-12)
    return _Rows(index, own / scale, report / scale)


def _features(features: FeatureMap, pixels: Tensor) -> Tensor:
    """Return what images are told by, float32 [N, D]; of several views the first."""
    return torch.cat(
        [rows[:, : features.dimension] for rows in blocks_of_features(features, pixels)]
    )


def _head(inputs: int, classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        output = nn.Linear(inputs, classes)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), output=output))
