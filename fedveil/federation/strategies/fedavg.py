"""Federated averaging with a seeded choice of clients; what the noise strategies build on."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from logging import INFO, WARNING
from typing import ClassVar, Literal, Unpack

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedveil.analytic.privacy import NoisyRelease
from fedveil.copies.batch_statistics import reestimate_batch_norm
from fedveil.copies.fingerprint import Fingerprint
from fedveil.copies.noise import NoiseKey
from fedveil.data import Dataset
from fedveil.errors import FedveilError
from fedveil.federation.acceptance import (
    Acceptance,
    bounded,
    claim_bound,
    coordinate_median,
    refuse_large,
    trimmed_mean,
    weight_bound,
)
from fedveil.federation.job import Evaluation, Job
from fedveil.federation.replies import WEIGHT_KEY, Update, read_replies
from fedveil.federation.roster import Client, Refusal, Sampling, query_roster, sample_clients
from fedveil.federation.secagg.server import Agreement, SecureAggregation
from fedveil.federation.strategies.flower_arguments import (
    ARRAYS,
    CONFIG,
    NO_CLIENT_EVALUATION,
    FedAvgArguments,
    aggregated,
    read_arguments,
)
from fedveil.models import build_model, has_batch_norm
from fedveil.runs.archive import Archive, Entry
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import StrategyState
from fedveil.types import Weights
from fedveil.wording import quantity

_STATISTICS_IMAGES = 500

Sends = Literal["model", "capped", "untrained"]
"""What a strategy sends its clients: the model, copies under a cap, or nothing that was learnt."""


@dataclass(frozen=True)
class Distribution:
    """What one round sends to whom.

    Attributes:
        copies: The distinct models that leave the server.
        assignment: Which of them each client receives, an index into ``copies``.
        sigma: Strength of the noise in them; 0 where there is none.
        evaluations: Evaluations of copies that finding σ took.
        images: Images those evaluations took.
        seconds: Time it took to make the copies.
        shared: The same before each client's fingerprint was added; ``None`` where none was.
    """

    copies: tuple[Weights, ...]
    assignment: tuple[tuple[Client, int], ...]
    sigma: float = 0.0
    evaluations: int = 0
    images: int = 0
    seconds: float = 0.0
    shared: "Distribution | None" = None


@dataclass(frozen=True)
class Resume:
    """Where an earlier process of the same run stopped.

    Attributes:
        rounds: Rounds it completed; round numbers go on from there.
        state: What its strategy left.
    """

    rounds: int = 0
    state: StrategyState = field(default_factory=StrategyState)


class SeededFedAvg(FedAvg):
    """Flower's FedAvg with clients sampled by seed, checked replies, and rounds that can resume.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", AISTATS 2017, Algorithm 1.

    Args:
        sampling: How each round chooses its clients.
        resume: Where an earlier process of the same run stopped.
        statistics: Measures a model's batch statistics anew; None keeps the mean of the clients'.
        flower: FedAvg's own arguments, by their names.

    Raises:
        TypeError: An argument that is none of FedAvg's.
        FedveilError: One of FedAvg's arguments is out of range.

    Attributes:
        archive: Where each round is written down before its models leave; ``None``: nowhere.
        fingerprint: What tells each client's copy from the others'; ``None``: nothing.
        acceptance: Which answers are averaged, and how; may be set before the first round.
        started: Told of every round and its clients before anything is sent to them.
        secure: How the server learns the sum of the clients' changes and none of them; ``None``:
            it sees each. Acceptance, which needs to see each, is left out then.
    """

    acceptance = Acceptance()

    keeps_cap: ClassVar[bool] = False
    """Whether no copy that leaves the server passes an accuracy cap."""

    fingerprints: ClassVar[bool] = False
    """Whether each client's copy is marked as its own unless asked otherwise."""

    def __init__(
        self,
        *,
        sampling: Sampling | None = None,
        resume: Resume | None = None,
        statistics: Callable[[Weights], Weights] | None = None,
        **flower: Unpack[FedAvgArguments],
    ) -> None:
        asked = read_arguments(flower, sampling)
        self.sampling = asked.sampling
        super().__init__(
            fraction_train=self.sampling.fraction,
            min_train_nodes=self.sampling.min_train,
            min_available_nodes=self.sampling.min_clients,
            min_evaluate_nodes=0,
            weighted_by_key=asked.weight,
            arrayrecord_key=asked.arrays,
            configrecord_key=asked.config,
        )
        # Evaluation is the server's: no client is ever sent a model just to be evaluated.
        self.fraction_evaluate = 0.0
        self._aggregate = asked.aggregate
        self._evaluation_asked = asked.evaluation
        resume = resume or Resume()
        self.completed_rounds = resume.rounds
        self.state = resume.state
        self.archive: Archive | None = None
        self.fingerprint: Fingerprint | None = None
        self.secure: SecureAggregation | None = None
        self._agreement: Agreement | None = None
        self.clients: tuple[Client, ...] = ()
        self.sent: Distribution | None = None
        self.refused: tuple[str, ...] = ()
        self.averaged: tuple[int, ...] = ()
        self.bounded: tuple[str, ...] = ()
        self.started: Callable[[int, Sequence[Client]], None] = lambda _round, _clients: None
        self._statistics = statistics
        self.loss: float | None = None

    @classmethod
    def architecture(cls, config: TrainConfig, dataset: Dataset, split: Evaluation) -> nn.Module:
        """Return what w is an instance of, freshly made.

        Args:
            config: The run's settings.
            dataset: Its images.
            split: How its test images are divided.

        Raises:
            FedveilError: A setting does not fit the data.
        """
        return build_model(config.model, dataset.shape, len(dataset.classes), seed=config.seed)

    @classmethod
    def release_of(cls, config: TrainConfig) -> NoisyRelease | None:
        """Return the noise in what clients return, as the settings ask for it; here none.

        Args:
            config: The run's settings.
        """
        return None

    def server_alone(self, rounds: int) -> Weights | None:
        """Return what w would be of the server's own labelled images alone; None: none are in w.

        Args:
            rounds: After how many w is delivered.
        """
        return None

    @classmethod
    def of_run(cls, job: Job, resume: Resume, key: NoiseKey) -> "SeededFedAvg":
        """Return the strategy of a run.

        Args:
            job: What the run is made of.
            resume: Where an earlier process of it stopped.
            key: Its secret.

        Raises:
            FedveilError: A setting does not fit the data or the model.
        """
        return cls(
            sampling=job.sampling,
            resume=resume,
            statistics=partial(_measured, job) if has_batch_norm(job.model) else None,
        )

    @property
    def needs_statistics(self) -> bool:
        """Whether what clients' batch normalisation kept of their images is used for w."""
        return self._statistics is None

    @property
    def sends(self) -> Sends:
        """What clients receive."""
        return "capped" if self.keeps_cap else "model"

    def summary(self) -> None:
        """Log the configuration as Flower does, and that no client will evaluate."""
        super().summary()
        level = WARNING if self._evaluation_asked else INFO
        log(level, "\t└──> Evaluation: %s", NO_CLIENT_EVALUATION)

    def distribute(
        self, round_number: int, weights: Weights, clients: Sequence[Client]
    ) -> Distribution:
        """Decide which model each sampled client receives; here all receive the same."""
        return Distribution((weights,), tuple((client, 0) for client in clients))

    def attachments(self) -> Mapping[str, ArrayRecord | ConfigRecord]:
        """Return what goes to every client beside its copy, by the name of its record."""
        return {}

    def choose(self, round_number: int) -> list[Client]:
        """Return the clients of a round; the same for the same seed and round."""
        return sample_clients(
            self.clients,
            fraction=self.sampling.fraction,
            seed=self.sampling.seed,
            round_number=round_number,
            least=self.sampling.min_train,
        )

    def received(self, sent: Distribution) -> tuple[Weights, ...]:
        """Return the models that clients could make of what a round sent, to be evaluated."""
        return sent.copies

    def marked(self, round_number: int, sent: Distribution) -> Distribution:
        """Give each client a copy of its own, with its fingerprint, if it has none yet."""
        if self.fingerprint is None or sent.shared is not None:
            return sent
        copies = tuple(
            self.fingerprint.apply(
                sent.copies[copy], round_number=round_number, client=client.partition
            )
            for client, copy in sent.assignment
        )
        assignment = tuple((client, number) for number, (client, _) in enumerate(sent.assignment))
        return replace(sent, copies=copies, assignment=assignment, shared=sent)

    def combine(self, round_number: int, sent: Distribution, updates: Sequence[Update]) -> Weights:
        """Return the next w from the checked replies (at least one); here their weighted mean."""
        mean = self.average([(unmarked(update, sent), update.examples) for update in updates])
        shared = sent.copies[0]
        # A counter is the server's own: no client's word for it is worth more than another's.
        state = {
            name: value.to(shared[name].dtype) if value.is_floating_point() else shared[name]
            for name, value in mean.items()
        }
        return self._statistics(state) if self._statistics else state

    def average(self, terms: Sequence[tuple[Weights, float]]) -> dict[str, Tensor]:
        """Return the average that ``acceptance`` names, of (x, n) pairs."""
        return _AVERAGES[self.acceptance.average](terms)

    def expected(self, sent: Distribution) -> Weights:
        """Return tensors with the names, shapes and dtypes a reply must have."""
        return sent.copies[0]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the clients of the round and address each its copy."""
        round_number = self.completed_rounds + server_round
        if not self.clients:
            self._check_keys()
            self.clients = query_roster(
                grid,
                config,
                min_clients=self.sampling.min_clients,
                timeout=self.sampling.timeout,
                key=self.configrecord_key,
            )
        chosen = self.choose(round_number)
        if self.secure:
            # Before any model is made, so that who drops out here was never sent one.
            self._agreement = self.secure.agree(
                grid, chosen, round_number, most_examples=self._weight_bound()
            )
            chosen = list(self._agreement.clients)
        started = time.perf_counter()
        sent = self.distribute(round_number, arrays.to_torch_state_dict(), chosen)
        sent = self.marked(round_number, sent)
        self.sent = replace(sent, seconds=time.perf_counter() - started)
        if self.archive:
            self.archive.write(self._entry(round_number, sent))
        self.started(round_number, chosen)
        config = ConfigRecord({**config, "server-round": round_number})
        if not self.needs_statistics:
            config["batch-statistics"] = False
        # One record per copy, none shared between copies, and none touched after this line.
        contents = [
            RecordDict(
                {
                    self.arrayrecord_key: ArrayRecord(dict(copy)),
                    self.configrecord_key: config,
                    **self.attachments(),
                }
            )
            for copy in self.sent.copies
        ]
        return [
            Message(
                content=self._addressed(contents[copy], client),
                message_type=MessageType.TRAIN,
                dst_node_id=client.node,
            )
            for client, copy in self.sent.assignment
        ]

    def _check_keys(self) -> None:
        keys = (self.weighted_by_key, self.arrayrecord_key, self.configrecord_key)
        if self.secure and keys != (WEIGHT_KEY, ARRAYS, CONFIG):
            raise FedveilError(
                f"secure aggregation sums records by the names {ARRAYS!r} and {CONFIG!r}, weighed "
                f"by {WEIGHT_KEY!r}, and these are {keys}: leave weighted_by_key, arrayrecord_key "
                "and configrecord_key out"
            )

    def _weight_bound(self) -> int | None:
        return weight_bound(self.clients, self.acceptance.weight_limit)

    def _addressed(self, content: RecordDict, client: Client) -> RecordDict:
        """Return a message's content with what only this client may read."""
        if self._agreement is None:
            return content
        return RecordDict({**content, RECORD_KEY_CONFIGS: self._agreement.letters[client.node]})

    def _entry(self, round_number: int, sent: Distribution) -> Entry:
        shared = sent.shared or sent
        assignment = {client.partition: copy for client, copy in shared.assignment}
        mark = None if sent.shared is None else self.fingerprint
        return Entry(round_number, shared.copies, assignment, mark)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Average the usable replies; the others are refused by name and never averaged.

        Raises:
            FedveilError: No reply was usable.
        """
        if self.sent is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        round_number = self.completed_rounds + server_round
        asked = {client.node: client for client, _ in self.sent.assignment}
        updates, refusals = self._usable(replies, self.sent, round_number)
        refusals += _silent(asked, updates, refusals)
        self.refused = tuple(f"node {refusal.node}: {refusal.reason}" for refusal in refusals)
        for refusal in self.refused:
            log(WARNING, "round %d: left out %s", round_number, refusal)
        if not updates:
            reasons = "; ".join(self.refused) or "nobody answered in time"
            raise FedveilError(
                f"round {round_number}: no usable answer from {quantity(len(asked), 'client')} "
                f"({reasons})"
            )
        unit = "images" if self.weighted_by_key == WEIGHT_KEY else self.weighted_by_key
        updates, self.bounded = bounded(updates, self._bound(updates), unit=unit)
        for claim in self.bounded:
            log(WARNING, "round %d: %s", round_number, claim)
        weights = self.combine(round_number, self.sent, updates)
        self.loss = _mean_loss(updates)
        self.averaged = tuple(update.client.partition for update in updates)
        return ArrayRecord(dict(weights)), self._told(updates)

    def _told(self, updates: Sequence[Update]) -> MetricRecord:
        if self._agreement:
            # Of one client nothing is known that could be aggregated: the mean loss was summed.
            return MetricRecord() if self.loss is None else MetricRecord({"loss": self.loss})
        return aggregated(updates, self._aggregate, self.weighted_by_key)

    def _bound(self, updates: Sequence[Update]) -> float | None:
        """Return the bound on a weight; from the answers themselves where no app said before."""
        known = self._weight_bound() if self.weighted_by_key == WEIGHT_KEY else None
        return claim_bound(updates, self.acceptance.weight_limit) if known is None else known

    def _usable(
        self, replies: Iterable[Message], sent: Distribution, round_number: int
    ) -> tuple[list[Update], list[Refusal]]:
        received = {client: sent.copies[copy] for client, copy in sent.assignment}
        if self._agreement:
            return self._agreement.mean(replies, received)
        updates, refusals = read_replies(
            replies,
            asked={client.node: client for client in received},
            expected=self.expected(sent),
            round_number=round_number,
            weight=self.weighted_by_key,
        )
        updates, large = refuse_large(updates, received, self.acceptance.norm_limit)
        return updates, refusals + large


def _mean_loss(updates: Sequence[Update]) -> float | None:
    told = [(update.loss, update.examples) for update in updates if update.loss is not None]
    if not told:
        return None
    return sum(loss * examples for loss, examples in told) / sum(count for _, count in told)


def unmarked(update: Update, sent: Distribution) -> Weights:
    """Return what a client sent back less the fingerprint in the copy it was sent.

    A client that returns its copy untouched returns the shared copy exactly, so the mean of
    returned weights keeps nothing of any fingerprint.

    Args:
        update: The reply.
        sent: What its round sent.

    Returns:
        State by name, in the reply's dtypes.
    """
    if sent.shared is None:
        return update.weights
    copy, shared = (dict(d.assignment)[update.client] for d in (sent, sent.shared))
    received, clean = sent.copies[copy], sent.shared.copies[shared]
    return {
        name: value
        if received[name] is clean[name]
        else _without_mark(value, clean[name], received[name])
        for name, value in update.weights.items()
    }


def _without_mark(value: Tensor, clean: Tensor, received: Tensor) -> Tensor:
    mark = torch.where(clean == received, 0.0, received.double() - clean.double())
    return (value.double() - mark).to(value.dtype)


def _silent(
    asked: Mapping[int, Client], updates: Sequence[Update], refusals: Sequence[Refusal]
) -> list[Refusal]:
    heard = {update.client.node for update in updates} | {refusal.node for refusal in refusals}
    return [Refusal(node, "no answer in time") for node in asked if node not in heard]


def weighted_mean(terms: Sequence[tuple[Weights, float]]) -> dict[str, Tensor]:
    """Return Σ nₖ·xₖ / Σ nₖ tensor by tensor, summed in float64 and returned in the terms' dtype.

    Args:
        terms: (x, n) pairs with the same names and shapes; n above 0. Tensors that are no floating
            point numbers, counters of batch statistics, are the first term's.
    """
    total = sum(count for _, count in terms)
    mean: dict[str, Tensor] = {}
    for name, first in terms[0][0].items():
        if not first.is_floating_point():
            mean[name] = first
            continue
        accumulated = torch.zeros_like(first, dtype=torch.float64)
        for weights, count in terms:
            accumulated.add_(weights[name], alpha=count / total)
        mean[name] = accumulated.to(first.dtype)
    return mean


_AVERAGES: Mapping[str, Callable[[Sequence[tuple[Weights, float]]], dict[str, Tensor]]] = {
    "mean": weighted_mean,
    "median": coordinate_median,
    "trimmed-mean": trimmed_mean,
}


def clone(weights: Weights) -> dict[str, Tensor]:
    """Return a deep copy of a model's state."""
    return {name: torch.clone(value) for name, value in weights.items()}


def _measured(job: Job, weights: Weights) -> Weights:
    """Return the weights with batch statistics of the server's images: nobody's word for them."""
    pixels = job.evaluation.calibration[:_STATISTICS_IMAGES].pixels
    return reestimate_batch_norm(job.model, weights, pixels)
