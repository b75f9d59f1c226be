"""Federated learning in which nothing that was learnt is ever sent to a client."""

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Unpack

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.analytic.privacy import noise_sharers
from fedveil.copies.noise import NoiseKey
from fedveil.data.augmentation import parse_augmentation
from fedveil.errors import FedveilError
from fedveil.federation.answers import (
    FRACTION_BITS,
    LARGEST_ASKED,
    MOST_IMAGES,
    QUESTIONS,
    QuestionTask,
    decoded,
    digest_of,
    fault,
    logits_of,
    pixels_of,
)
from fedveil.federation.distillation import Distillation, teach
from fedveil.federation.job import Job
from fedveil.federation.question_images import question_images
from fedveil.federation.replies import WEIGHT_KEY, Update, read_replies
from fedveil.federation.roster import Client, Refusal, Sampling, choose_unheard
from fedveil.federation.secagg.client import ANSWERS, WORDS
from fedveil.federation.secagg.server import Agreement
from fedveil.federation.strategies.fedavg import (
    Distribution,
    Resume,
    SeededFedAvg,
    Sends,
    clone,
)
from fedveil.federation.strategies.flower_arguments import FedAvgArguments
from fedveil.federation.task import UNLABELLED
from fedveil.federation.threads import torch_threads
from fedveil.federation.votes import VoteRelease, counted, shares, vote_fault
from fedveil.models.layout import memory_layout
from fedveil.runs.config import TrainConfig
from fedveil.types import Weights

_ANSWERS, _EXAMPLES, _HEARD, _NOISE = "answers", "examples", "heard", "noise"


