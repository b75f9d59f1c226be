"""Who steals in a theft audit, what they hold, and what is known that they do not."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedveil.analytic import AnalyticClassifier, load_classifier
from fedveil.attacks.theft import TheftObservation
from fedveil.data import Images, parse_partition
from fedveil.data.augmentation import Augmentation, parse_augmentation
from fedveil.data.partition import partition
from fedveil.errors import FedveilError
from fedveil.features import FeatureMap
from fedveil.federation.answers import pixels_of
from fedveil.federation.evaluation import count_correct
from fedveil.federation.job import Job
from fedveil.federation.question_images import question_images
from fedveil.federation.server_app import load_job
from fedveil.federation.task import ClientTask
from fedveil.federation.training import train_locally
from fedveil.models import build_model
from fedveil.runs.archive import Archive, Entry
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from fedveil.types import Weights
from fedveil.wording import quantity

_LATE = 5  # thieves come from the last fifth of the rounds: they hold the best copies
MOST_UNLABELLED = 2_000
"""Unlabelled images that a thief looks at."""
_WITHOUT_EFFECT = {"workers", "engine", "log"}  # on what clients were sent
_SHIFT = 14  # by two pixels of 28 or 32, none of 8


@dataclass(frozen=True)
class Thief:
    """A client, or several that collude, and what they do their theft with.

    Attributes:
        labels: Labelled images asked for, over all of them.
        colluders: How many clients they are.
        number: Which draw of clients and images, from 0.
    """

    labels: int
    colluders: int
    number: int

    def __str__(self) -> str:
        return f"labels-{self.labels}-colluders-{self.colluders}-thief-{self.number}"


@dataclass(frozen=True)
class SentRound:
    """What a round sent to whom.

    Attributes:
        round: The round, from 1.
        assignment: Client to the number of the copy it was sent.
        differing: Tensors in which the round's copies differ.
    """

    round: int
    assignment: Mapping[int, int]
    differing: frozenset[str]


class AuditedRun:
    """A run as its auditor knows it: the archive, the images, and the report images.

    Args:
        path: The run's directory.
        seed: Draws thieves and images.

    Raises:
        FedveilError: No run, or one without archive.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.directory = RunDirectory.open(path)
        self.config = self.directory.config
        self.seed = seed
        self.archive = Archive.open(path, self.directory.noise_key())

    @cached_property
    def job(self) -> Job:
        """Data and model of the run.

        Raises:
            FedveilError: The images here are not those that it was trained on.
        """
        job = load_job(self.config)
        self.directory.check_images(job.dataset.digest)
        return job

    @cached_property
    def rounds(self) -> tuple["SentRound", ...]:
        """What each round sent to whom, in order, without the weights: those may be gigabytes."""
        return tuple(
            SentRound(entry.round, entry.assignment, _differing(entry)) for entry in self.archive
        )

    @cached_property
    def feature_map(self) -> FeatureMap | None:
        """What clients of an analytic run were sent, by all of its archive; None of other runs.

        Raises:
            FedveilError: The archive holds something else than the map.
        """
        if not isinstance(self.job.model, AnalyticClassifier):
            return None
        features = load_classifier(self.directory.model()).features
        sent = features.sent()
        for entry in self.archive:
            for copy in entry.copies:
                if copy.keys() != sent.keys() or any(
                    not torch.equal(value, sent[name]) for name, value in copy.items()
                ):
                    raise FedveilError(
                        f"{self.directory.path}: round {entry.round} sent clients something else "
                        "than the feature map of w, which an analytic run never does; do not trust "
                        "this run"
                    )
        return features

    @property
    def sent(self) -> str:
        """What clients were sent, in words."""
        if self.feature_map is None:
            return "copies of a model"
        names = ", ".join(sorted(self.feature_map.sent())) or "its name"
        rounds = quantity(len(self.archive.rounds), "round")
        return f"a feature map ({names}) and nothing else, by the archive of {rounds}"

    @cached_property
    def shares(self) -> tuple[Tensor, ...]:
        """Indices of each client's training images."""
        return partition(
            self.job.dataset.train.labels,
            clients=self.config.clients,
            scheme=parse_partition(self.config.partition),
            seed=self.config.seed,
        )

    @cached_property
    def noised(self) -> tuple[str, ...]:
        """Parameters in which copies of one round ever differ: what the defence degrades."""
        found = {name for sent in self.rounds for name in sent.differing}
        return tuple(name for name, _ in self.job.model.named_parameters() if name in found)

    @property
    def identity(self) -> dict[str, object]:
        """What changes whenever the result of an audit may."""
        last = self.archive.folder / f"{self.archive.rounds[-1]:06d}.enc"
        return {
            "configuration": self.config.model_dump(exclude=_WITHOUT_EFFECT),
            "archive": sha256(last.read_bytes()).hexdigest()[:16],
            "seed": self.seed,
        }

    def is_same(self, identity: Mapping[str, Any]) -> bool:
        """Return whether ``identity`` is this run's and this seed's.

        One that an earlier release wrote lacks options that have come since; the run had their
        defaults.
        """
        try:
            config = TrainConfig.check(identity["configuration"])
        except (FedveilError, KeyError, TypeError, ValueError):
            return False
        then = {**identity, "configuration": config.model_dump(exclude=_WITHOUT_EFFECT)}
        return then == self.identity

    def clients(self, thief: Thief) -> tuple[int, ...]:
        """Draw the clients that steal: worst cases for the owner, met in one late round.

        The first one is drawn at random from a random round of the last fifth; of several, the
        second received, in that round, the copy that differs most from the first one's: the other
        sign, where there are two. The same number gives the same first clients, whatever
        ``colluders``.

        Raises:
            FedveilError: No late round had so many clients.
        """
        generator = random.Random(f"fedveil theft {self.seed} {thief.number}")
        sent = generator.choice(self.rounds[-max(1, len(self.rounds) // _LATE) :])
        order = generator.sample(sorted(sent.assignment), len(sent.assignment))
        if len(order) < thief.colluders:
            raise FedveilError(
                f"--colluders {thief.colluders} is too many: rounds of this run had {len(order)} "
                "clients; give at most as many"
            )
        first, *others = order
        # One with the most different copy comes next, the rest as drawn.
        apart = self._distances(sent.round, first)
        second = sorted(others, key=lambda client: -apart[client])[:1]
        rest = [client for client in others if client not in second]
        return tuple([first, *second, *rest][: thief.colluders])

    def _distances(self, number: int, client: int) -> dict[int, float]:
        """Return how far each client's copy of a round is from that of one client."""
        entry = self.archive.read(number)
        own = entry.received(client).weights
        apart = [
            sum(
                float((value.double() - own[name].double()).square().sum())
                for name, value in copy.items()
                if name in own and own[name].shape == value.shape
            )
            for copy in entry.copies
        ]
        return {other: apart[copy] for other, copy in entry.assignment.items()}

    def images_of(self, thief: Thief) -> tuple[Tensor, Tensor]:
        """Return which training images a thief has with their labels, and which without."""
        return self._images(thief, self.clients(thief))

    def own_seed(self, thief: Thief) -> int:
        """Return the seed of a thief's own randomness."""
        return random.Random(f"fedveil thief {self.seed} {thief.number}").randrange(2**31)

    def observation(self, thief: Thief) -> TheftObservation:
        """Return what a thief holds; report images are in nobody's share."""
        clients = self.clients(thief)
        labelled, unlabelled = self._images(thief, clients)
        train = self.job.dataset.train
        channels_height_width, classes = self.job.dataset.shape, len(self.job.dataset.classes)
        own_seed = self.own_seed(thief)
        met = [sent.round for sent in self.rounds if set(clients) & set(sent.assignment)]
        copies = [
            entry.received(client)
            for entry in map(self.archive.read, met)
            for client in clients
            if client in entry.assignment
        ]
        return TheftObservation(
            architecture=build_model(
                self.config.model, channels_height_width, classes, seed=own_seed
            ),
            copies=tuple(copies),
            labelled=train[labelled],
            unlabelled=torch.cat([train[unlabelled].pixels, *self._shared])[:MOST_UNLABELLED],
            noised=self.noised,
            honest=self._train_honestly,
            augmentation=self._augmentation(channels_height_width[2] // _SHIFT),
            seed=own_seed,
        )

    def _augmentation(self, shift: int) -> Augmentation:
        """Return what the training program does to images, which each client has, and shifts."""
        program = parse_augmentation(self.config.augment)
        return replace(program, crop=max(program.crop, shift))

    def delivered(self) -> Weights:
        """Return w as it is, or would be, delivered, which no thief ever sees.

        Raises:
            FedveilError: The run has no whole round.
        """
        checkpoint = self.directory.checkpoint()
        if checkpoint is None:
            raise FedveilError(
                f"{self.directory.path} has no finished round; go on with fedveil train --resume "
                f"{self.directory.path}"
            )
        return checkpoint.delivered

    def accuracy(self, weights: Weights) -> float:
        """Return the accuracy on the run's report images, as many as each round reports on."""
        report = self.report
        self.job.model.load_state_dict(dict(weights))
        return count_correct(self.job.model, report.pixels, report.labels) / len(report)

    @cached_property
    def report(self) -> Images:
        """The report images, as many as each round reports on."""
        images = self.job.evaluation.report[: self.config.report_images]
        return Images(images.pixels, images.labels)

    @cached_property
    def _shared(self) -> tuple[Tensor, ...]:
        """The server's own images, where the run sends them to its clients."""
        if self.config.strategy != "protected":
            return ()
        return (pixels_of(question_images(self.job)),)

    def _train_honestly(self, model: nn.Module, images: Images) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        train_locally(
            model,
            images,
            ClientTask.of(self.config, self.job.dataset).training,
            generator=generator,
        )

    def _images(self, thief: Thief, clients: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw labelled images from each client's share in turn; the others are unlabelled."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + thief.number)
        shares = [
            share[torch.randperm(len(share), generator=generator)]
            for share in (self.shares[client] for client in clients)
        ]
        longest = max(len(share) for share in shares)
        turns = torch.cat(
            [share[i : i + 1] for i in range(longest) for share in shares if i < len(share)]
        )
        labelled, others = turns[: thief.labels], turns[thief.labels :]
        return labelled, others


def _differing(entry: Entry) -> frozenset[str]:
    first, *others = entry.copies
    return frozenset(
        name
        for copy in others
        for name, value in copy.items()
        if name not in first or not torch.equal(value, first[name])
    )
