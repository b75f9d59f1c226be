"""What the server of a running federation can note of one of its clients."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedveil.attacks.inversion import LocalSteps, Observation, UpdateKnowledge
from fedveil.attacks.inversion.running_statistics import (
    RunningStatistics,
    read_running_statistics,
)
from fedveil.audit.settings import Watching
from fedveil.data import Dataset, parse_partition
from fedveil.data.partition import partition
from fedveil.defenses import Defense
from fedveil.errors import FedveilError
from fedveil.federation.client_app import OnObjects, fedsgd_batch
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.roster import Sampling
from fedveil.federation.strategies.fedavg import SeededFedAvg
from fedveil.federation.strategies.fedsgd import (
    FollowingFedAvg,
    WatchingFedSGD,
)
from fedveil.federation.task import ClientTask
from fedveil.federation.trial import Trial, try_out
from fedveil.models import batch_statistics_names
from fedveil.models.inspect import BATCH_NORMS
from fedveil.wording import quantity


@dataclass(frozen=True, eq=False)
class WatchedFederation:
    """A federation whose server sends the same model every round and watches one client.

    Its clients hold the very objects that are given here, so what they send is of these images and
    this model, and what is scored by them is the truth.

    Attributes:
        data: Dataset the clients share out among them at random.
        model: What the server sends, with its weights; clients train it in training mode.
        watching: Whom it watches.
    """

    data: Dataset
    model: nn.Module
    watching: Watching
    _clients: OnObjects = field(init=False, repr=False)

    def __post_init__(self) -> None:
        own = copy.deepcopy(self.model).train()
        object.__setattr__(self, "model", own)
        object.__setattr__(self, "_clients", OnObjects(self.data, own))

    def try_out(self, defense: Defense) -> None:
        """Do once what the federation will do, before any of it.

        Raises:
            FedveilError: What would fail in every client.
        """
        shares = (2,) * self.watching.clients
        classes = len(self.data.classes)
        task = self._task(defense)
        with self._clients.here():
            try_out(Trial(self.model, self.data.train, classes, shares, task, SeededFedAvg()))

    def observe(self, defense: Defense) -> Observation:
        """Run the federation and return what its server has, the knowledge of the defence with it.

        Args:
            defense: What the clients do to their images.

        Raises:
            FedveilError: The victim's answers did not come.
        """
        watching = self.watching
        strategy = WatchingFedSGD(
            victims=watching.victims,
            parameters=[n for n, value in self.model.named_parameters() if value.requires_grad],
            statistics=batch_statistics_names(self.model),
            action=watching.update,
            sampling=Sampling(seed=watching.seed, min_clients=watching.clients),
        )
        self._run(strategy, self._task(defense), watching.rounds)
        if len(strategy.exchanges) < watching.rounds:
            raise FedveilError(
                f"client {watching.victim} answered {len(strategy.exchanges)} of {watching.rounds} "
                f"rounds: {'; '.join(strategy.refused)}"
            )
        return self._observed(
            defense,
            strategy.exchanges[0].sent,
            [exchange.returned for exchange in strategy.exchanges],
        )

    def follow(self, defense: Defense) -> tuple[Observation, ...]:
        """Run ``repeats`` rounds of federated averaging and return what the server has of each.

        Args:
            defense: What the clients do to their images.

        Returns:
            One a round, of the same clients: the victim's update first, then those of all others
            that trained on as many images.

        Raises:
            FedveilError: The victim's answers did not come.
        """
        watching = self.watching
        strategy = FollowingFedAvg(
            sampling=Sampling(seed=watching.seed, min_clients=watching.clients)
        )
        task = self._task(defense).model_copy(update={"repeat": True})
        self._run(strategy, task, watching.repeats)
        alike = [
            {client for client, images in one.images.items() if images == watching.batch}
            for one in strategy.rounds
        ]
        always = set.intersection(*alike) if len(alike) == watching.repeats else set()
        if watching.victim not in always:
            raise FedveilError(
                f"client {watching.victim} did not answer all of {watching.repeats} rounds: "
                f"{'; '.join(strategy.refused)}"
            )
        clients = [watching.victim, *sorted(always - {watching.victim})]
        return tuple(
            self._observed(defense, one.sent, [one.returned[client] for client in clients])
            for one in strategy.rounds
        )

    def _run(self, strategy: SeededFedAvg, task: ClientTask, rounds: int) -> None:
        logging.getLogger("flwr").setLevel(logging.WARNING)
        watching, sent = self.watching, ArrayRecord(self.model.state_dict())
        with LocalGrid(self._clients, nodes=watching.clients, workers=watching.workers) as grid:
            strategy.start(grid, sent, num_rounds=rounds, train_config=task.to_record())

    def _observed(
        self, defense: Defense, sent: ArrayRecord, returned: Sequence[ArrayRecord]
    ) -> Observation:
        return observation_from_records(
            self.model,
            sent,
            returned,
            shape=self.data.shape,
            classes=len(self.data.classes),
            steps=local_steps(self.watching),
            images=self.watching.batch * self.watching.aggregate,
            clients=self.watching.aggregate,
            knows=None if defense.transform is None else defense.transform.surrogate,
            sanitizer=public_knowledge(defense, self.model, self.data),
        )

    def ground_truth(self) -> Tensor:
        """Return which training images were used; for scoring, never for attacks.

        Returns:
            int64 [images], indices into ``data.train``, round after round.

        Raises:
            FedveilError: The victim has fewer images than rounds use.
        """
        return ground_truth(self.data, self.watching)

    def _task(self, defense: Defense) -> ClientTask:
        return _task(self._clients.name, self.watching, defense)


def local_steps(watching: Watching) -> LocalSteps | None:
    """Return the local steps after which weights come back; None where gradients do."""
    if watching.update == "gradient":
        return None
    whole = watching.update == "step"
    return LocalSteps(
        epochs=1 if whole else watching.epochs,
        batch_size=watching.batch if whole else watching.batch_size,
        learning_rate=watching.learning_rate,
    )


def ground_truth(data: Dataset, watching: Watching) -> Tensor:
    """Return which training images are used, int64 [images], round after round.

    Raises:
        FedveilError: The victim has fewer images than rounds use.
    """
    labels, scheme = data.train.labels, parse_partition("iid")
    shares = partition(labels, clients=watching.clients, scheme=scheme, seed=watching.seed)
    task = _task(data.name, watching, Defense("none"))
    for victim in watching.victims:
        if len(shares[victim]) < watching.rounds * watching.batch:
            raise FedveilError(
                f"--images {watching.images} is too many: client {victim} of {watching.clients} "
                f"has {quantity(len(shares[victim]), 'image')}; ask for fewer, or for fewer clients"
            )
    used = [
        shares[victim][
            fedsgd_batch(
                len(shares[victim]),
                task.model_copy(update={"server_round": number + 1}),
                client=victim,
            )
        ]
        for number in range(watching.rounds)
        for victim in watching.victims
    ]
    return torch.cat(used)


def _task(name: str, watching: Watching, defense: Defense) -> ClientTask:
    return ClientTask(
        dataset=name,
        partition="iid",
        defense=defense.label,
        model=name,
        epochs=watching.epochs,
        batch_size=watching.batch_size,
        images=watching.batch,
        learning_rate=watching.learning_rate,
        batch_statistics=watching.batch_statistics,
        seed=watching.seed,
    )


def public_knowledge(defense: Defense, model: nn.Module, data: Dataset) -> UpdateKnowledge | None:
    """Return what is publicly known of a defence that changes the update itself."""
    if defense.soteria is not None:
        return defense.soteria.on(model, data.shape)
    return defense.sanitizer


def observation_from_records(
    model: nn.Module,
    sent: ArrayRecord,
    returned: Sequence[ArrayRecord],
    *,
    shape: tuple[int, int, int],
    classes: int,
    steps: LocalSteps | None = None,
    images: int = 1,
    clients: int = 1,
    knows: nn.Module | None = None,
    sanitizer: UpdateKnowledge | None = None,
) -> Observation:
    """Return what an honest-but-curious server has of clients that answered one model.

    Args:
        model: The architecture; its weights are not used.
        sent: The model as it went out.
        returned: What came back, one record a victim (or a round in which the same model went out):
            gradients, or weights.
        shape: (C, H, W) of one image.
        classes: Number of classes.
        steps: The local steps after which the weights came back, as the server configured them;
            None where the records hold gradients.
        images: Images in a victim's batch, as the reply counts them.
        clients: Of how many clients each record is the mean.
        knows: The image transformation that is public knowledge.
        sanitizer: What is publicly known of a change of the update.

    Raises:
        FedveilError: A record that lacks a weight of the model.
    """
    count = steps.steps(images // clients) if steps else 0
    before = sent.to_torch_state_dict()
    own = copy.deepcopy(model)
    own.load_state_dict(before)
    trained = [name for name, p in own.named_parameters() if p.requires_grad]
    updates = [record.to_torch_state_dict() for record in returned]
    gradients: dict[str, Tensor] = {}
    rounding = 0.0
    for name in trained:
        stacked = _stacked(updates, name)
        if steps is not None:
            # In float64, so that nothing is lost beyond what the client's own rounding lost.
            length = steps.learning_rate * count
            rounding += _rounding_energy(stacked) * count / length**2
            stacked = (before[name].double() - stacked.double()) / length
        gradients[name] = stacked
    told = RunningStatistics({}, dict.fromkeys(_batch_norms(own), "a gradient came back"))
    if steps is not None:
        told = read_running_statistics(own, before, updates, steps=count)
    size = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    return Observation(
        model=own,
        gradients=gradients,
        shape=shape,
        classes=classes,
        images=images,
        knows=knows,
        sanitizer=sanitizer,
        rounding=rounding / max(size, 1e-30),
        local=steps if count > 1 else None,
        clients=clients,
        statistics=told.layers,
        unread=told.unread,
    )


def _batch_norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]


def _stacked(updates: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    if any(name not in update for update in updates):
        raise FedveilError(f"a reply lacks {name}; the client must return every weight it was sent")
    return torch.stack([update[name] for update in updates]) if updates else torch.empty(0)


def _rounding_energy(weights: Tensor) -> float:
    # A float is off by a uniform error of one unit in the last place, which is eps·2^exponent.
    _, exponent = torch.frexp(weights)
    unit = torch.finfo(weights.dtype).eps * torch.exp2(exponent.double() - 1)
    return float(unit.square().sum() / 12)
