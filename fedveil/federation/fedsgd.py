"""A server that takes the notes an honest-but-curious one can take."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedveil.federation.fedavg import Distribution, Sampling, SeededFedAvg, Weights
from fedveil.federation.replies import Update as Reply

Update = Literal["gradient", "step", "fedavg"]


@dataclass(frozen=True)
class Exchange:
    """One round between the server and the client it watches, as it went over the wire.

    Attributes:
        server_round: The round.
        sent: The model that went out.
        returned: What came back: the gradient, or the weights after the local steps.
        images: How many images the client says it is of.
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
        victim: Partition of the client that is watched.
        parameters: Names of the model's parameters; its other tensors have no gradient.
        action: What clients are asked for: ``gradient``; ``step``, the weights after one step; or
            ``fedavg``, the weights after the task's local epochs and minibatches.
        sampling: How each round chooses its clients.
    """

    def __init__(
        self,
        *,
        victim: int,
        parameters: Collection[str],
        action: Update = "gradient",
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(sampling=sampling)
        self.parameters = frozenset(parameters)
        self.victim = victim
        self.action = action
        self.exchanges: list[Exchange] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for what the action names, on the round's own images."""
        for message in super().configure_train(server_round, arrays, config, grid):
            message.metadata.message_type = f"train.{self.action}"
            yield message

    def expected(self, sent: Distribution) -> Weights:
        """Expect a tensor for each parameter."""
        return {name: sent.copies[0][name] for name in sent.copies[0] if name in self.parameters}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Note what the victim sent."""
        received = list(replies)
        assert self.sent is not None
        nodes = {
            client.node for client, _ in self.sent.assignment if client.partition == self.victim
        }
        for reply in received:
            if reply.metadata.src_node_id in nodes and not reply.has_error():
                metrics = next(iter(reply.content.metric_records.values()))
                self.exchanges.append(
                    Exchange(
                        server_round,
                        ArrayRecord(dict(self.sent.copies[0])),
                        next(iter(reply.content.array_records.values())),
                        int(metrics["num-examples"]),  # type: ignore[arg-type]
                    )
                )
        return super().aggregate_train(server_round, received)

    def combine(self, round_number: int, sent: Distribution, updates: Sequence[Reply]) -> Weights:
        """Return the model that was sent."""
        return sent.copies[0]
