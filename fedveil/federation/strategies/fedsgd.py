"""A server that takes the notes an honest-but-curious one can take."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedveil.federation.replies import Update
from fedveil.federation.roster import Sampling
from fedveil.federation.strategies.fedavg import Distribution, SeededFedAvg, weighted_mean
from fedveil.types import UpdateKind, Weights


@dataclass(frozen=True)
class WatchedRound:
    """One round between the server and the clients it watches, as it went over the wire.

    Attributes:
        server_round: The round.
        sent: The model that went out.
        returned: What came back: the gradient, or the weights after the local steps.
        images: How many images the clients say it is of.
    """

    server_round: int
    sent: ArrayRecord
    returned: ArrayRecord
    images: int


class WatchingFedSGD(SeededFedAvg):
    """FedSGD or federated averaging on a server that keeps what one of its clients sends.

    The same model goes out in every round, as a curious server may well arrange: each round then
    leaks other images at the same weights.

    Source: McMahan et al. 2017, section 2, FederatedSGD and FederatedAveraging.

    Args:
        victims: Partitions of the clients that are watched. Of several the server sees the mean
            only, weighted by examples, as secure aggregation leaves it.
        parameters: Names of the model's parameters; its other tensors have no gradient.
        action: What clients are asked for: ``gradient``; ``step``, the weights after one step; or
            ``fedavg``, the weights after the task's local epochs and minibatches.
        statistics: Names of running statistics, which are noted, too, where weights come back.
        sampling: How each round chooses its clients.
    """

    def __init__(
        self,
        *,
        victims: Collection[int],
        parameters: Collection[str],
        statistics: Collection[str] = (),
        action: UpdateKind = "gradient",
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(sampling=sampling)
        self.parameters = frozenset(parameters)
        self.noted = self.parameters | frozenset(statistics)
        self.victims = frozenset(victims)
        self.action = action
        self.exchanges: list[WatchedRound] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for what the action names, on the round's own images."""
        asked = super().configure_train(server_round, arrays, config, grid)
        return _asked(asked, self.action)

    def expected(self, sent: Distribution) -> Weights:
        """Expect a gradient for each parameter, or the whole state."""
        if self.action != "gradient":
            return super().expected(sent)
        return {name: sent.copies[0][name] for name in sent.copies[0] if name in self.parameters}

    def combine(self, round_number: int, sent: Distribution, updates: Sequence[Update]) -> Weights:
        """Note the victims' replies and return the model that was sent."""
        seen = [update for update in updates if update.client.partition in self.victims]
        if len(seen) == len(self.victims):
            mean = weighted_mean([(self._learnt(update), update.examples) for update in seen])
            self.exchanges.append(
                WatchedRound(
                    round_number,
                    ArrayRecord(dict(sent.copies[0])),
                    ArrayRecord(mean),
                    sum(int(update.examples) for update in seen),
                )
            )
        return sent.copies[0]

    def _learnt(self, update: Update) -> Weights:
        return {name: value for name, value in update.weights.items() if name in self.noted}


@dataclass(frozen=True)
class FollowedRound:
    """One round of a federation whose model moves, as its server sees it.

    Attributes:
        sent: The model that went out.
        returned: Weights after the local steps, by the partition of the client.
        images: How many images each says they are of.
    """

    sent: ArrayRecord
    returned: Mapping[int, ArrayRecord]
    images: Mapping[int, int]


class FollowingFedAvg(SeededFedAvg):
    """Federated averaging on a server that keeps what every client returns in every round.

    Every client trains on the same images each time, as the clients of an ordinary federation do.

    Args:
        sampling: How each round chooses its clients.
    """

    def __init__(self, *, sampling: Sampling | None = None) -> None:
        super().__init__(sampling=sampling)
        self.rounds: list[FollowedRound] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for local training on so many of a client's images as the task names."""
        return _asked(super().configure_train(server_round, arrays, config, grid), "fedavg")

    def combine(self, round_number: int, sent: Distribution, updates: Sequence[Update]) -> Weights:
        """Note the replies and return their weighted mean."""
        self.rounds.append(
            FollowedRound(
                ArrayRecord(dict(sent.copies[0])),
                {u.client.partition: ArrayRecord(dict(u.weights)) for u in updates},
                {u.client.partition: int(u.examples) for u in updates},
            )
        )
        return super().combine(round_number, sent, updates)


def _asked(messages: Iterable[Message], action: UpdateKind) -> Iterator[Message]:
    for message in messages:
        message.metadata.message_type = f"train.{action}"
        yield message