@dataclass(frozen=True)
class _Summed:
    """Answers, added up.

    Attributes:
        words: int64 [N, K], in units of 2⁻²⁴.
        examples: What the probabilities in them weigh together.
        heard: Partitions of the clients in them, int64; in probabilities one as often as it was.
        noise: Standard deviation of the noise on each number of votes; 0 without.
    """

    words: Tensor
    examples: float
    heard: Tensor
    noise: float

    @classmethod
    def of(cls, memory: Weights) -> "_Summed":
        """Read what ``memory`` kept, or a run of an earlier release: a mean of models' answers."""
        examples = float(memory[_EXAMPLES])
        if _ANSWERS in memory:
            words = (memory[_ANSWERS].double() * (examples * 2.0**FRACTION_BITS)).round()
            return cls(words.to(torch.int64), examples, torch.zeros(0, dtype=torch.int64), 0.0)
        return cls(memory[WORDS], examples, memory[_HEARD], float(memory[_NOISE]))

    def memory(self) -> dict[str, Tensor]:
        numbers = {_EXAMPLES: self.examples, _NOISE: self.noise}
        told = {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
        return {WORDS: self.words, _HEARD: self.heard, **told}

    def __add__(self, other: "_Summed") -> "_Summed":
        return _Summed(
            self.words + other.words,
            self.examples + other.examples,
            torch.cat([self.heard, other.heard]).sort().values,
            math.hypot(self.noise, other.noise),
        )


class EnsembleDistillation(SeededFedAvg):
    """w learns from what clients' models answer; no model leaves anybody.

    Each client is sent the model of round 1 and the server's unlabelled images. It trains the model
    on its own images, and returns what it answers to the server's: class probabilities, as whole
    numbers, or votes with noise. The server trains w to give the mean of all that was returned so
    far. w, and all that is made of it, stays on the server, so a client receives nothing it could
    not have drawn itself: there is nothing to steal, by any attack or number of colluders. With
    ``secure`` the server learns the clients' sum alone, and w is the same to the bit.

    The price is paid in accuracy, where a client's own images teach little (many classes, few
    images, one class a client). ``shared_rounds`` buys some of it back: after that many rounds of
    plain averaging clients start from what those gave, and that much can be stolen.

    Clients answer messages of type ``train.answers``: a Flower app registers
    ``fedveil.federation.answering(train, Net)`` for it.

    Source: Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning",
    NeurIPS 2020, Algorithm 1, without its sending models either way; with every client asked once,
    Guha et al., "One-Shot Federated Learning", 2019. That clients answer instead is FedMD's (Li and
    Wang, 2019), which sends the mean of the answers back.

    Args:
        model: Architecture of w.
        unlabelled: The server's images, [N, C, H, W], at least one: uint8, or floats as the model
            takes them. They are left as they are, and sent to clients.
        labels: Their classes, int64 [N]; needed where ``distillation.label_share`` is above 0.
        distillation: How w is taught.
        release: The differential privacy of clients' votes, which each is then asked for once; None
            for probabilities.
        share_unlabelled: Whether clients that lack a class train on ``unlabelled``, too. One that
            has images of a few classes only can then learn what sets them apart from the others.
        shared_rounds: Rounds of plain federated averaging at the start; not below 0.
        sampling: How each round chooses its clients.
        resume: Where an earlier process of the same run stopped.
        flower: FedAvg's own arguments, by their names.

    Raises:
        FedveilError: Labels are to count, and there are none; more images than a client answers;
            models are to be shared that votes hide; or FedAvg's arguments, as of ``SeededFedAvg``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        unlabelled: Tensor,
        labels: Tensor | None = None,
        distillation: Distillation | None = None,
        release: VoteRelease | None = None,
        share_unlabelled: bool = False,
        shared_rounds: int = 0,
        sampling: Sampling | None = None,
        resume: Resume | None = None,
        **flower: Unpack[FedAvgArguments],
    ) -> None:
        super().__init__(sampling=sampling, resume=resume, **flower)
        self.distillation = distillation or Distillation()
        if self.distillation.label_share and labels is None:
            raise FedveilError(
                f"label_share is {self.distillation.label_share}, and labels= is not given: give "
                "the classes of unlabelled=, int64 [N], or a label_share of 0"
            )
        if not 0 < len(unlabelled) <= LARGEST_ASKED:
            raise FedveilError(
                f"unlabelled= holds {len(unlabelled)} images; clients answer 1 to {LARGEST_ASKED}"
            )
        if release is not None and shared_rounds:
            raise FedveilError(
                "shared_rounds send models that no noise of votes is in: leave out either"
            )
        # A copy, because it takes on many weights.
        self.model = deepcopy(model)
        self._untrained: Weights = clone(model.state_dict())
        self.unlabelled = unlabelled
        self.share_unlabelled = share_unlabelled
        self.labels = labels
        self.release = release
        self.shared_rounds = shared_rounds
        # Floats are the caller's own, and what the model takes as they are.
        pixels = pixels_of(unlabelled)
        layout = memory_layout(self.model, pixels[:1])
        self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self._pixels = pixels.contiguous(memory_format=layout)
        self._delivered: Weights | None = None
        self._answered = False
        self._summed: _Summed | None = None

    @classmethod
    def release_of(cls, config: TrainConfig) -> VoteRelease | None:
        """Return what a client's answers are noised by, as of ``SeededFedAvg``."""
        return None if config.epsilon is None else VoteRelease(config.epsilon, config.delta)

    @classmethod
    def of_run(cls, job: Job, resume: Resume, key: NoiseKey) -> "EnsembleDistillation":
        """Return the strategy of a run, as of ``SeededFedAvg``."""
        config = job.config
        return cls(
            model=job.model,
            unlabelled=question_images(job),
            distillation=Distillation(
                steps=config.distillation_steps,
                label_share=config.label_share,
                temperature=config.answer_temperature,
                augmentation=parse_augmentation(config.augment),
            ),
            labels=job.evaluation.calibration.labels if config.label_share else None,
            release=cls.release_of(config),
            share_unlabelled=config.share_unlabelled,
            shared_rounds=config.shared_rounds,
            sampling=job.sampling,
            resume=resume,
        )

    def server_alone(self, rounds: int) -> Weights | None:
        """Return w taught by the labels alone: what a ``label_share`` of 1 would have given."""
        if self.labels is None or not self.distillation.label_share:
            return None
        known = F.one_hot(self.labels, self.classes).float()
        weights = self._untrained
        for number in range(self.shared_rounds + 1, rounds + 1):
            weights = self._taught(weights, known, number)
        return weights

    @property
    def sends(self) -> Sends:
        """What clients receive: after shared rounds, what these have learnt."""
        return "model" if self.shared_rounds else "untrained"

    @cached_property
    def classes(self) -> int:
        """K."""
        return logits_of(self.model, self.model.state_dict(), self._pixels[:1]).shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the images that clients are asked about."""
        return digest_of(self.unlabelled)

    def choose(self, round_number: int) -> list[Client]:
        """Return the clients of a round; of those that vote, none that voted in another one.

        Raises:
            FedveilError: All have voted.
        """
        if self.release is None:
            return super().choose(round_number)
        heard = set(self._past.heard.tolist())
        return choose_unheard(self.clients, heard, self.sampling, round_number)

    def distribute(
        self, round_number: int, weights: Weights, clients: Sequence[Client]
    ) -> Distribution:
        """Send the untrained model, or what the shared rounds made of it; ``weights`` is w."""
        self._delivered = weights
        self._answered = round_number > self.shared_rounds
        if round_number <= self.shared_rounds + 1:
            self.state = replace(self.state, base=clone(weights))
        assert self.state.base is not None
        return super().distribute(round_number, self.state.base, clients)

    def attachments(self) -> dict[str, ArrayRecord | ConfigRecord]:
        """Return the server's images, and what is asked about them."""
        images = ArrayRecord({"images": self.unlabelled})
        if not self._answered:
            return {UNLABELLED: images} if self.share_unlabelled else {}
        return {UNLABELLED: images, QUESTIONS: self.question(self.digest).to_record()}

    def question(self, digest: str) -> QuestionTask:
        """Return what is asked about images of a digest."""
        bound = self._weight_bound() if self.weighted_by_key == WEIGHT_KEY else None
        return QuestionTask(
            sha256=digest,
            classes=self.classes,
            weight=self.weighted_by_key,
            most=bound,
            temperature=self.distillation.temperature,
            learn=self.share_unlabelled,
            epsilon=self.release.epsilon if self.release else None,
            delta=self.release.delta if self.release else 1e-5,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the clients of the round, and ask them."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if self._answered:
            for message in messages:
                message.metadata.message_type = f"train.{ANSWERS}"
        return messages

    def _usable(
        self, replies: Iterable[Message], sent: Distribution, round_number: int
    ) -> tuple[list[Update], list[Refusal]]:
        if not self._answered:
            return super()._usable(replies, sent, round_number)
        self._summed = None
        if self._agreement:
            updates, refusals = self._sum(self._agreement, replies, round_number)
            return updates, [_advised(refusal) for refusal in refusals]
        updates, refusals = read_replies(
            replies,
            asked={client.node: client for client, _ in sent.assignment},
            expected={WORDS: torch.zeros(self._length, dtype=torch.int64)},
            round_number=round_number,
            weight=self.weighted_by_key,
        )
        faults = {update.client.node: self._fault(self._of(update)) for update in updates}
        refusals += [Refusal(node, found) for node, found in faults.items() if found]
        usable = [update for update in updates if not faults[update.client.node]]
        return usable, [_advised(refusal) for refusal in refusals]

    @property
    def _length(self) -> int:
        return len(self.unlabelled) * self.classes

    def _sum(
        self, agreement: Agreement, replies: Iterable[Message], round_number: int
    ) -> tuple[list[Update], list[Refusal]]:
        clients = agreement.code.clients
        if agreement.images > MOST_IMAGES:
            raise FedveilError(
                f"round {round_number}: its clients have {agreement.images} images; no more than "
                f"{MOST_IMAGES} fit a sum"
            )
        least = noise_sharers(clients) if self.release else 0
        words, updates, refusals = agreement.total(replies, self._length, least_clients=least)
        examples = sum(min(update.examples, agreement.most) for update in updates)
        self._summed = self._with_noise(words, examples, updates, clients)
        if found := self._fault(self._summed):
            raise FedveilError(
                f"round {round_number}: {found}, so a client of it lied; under secure aggregation "
                "nobody can tell which: choose other clients (--seed), or train without it"
            )
        return updates, refusals

    def _with_noise(
        self, words: Tensor, examples: float, updates: Sequence[Update], asked: int | None
    ) -> "_Summed":
        count, questions = len(updates), len(self.unlabelled)
        heard = sorted(update.client.partition for update in updates)
        noise = self.release.noise(questions, clients=count, asked=asked) if self.release else 0.0
        answers = words.view(questions, self.classes)
        return _Summed(answers, float(examples), torch.tensor(heard), noise)

    def _of(self, update: Update) -> "_Summed":
        return self._with_noise(update.weights[WORDS], update.examples, [update], None)

    def _fault(self, summed: "_Summed") -> str | None:
        clients = len(summed.heard)
        if self.release is None:
            return fault(summed.words, weight=summed.examples, clients=clients)
        return vote_fault(summed.words, clients=clients, noise=summed.noise)

    def combine(self, round_number: int, sent: Distribution, updates: Sequence[Update]) -> Weights:
        """Return w after it has learnt from the round's answers.

        Args:
            round_number: The round.
            sent: What it sent.
            updates: Who answered; without ``secure`` with what, int64 [N·K] as ``WORDS``.
        """
        assert self._delivered is not None
        if round_number <= self.shared_rounds:
            return super().combine(round_number, sent, updates)
        new = self._summed or sum((self._counted(update) for update in updates), self._nothing)
        now = self._past + new
        if now.examples > MOST_IMAGES:
            raise FedveilError(f"the answers are of {now.examples:g} images; {MOST_IMAGES} fit")
        self.state = replace(self.state, memory=now.memory())
        return self._taught(self._delivered, self._targets(now), round_number)

    def _counted(self, update: Update) -> "_Summed":
        """Return a client's answers, of which no more count than the round allows."""
        told = self._of(update)
        claimed = float(update.metrics.get(self.weighted_by_key, update.examples))  # type: ignore[arg-type]
        if self.release or update.examples == claimed:
            return told
        words = told.words.double() * (update.examples / claimed)
        return replace(told, words=words.round().to(torch.int64))

    @property
    def _nothing(self) -> "_Summed":
        words = torch.zeros(len(self.unlabelled), self.classes, dtype=torch.int64)
        return _Summed(words, 0.0, torch.zeros(0, dtype=torch.int64), 0.0)

    @property
    def _past(self) -> "_Summed":
        return _Summed.of(self.state.memory) if self.state.memory else self._nothing

    @property
    def outcome(self) -> "_Summed":
        """All answers so far."""
        return self._past

    def _targets(self, answered: "_Summed") -> Tensor:
        """Return the class probabilities that w is to give the server's images, float32 [N, K]."""
        if self.release is None:
            answers = decoded(answered.words, answered.examples).float()
        else:
            answers = shares(counted(answered.words), len(answered.heard)).float()
        if self.labels is None:
            return answers
        known = F.one_hot(self.labels, answers.shape[1]).to(answers)
        return torch.lerp(answers, known, self.distillation.label_share)

    def _taught(self, start: Weights, targets: Tensor, round_number: int) -> Weights:
        generator = torch.Generator().manual_seed(1_000_003 * self.sampling.seed + round_number)
        self.model.load_state_dict(dict(start))
        # Steps of a few images are faster on one thread, and w then depends on no number of them.
        with torch_threads(1), torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())  # dropout draws the same for the same seed
            teach(self.model, self._pixels, targets, self.distillation, generator)
        return clone({name: value.detach() for name, value in self.model.state_dict().items()})


def _advised(refusal: Refusal) -> Refusal:
    """Say to an app of earlier releases what it lacks."""
    if "No train function registered" not in refusal.reason:  # Flower's own words
        return refusal
    advice = "its app must register fedveil.federation.answering(train, Net) for answers"
    return replace(refusal, reason=f"{refusal.reason}; {advice}")
