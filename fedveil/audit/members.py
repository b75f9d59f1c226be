"""Which images each client of a finished run answered for."""

from dataclasses import dataclass

from torch import Tensor

from fedveil.data import Images, parse_partition
from fedveil.data.partition import partition
from fedveil.federation.acceptance import weight_bound
from fedveil.federation.roster import Client
from fedveil.federation.statistics import at_most
from fedveil.runs.config import TrainConfig


@dataclass(frozen=True)
class Members:
    """The clients of a run on a dataset that is here.

    Attributes:
        config: The run's settings.
        train: The dataset's training images.
        shares: Which of them each client has.
    """

    config: TrainConfig
    train: Images
    shares: tuple[Tensor, ...]

    @classmethod
    def of(cls, config: TrainConfig, train: Images) -> "Members":
        """Share out training images as the run did."""
        scheme = parse_partition(config.partition)
        shares = partition(train.labels, clients=config.clients, scheme=scheme, seed=config.seed)
        return cls(config, train, tuple(shares))

    @property
    def bound(self) -> int | None:
        """How many images a client counts for, and of an analytic run sums, at most."""
        clients = tuple(Client(c, c, len(share)) for c, share in enumerate(self.shares))
        return weight_bound(clients, self.config.weight_limit)

    def images(self, client: int) -> Images:
        """Return those that a client's answer was made of."""
        own = self.train[self.shares[client]]
        if self.config.strategy != "analytic":
            return own  # it trains on all of them, whatever it counts for
        return at_most(own, self.bound, self.config.seed)
