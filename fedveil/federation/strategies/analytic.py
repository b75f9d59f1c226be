"""Federated learning in closed form: nothing learnt goes down, nothing of one client goes up."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Unpack

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedveil.analytic import (
    FRACTION_BITS,
    MOST_IMAGES,
    AnalyticClassifier,
    Layout,
    Statistics,
    balanced,
    ridge,
    rows_of,
    steepness_for,
)
from fedveil.analytic.privacy import GaussianRelease, noise_sharers, noisy_fault
from fedveil.analytic.ridge import Head, noisy_ridge
from fedveil.copies.noise import NoiseKey
from fedveil.data import Dataset, Images
from fedveil.defenses import parse_defense
from fedveil.errors import FedveilError
from fedveil.features import MapDescription
from fedveil.federation.feature_choice import choose_features
from fedveil.federation.gains import Gain, gain_of
from fedveil.federation.job import Evaluation, Job, smallest_sum
from fedveil.federation.replies import Update, read_replies
from fedveil.federation.roster import Client, Refusal, Sampling, choose_unheard
from fedveil.federation.secagg.client import STATISTICS, WORDS
from fedveil.federation.statistics import (
    ASKED,
    FEATURES,
    LEAST_RATIO,
    StatisticsTask,
    least_images,
)
from fedveil.federation.strategies.fedavg import Distribution, Resume, SeededFedAvg, Sends
from fedveil.federation.strategies.flower_arguments import FedAvgArguments
from fedveil.runs.config import TrainConfig
from fedveil.types import Weights

_HEARD, _IMAGES, _NOISE = "heard", "images", "noise"
_FEWEST_ALONE = 2  # of which there is a ridge
_WAVE_BYTES = 2**29  # of answers that are held at once


@dataclass(frozen=True)
class Solved:
    """What a round's sums came to.

    Attributes:
        images: Images in all sums so far.
        clients: Clients in them.
        head: The ridge.
        noise: Standard deviation of the noise on G's diagonal and on H; 0 without.
    """

    images: int
    clients: int
    head: Head
    noise: float


@dataclass(frozen=True)
class _Past:
    """All sums so far.

    Attributes:
        sums: Added up.
        heard: Partitions of the clients in them, int64, in order.
        images: How many images they have.
        noise: Standard deviation of the noise on their diagonal.
    """

    sums: Statistics
    heard: Tensor
    images: int
    noise: float

    @classmethod
    def of(cls, layout: Layout, memory: Weights) -> "_Past":
        images, noise = (memory[name].item() for name in (_IMAGES, _NOISE))
        return cls(Statistics(layout, memory[WORDS]), memory[_HEARD], int(images), float(noise))

    def memory(self) -> dict[str, Tensor]:
        return {
            WORDS: self.sums.words,
            _HEARD: self.heard,
            _IMAGES: torch.tensor(self.images),
            _NOISE: torch.tensor(self.noise, dtype=torch.float64),
        }


def summed_so_far(layout: Layout, memory: Weights) -> tuple[Statistics, tuple[int, ...], float]:
    """Return the sums that an analytic run holds, the clients in them, and the noise's deviation.

    Args:
        layout: D and K.
        memory: ``State.memory`` of the run's checkpoint.
    """
    past = _Past.of(layout, memory)
    return past.sums, tuple(past.heard.tolist()), past.noise


class Analytic(SeededFedAvg):
    """Clients return sums over their features; the server solves for the classifier.

    Every client is sent a feature map that nothing secret is in, and asked once: a round chooses
    among those that are not in the sums yet. What they return are whole numbers, so that w is the
    same, to the bit, however the images are shared out among how many clients, and whoever leaves
    is subtracted exactly. With ``secure`` the server learns their sum alone. Clients receive
    nothing that was learnt, so there is nothing to steal, by any attack or number of colluders.

    The price: w is linear in the features, which must suit the task.

    Source: Fanì et al., "Accelerating Heterogeneous Federated Learning with Closed-form
    Classifiers", ICML 2024, section 4; He et al., "AFL: A Single-Round Analytic Approach for
    Federated Learning with Pre-trained Models", CVPR 2025. Integers, the penalty's choice and the
    rule about a sum's size are not theirs.

    Args:
        model: The classifier with the map; its head is replaced by what is found.
        labelled: Images of the server by which scores are made probabilities, and which count
            beside noisy sums; None leaves both.
        images_per_feature: Images a feature that a sum under secure aggregation must have; at
            least 4, below which no client answers. Of no matter with a ``release``.
        balanced: Whether every class is as likely, however few images it has; not with a
            ``release``, which tells nobody how many these are.
        release: The differential privacy of the sums; None for none. Of an answer that the server
            sees alone, and of a sum, as long as half of the clients it was asked of are in it and
            add their noise.
        sampling: How each round chooses its clients.
        resume: Where an earlier process of the same run stopped; ``model`` must then have the map
            of that process.
        flower: FedAvg's own arguments, by their names.

    Raises:
        FedveilError: ``images_per_feature`` out of range; balanced and noisy; or FedAvg's
            arguments, as of ``SeededFedAvg``.

    Attributes:
        solved: What the last round came to; None before there was one.
    """

    def __init__(
        self,
        *,
        model: AnalyticClassifier,
        labelled: Images | None = None,
        images_per_feature: float = LEAST_RATIO,
        balanced: bool = False,
        release: GaussianRelease | None = None,
        sampling: Sampling | None = None,
        resume: Resume | None = None,
        **flower: Unpack[FedAvgArguments],
    ) -> None:
        super().__init__(sampling=sampling, resume=resume, **flower)
        if images_per_feature < LEAST_RATIO:
            raise FedveilError(
                f"images_per_feature={images_per_feature:g} is out of range: give at least "
                f"{LEAST_RATIO:g}, below which a sum shows who is in it and no client answers"
            )
        self.model = model
        self.labelled = labelled
        self.images_per_feature = images_per_feature
        if balanced and release is not None:
            raise FedveilError(
                "balanced classes take each one's number of images, which noisy sums do not tell: "
                "leave out balanced= or release="
            )
        self.balanced = balanced
        self.release = release
        self.layout = Layout(model.features.dimension, model.classes)
        self.solved: Solved | None = None
        self._untrained = {name: value.clone() for name, value in model.state_dict().items()}
        for name in ("weight", "bias"):
            self._untrained[name].zero_()
        self._sums, self._noise = Statistics.nothing(self.layout), 0.0
        self._later: Iterator[Message] = iter(())

    @classmethod
    def architecture(cls, config: TrainConfig, dataset: Dataset, split: Evaluation) -> nn.Module:
        """Return a classifier on the features that the settings name, as of ``SeededFedAvg``."""
        if parse_defense(config.defense).names:
            raise FedveilError(
                f"defense {config.defense} is for clients that train, and those of strategy "
                "analytic return sums over their images: leave it out; what hides them is secure "
                "aggregation, which is on by default, and --epsilon"
            )
        images = smallest_sum(config, dataset)
        features = choose_features(config, split.calibration, images=images)
        return AnalyticClassifier(features, len(dataset.classes))

    @classmethod
    def release_of(cls, config: TrainConfig) -> GaussianRelease | None:
        """Return what a client's sums are noised by, as of ``SeededFedAvg``."""
        if config.epsilon is None:
            return None
        return GaussianRelease(config.epsilon, config.delta, config.privacy_unit)

    @classmethod
    def of_run(cls, job: Job, resume: Resume, key: NoiseKey) -> "Analytic":
        """Return the strategy of a run, as of ``SeededFedAvg``."""
        assert isinstance(job.model, AnalyticClassifier)
        return cls(
            model=job.model,
            labelled=job.evaluation.calibration,
            images_per_feature=job.config.images_per_feature,
            balanced=job.config.balanced,
            release=cls.release_of(job.config),
            sampling=job.sampling,
            resume=resume,
        )

    def server_alone(self, rounds: int) -> Weights | None:
        """Return the ridge of the server's images on the same map, where they count in w.

        Without noise they do not: no more than the steepness of its scores hangs on them.
        """
        if self.release is None or self.labelled is None or len(self.labelled) < _FEWEST_ALONE:
            return None
        own = self._own_sums(slice(None))
        return self.model.with_head(ridge(own, views=self.model.features.views))

    @property
    def sends(self) -> Sends:
        """What clients receive: a map, and nothing that was learnt of their labels."""
        return "untrained"

    @property
    def least_images(self) -> int:
        """Of how many images a sum must be under secure aggregation."""
        if self.release:
            return 1
        return least_images(self.images_per_feature, self.layout.dimension)

    def choose(self, round_number: int) -> list[Client]:
        """Return clients that are in no sum yet, as many as ``fraction`` is of all.

        Raises:
            FedveilError: There are none.
        """
        heard = set(self._past.heard.tolist())
        return choose_unheard(self.clients, heard, self.sampling, round_number)

    def distribute(
        self, round_number: int, weights: Weights, clients: Sequence[Client]
    ) -> Distribution:
        """Send the map to everybody; ``weights`` is w, which goes to nobody."""
        return super().distribute(round_number, self.model.features.sent(), clients)

    def received(self, sent: Distribution) -> tuple[Weights, ...]:
        """Return the map without a head: all that any client has."""
        return (self._untrained,)

    def attachments(self) -> Mapping[str, ArrayRecord | ConfigRecord]:
        """Return the map's description, and what is asked."""
        asked = StatisticsTask(
            classes=self.layout.classes,
            most_images=self._weight_bound(),
            images_per_feature=self.images_per_feature,
            epsilon=self.release.epsilon if self.release else None,
            delta=self.release.delta if self.release else 1e-5,
            unit=self.release.unit if self.release else "image",
        )
        described = MapDescription.of(self.model.features).to_record()
        return {FEATURES: described, ASKED: asked.to_record()}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address the round's clients, no more of them at once than memory holds answers of."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.metadata.message_type = f"train.{STATISTICS}"
        wave = max(1, _WAVE_BYTES // (8 * self.layout.length))
        waves = [messages[start : start + wave] for start in range(0, len(messages), wave)]
        timeout = self.sampling.timeout
        self._later = chain.from_iterable(
            grid.send_and_receive(some, timeout=timeout) for some in waves[1:]
        )
        return waves[0]

    def _usable(
        self, replies: Iterable[Message], sent: Distribution, round_number: int
    ) -> tuple[list[Update], list[Refusal]]:
        answers = chain(replies, self._later)
        if self._agreement:
            clients = self._agreement.code.clients
            words, updates, refusals = self._agreement.total(
                answers,
                self.layout.length,
                least_images=self.least_images,
                least_clients=noise_sharers(clients) if self.release else 0,
            )
            self._sums = Statistics(self.layout, words)
            images = sum(int(update.examples) for update in updates)
            self._noise = self._scale * math.sqrt(len(updates) / noise_sharers(clients))
            if fault := self._impossible(self._sums, images, self._noise):
                raise FedveilError(
                    f"round {round_number}: {fault}, so a client of it lied; under secure "
                    "aggregation nobody can tell which: choose other clients (--seed), or train "
                    "without it"
                )
            return updates, refusals
        asked = {client.node: client for client, _ in sent.assignment}
        return self._seen(answers, asked, round_number)

    def _seen(
        self, answers: Iterable[Message], asked: Mapping[int, Client], round_number: int
    ) -> tuple[list[Update], list[Refusal]]:
        """Add the answers that can be sums of what they are said to be of, as they come."""
        expected = {WORDS: torch.zeros((), dtype=torch.int64).expand(self.layout.length)}
        sums, most = Statistics.nothing(self.layout), self._weight_bound()
        added: dict[int, Update] = {}
        refusals: list[Refusal] = []
        for answer in answers:
            updates, refused = read_replies(
                [answer], asked=asked, expected=expected, round_number=round_number
            )
            refusals += refused
            for update in updates:
                node, statistics = (
                    update.client.node,
                    Statistics(self.layout, update.weights[WORDS]),
                )
                if fault := self._fault(update, statistics, most, twice=node in added):
                    refusals.append(Refusal(node, fault))
                    continue
                sums = sums + statistics
                added[node] = replace(update, weights={}, content=None)
        self._sums = sums
        self._noise = self._scale * math.sqrt(len(added))
        return sorted(added.values(), key=lambda update: update.client.partition), refusals

    def _fault(
        self, update: Update, statistics: Statistics, most: int | None, *, twice: bool
    ) -> str | None:
        if twice:
            return "it answered twice"
        if most is not None and update.examples > most:
            return f"it summed {update.examples} images, and was asked for {most} at most"
        return self._impossible(statistics, int(update.examples), self._scale)

    def _impossible(self, sums: Statistics, images: int, noise: float) -> str | None:
        if self.release is None:
            return sums.fault(images=images)
        return noisy_fault(sums, images=images, scale=noise)

    @property
    def _scale(self) -> float:
        """Standard deviation of the noise that is enough; 0 without."""
        return self.release.scale(self._weight_bound() or 1) if self.release else 0.0

    def combine(self, round_number: int, sent: Distribution, updates: Sequence[Update]) -> Weights:
        """Return w of all sums so far."""
        past = self._past
        sums = past.sums + self._sums
        images = past.images + sum(int(update.examples) for update in updates)
        if images > MOST_IMAGES:
            raise FedveilError(f"the sums hold {images} images; no more than {MOST_IMAGES} fit")
        new = torch.tensor([update.client.partition for update in updates], dtype=torch.int64)
        now = _Past(
            sums,
            torch.cat([past.heard, new]).sort().values,
            images,
            math.hypot(past.noise, self._noise),
        )
        self.state = replace(self.state, memory=now.memory())
        head = self._solve(now)
        self.solved = Solved(images, len(now.heard), head, now.noise)
        return self.model.with_head(head, steepness=self._steepness(head))

    def _solve(self, past: "_Past") -> Head:
        if self.release is None:
            head = ridge(past.sums, views=self.model.features.views)
            return balanced(head, past.sums) if self.balanced else head
        return self._noisy(past, slice(None))

    def _noisy(self, past: "_Past", own: slice) -> Head:
        """Return the ridge of noisy sums, and of some of the server's own images."""
        public = None if self.labelled is None else self._own_sums(own)
        return noisy_ridge(past.sums, noise=past.noise, images=past.images, public=public)

    def _own_sums(self, own: slice) -> Statistics:
        assert self.labelled is not None
        some, layout = (self._own_rows[own], self.labelled.labels[own]), self.layout
        return Statistics.of(*some, classes=layout.classes, dimension=layout.dimension)

    @cached_property
    def _own_rows(self) -> Tensor:
        assert self.labelled is not None
        return rows_of(self.model.features, self.labelled.raw)

    @property
    def _past(self) -> "_Past":
        memory = self.state.memory
        if memory:
            return _Past.of(self.layout, memory)
        nobody = torch.zeros(0, dtype=torch.int64)
        return _Past(Statistics.nothing(self.layout), nobody, 0, 0.0)

    @property
    def outcome(self) -> Solved:
        """What all sums so far come to; those of an earlier process are solved anew.

        Raises:
            FedveilError: There are none.
        """
        if self.solved is None:
            past = self._past
            self.solved = Solved(past.images, len(past.heard), self._solve(past), past.noise)
        return self.solved

    def balanced_gain(self) -> Gain | None:
        """Return what equally likely classes would gain on the server's images, as told by them.

        None where that was asked for, or cannot be told.
        """
        if self.balanced or self.release is not None or not self.labelled:
            return None
        plain = self.outcome.head
        right = (
            self._scores(head, slice(None)).argmax(1) == self.labelled.labels
            for head in (balanced(plain, self._past.sums), plain)
        )
        return gain_of(*right)

    def _steepness(self, head: Head) -> float:
        if self.labelled is None or not len(self.labelled):
            return 1.0
        if self.release is None:
            return steepness_for(self._scores(head, slice(None)), self.labelled.labels)
        # Each half is told by a head that the other half is in: the whole one knows them by heart.
        halves, labels = (slice(0, None, 2), slice(1, None, 2)), self.labelled.labels
        told = [
            (self._scores(self._noisy(self._past, one), other), labels[other])
            for one, other in (halves, halves[::-1])
        ]
        return steepness_for(*(torch.cat(some) for some in zip(*told, strict=True)))

    def _scores(self, head: Head, own: slice) -> Tensor:
        rows = self._own_rows[own, : self.layout.dimension].double() * 2.0**-FRACTION_BITS
        return rows @ head.weight.T + head.bias
