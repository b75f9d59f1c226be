"""Federated averaging with a seeded choice of clients; what the noise strategies build on."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import WARNING

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedveil.errors import FedveilError
from fedveil.federation.acceptance import (
    Acceptance,
    coordinate_median,
    refuse_large,
    trimmed_mean,
)
from fedveil.federation.replies import Refusal, Update, read_replies
from fedveil.federation.roster import Client, query_roster, sample_clients

Weights = Mapping[str, Tensor]


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
    """

    copies: tuple[Weights, ...]
    assignment: tuple[tuple[Client, int], ...]
    sigma: float = 0.0
    evaluations: int = 0
    images: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class StrategyState:
    """What a strategy carries from round to round; with the seed, all a resumed run needs.

    Attributes:
        base: The model the next copies are made from.
        sigma: Where the next search for σ starts.
        noisy: Whether the model has passed the cap.
        memory: What else the strategy keeps, by name.
    """

    base: Weights | None = None
    sigma: float = 0.0
    noisy: bool = False
    memory: Weights | None = None


@dataclass(frozen=True)
class Resume:
    """Where an earlier process of the same run stopped.

    Attributes:
        rounds: Rounds it completed; round numbers go on from there.
        state: What its strategy left.
    """

    rounds: int = 0
    state: StrategyState = field(default_factory=StrategyState)


@dataclass(frozen=True)
class Sampling:
    """How each round chooses its clients.

    Attributes:
        fraction: C, the fraction of the clients that takes part in a round.
        seed: Same seed, same clients.
        min_clients: Clients to wait for before the first round.
        timeout: Seconds to wait for them, and for their answers to the first query.
    """

    fraction: float = 1.0
    seed: int = 0
    min_clients: int = 2
    timeout: float = 3_600.0


class SeededFedAvg(FedAvg):
    """Flower's FedAvg with clients sampled by seed, checked replies, and rounds that can resume.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", AISTATS 2017, Algorithm 1.

    Args:
        sampling: How each round chooses its clients.
        resume: Where an earlier process of the same run stopped.

    Attributes:
        acceptance: Which answers are averaged, and how; may be set before the first round.
    """

    acceptance = Acceptance()

    def __init__(self, *, sampling: Sampling | None = None, resume: Resume | None = None) -> None:
        self.sampling = sampling or Sampling()
        super().__init__(fraction_train=self.sampling.fraction, min_evaluate_nodes=0)
        # Evaluation is the server's: no client is ever sent a model just to be evaluated.
        self.fraction_evaluate = 0.0
        resume = resume or Resume()
        self.completed_rounds = resume.rounds
        self.state = resume.state
        self.clients: tuple[Client, ...] = ()
        self.sent: Distribution | None = None
        self.refused: tuple[str, ...] = ()
        self.averaged: tuple[int, ...] = ()
        self.loss = float("nan")

    def distribute(
        self, round_number: int, weights: Weights, clients: Sequence[Client]
    ) -> Distribution:
        """Decide which model each sampled client receives; here all receive the same."""
        return Distribution((weights,), tuple((client, 0) for client in clients))

    def attachments(self) -> dict[str, ArrayRecord]:
        """Return what goes to every client beside its copy, by the name of its record."""
        return {}

    def combine(self, round_number: int, sent: Distribution, updates: Sequence[Update]) -> Weights:
        """Return the next w from the checked replies (at least one); here their weighted mean."""
        return self.average([(update.weights, update.examples) for update in updates])

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
            self.clients = query_roster(
                grid,
                config,
                min_clients=self.sampling.min_clients,
                timeout=self.sampling.timeout,
            )
        chosen = sample_clients(
            self.clients,
            fraction=self.sampling.fraction,
            seed=self.sampling.seed,
            round_number=round_number,
        )
        started = time.perf_counter()
        sent = self.distribute(round_number, arrays.to_torch_state_dict(), chosen)
        self.sent = replace(sent, seconds=time.perf_counter() - started)
        config = ConfigRecord({**config, "server-round": round_number})
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
            Message(content=contents[copy], message_type=MessageType.TRAIN, dst_node_id=client.node)
            for client, copy in self.sent.assignment
        ]

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
        updates, refusals = read_replies(
            replies, asked=asked, expected=self.expected(self.sent), round_number=round_number
        )
        received = {client: self.sent.copies[copy] for client, copy in self.sent.assignment}
        updates, large = refuse_large(updates, received, self.acceptance.norm_limit)
        refusals += [*large, *_silent(asked, updates, refusals + large)]
        self.refused = tuple(f"node {refusal.node}: {refusal.reason}" for refusal in refusals)
        for refusal in self.refused:
            log(WARNING, "round %d: left out %s", round_number, refusal)
        if not updates:
            reasons = "; ".join(self.refused) or "nobody answered in time"
            raise FedveilError(
                f"round {round_number}: no usable answer from {len(asked)} clients ({reasons})"
            )
        weights = self.combine(round_number, self.sent, updates)
        examples = sum(update.examples for update in updates)
        self.loss = sum(update.loss * update.examples for update in updates) / examples
        self.averaged = tuple(update.client.partition for update in updates)
        return ArrayRecord(dict(weights)), MetricRecord({"loss": self.loss})


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
