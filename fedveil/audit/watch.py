"""What the server of a running federation can note of one of its clients."""

import logging
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord
from torch import nn

from fedveil.attacks.inversion import LocalSteps, Observation, UpdateKnowledge
from fedveil.audit.observe import observation_from_records
from fedveil.data import Dataset, parse_partition
from fedveil.data.partition import partition
from fedveil.defenses import Defense
from fedveil.errors import FedveilError
from fedveil.federation.client_app import fedsgd_batch
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.roster import Sampling
from fedveil.federation.strategies.fedavg import SeededFedAvg
from fedveil.federation.strategies.fedsgd import Update, WatchingFedSGD
from fedveil.federation.task import ClientTask
from fedveil.federation.trial import Trial, try_out


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
        aggregate: How many clients' updates the server sees the mean of only, as under secure
            aggregation: the victim's and those of the partitions after it.
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
    aggregate: int = 1
    seed: int = 0
    workers: int | None = None

    def try_out(self, model: nn.Module, data: Dataset, defense: Defense) -> None:
        """Do once what the federation will do, before any of it.

        Raises:
            FedveilError: What would fail in every client.
        """
        shares = (2,) * self.clients
        task = self._task(defense)
        try_out(Trial(model, data.train, len(data.classes), shares, task, SeededFedAvg()))

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
            victims=self.victims,
            parameters=[n for n, value in model.named_parameters() if value.requires_grad],
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
            knows=None if defense.transform is None else defense.transform.surrogate,
            sanitizer=public_knowledge(defense, model, data),
        )

    def ground_truth(self, data: Dataset) -> torch.Tensor:
        """Return which training images were used; for scoring, never for attacks.

        Returns:
            int64 [rounds · aggregate · batch_size], indices into ``data.train``, round after round.

        Raises:
            FedveilError: The victim has fewer images than rounds use.
        """
        scheme = parse_partition("iid")
        shares = partition(data.train.labels, clients=self.clients, scheme=scheme, seed=self.seed)
        task = self._task(Defense("none"))
        for victim in self.victims:
            if len(shares[victim]) < self.rounds * self.batch_size:
                asked = self.rounds * self.batch_size * self.aggregate
                raise FedveilError(
                    f"--images {asked} is too many: client {victim} of {self.clients} has "
                    f"{len(shares[victim])} images; ask for fewer, or for fewer clients"
                )
        used = [
            shares[victim][
                fedsgd_batch(
                    len(shares[victim]),
                    task.model_copy(update={"server_round": number + 1}),
                    client=victim,
                )
            ]
            for number in range(self.rounds)
            for victim in self.victims
        ]
        return torch.cat(used)

    @property
    def victims(self) -> tuple[int, ...]:
        """Partitions of the clients whose sum is observed."""
        return tuple((self.victim + step) % self.clients for step in range(self.aggregate))

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
            defense=defense.label,
            model=self.model,
            epochs=self.local_epochs,
            batch_size=self.local_batch_size,
            images=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )


def public_knowledge(defense: Defense, model: nn.Module, data: Dataset) -> UpdateKnowledge | None:
    """Return what is publicly known of a defence that changes the update itself."""
    if defense.soteria is not None:
        return defense.soteria.on(model, data.shape)
    return defense.sanitizer
