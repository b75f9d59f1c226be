"""What the server of a running federation can note of one of its clients."""

import logging
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord
from torch import nn

from fedveil.attacks.inversion import LocalSteps, Observation
from fedveil.audit.observe import observation_from_records
from fedveil.data import Dataset, parse_partition
from fedveil.data.partition import partition
from fedveil.defenses.specs import Defense
from fedveil.errors import FedveilError
from fedveil.federation.client_app import fedsgd_batch
from fedveil.federation.fedavg import Sampling
from fedveil.federation.fedsgd import Update, WatchingFedSGD
from fedveil.federation.local import LocalGrid
from fedveil.federation.task import ClientTask


@dataclass(frozen=True)
class WatchedFederation:
    """A federation whose server sends the same model every round and watches one client.

    Attributes:
        dataset: Dataset the clients share out among them at random.
        model: Architecture; clients build it by this name.
        clients: Clients in all.
        victim: Partition of the client that is watched.
        rounds: Rounds, each with other images of the victim's.
        batch_size: Images the victim uses in a round.
        update: What the clients return: ``gradient``; ``step``, the weights after one step; or
            ``fedavg``, the weights after local training.
        learning_rate: Of a step; the larger, the less the rounding of the weights hides.
        local_epochs: Passes of ``fedavg`` over the round's images.
        local_batch_size: Images a step of ``fedavg``.
        seed: Seeds the partition and the order of the images.
        workers: Worker processes.
    """

    dataset: str
    model: str
    clients: int
    victim: int
    rounds: int
    batch_size: int = 1
    update: Update = "gradient"
    learning_rate: float = 1.0
    local_epochs: int = 1
    local_batch_size: int = 10
    seed: int = 0
    workers: int | None = None

    def observe(self, model: nn.Module, data: Dataset, defense: Defense) -> Observation:
        """Run the federation and return what its server has, the knowledge of the defence with it.

        Args:
            model: What the server sends, in the mode the client trains in.
            data: The dataset of that name; only its shape and number of classes are used.
            defense: What the clients do to their images.

        Raises:
            FedveilError: The victim's answers did not come.
        """
        logging.getLogger("flwr").setLevel(logging.WARNING)
        strategy = WatchingFedSGD(
            victim=self.victim,
            parameters=[name for name, _ in model.named_parameters()],
            action=self.update,
            sampling=Sampling(seed=self.seed, min_clients=self.clients),
        )
        with LocalGrid(
            "fedveil.federation.client_app:app", nodes=self.clients, workers=self.workers
        ) as grid:
            strategy.start(
                grid,
                ArrayRecord(model.state_dict()),
                num_rounds=self.rounds,
                train_config=self._task(defense).to_record(),
            )
        if len(strategy.exchanges) < self.rounds:
            raise FedveilError(
                f"client {self.victim} answered {len(strategy.exchanges)} of {self.rounds} rounds: "
                f"{'; '.join(strategy.refused)}"
            )
        return observation_from_records(
            model,
            strategy.exchanges[0].sent,
            [exchange.returned for exchange in strategy.exchanges],
            shape=data.shape,
            classes=len(data.classes),
            steps=self._steps(),
            images=strategy.exchanges[0].images,
            knows=defense.transform,
        )

    def ground_truth(self, data: Dataset) -> torch.Tensor:
        """Return which training images the victim used; for scoring, never for attacks.

        Returns:
            int64 [rounds · batch_size], indices into ``data.train``, round after round.

        Raises:
            FedveilError: The victim has fewer images than rounds use.
        """
        scheme = parse_partition("iid")
        shares = partition(data.train.labels, clients=self.clients, scheme=scheme, seed=self.seed)
        own, task = shares[self.victim], self._task(Defense("none", None))
        if len(own) < self.rounds * self.batch_size:
            raise FedveilError(
                f"--images {self.rounds * self.batch_size} is too many: client {self.victim} of "
                f"{self.clients} has {len(own)} images; ask for fewer, or for fewer clients"
            )
        used = [
            fedsgd_batch(
                len(own),
                task.model_copy(update={"server_round": number + 1}),
                client=self.victim,
            )
            for number in range(self.rounds)
        ]
        return own[torch.cat(used)]

    def _steps(self) -> LocalSteps | None:
        if self.update == "gradient":
            return None
        whole = self.update == "step"
        return LocalSteps(
            epochs=1 if whole else self.local_epochs,
            batch_size=self.batch_size if whole else self.local_batch_size,
            learning_rate=self.learning_rate,
        )

    def _task(self, defense: Defense) -> ClientTask:
        return ClientTask(
            dataset=self.dataset,
            partition="iid",
            transform=None if defense.transform is None else defense.label,
            model=self.model,
            epochs=self.local_epochs,
            batch_size=self.local_batch_size,
            images=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )
