"""The ClientApp that every engine runs: finds its images, trains the copy it received, answers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from logging import WARNING
from uuid import uuid4

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.logger import log
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.data import Dataset, Images, load_dataset, load_own_images, parse_partition
from fedveil.data.partition import partition
from fedveil.defenses.defense import Defense
from fedveil.defenses.mods import Returned, defense_mods
from fedveil.defenses.specs import parse_defense
from fedveil.errors import FedveilError
from fedveil.federation.answers import Question, answer_with, asked_about
from fedveil.federation.permission import check_model_allowed
from fedveil.federation.secagg.client import ANSWERS, STATISTICS, secure_aggregation_mod
from fedveil.federation.shares import KeptShares, is_fixed, transformed
from fedveil.federation.statistics import answer_statistics
from fedveil.federation.task import UNLABELLED, ClientTask
from fedveil.federation.training import Strangers, train_locally, train_privately
from fedveil.models import batch_statistics_names, build_model, twins
from fedveil.types import Shape


def defense_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Train under the defence that the task names.

    A Flower mod of its own because the task is known only once the message is there. What a fixed
    transformation makes of a client's images is the same in every step and round: ``client_images``
    gives them transformed already.
    """
    defense = _defense(_task(message).defense)
    if _transforms_once(defense):
        defense = replace(defense, transform=None)
    action = message.metadata.message_type.partition(".")[2]
    returned: Returned = "gradient" if action == "gradient" else "weights"
    for mod in defense_mods(defense, returned=returned):
        call_next = partial(_through, mod, call_next)
    return call_next(message, context)


def _through(mod: Mod, call_next: ClientAppCallable, message: Message, context: Context) -> Message:
    return mod(message, context, call_next)


def _transforms_once(defense: Defense) -> bool:
    return defense.transform is not None and is_fixed(defense.transform)


app = ClientApp(mods=[secure_aggregation_mod])


_given: dict[str, "OnObjects"] = {}


@dataclass(frozen=True, eq=False)
class OnObjects:
    """The client app on a dataset and a model themselves, which no task can name otherwise.

    For clients in this machine's processes. Names are how others find what a task is about.

    Attributes:
        data: The dataset the clients share out among them.
        model: What they train; each process has a copy of its own.
        name: Of both, in the tasks of these clients.
    """

    data: Dataset
    model: nn.Module
    name: str = field(default_factory=lambda: f"object-{uuid4().hex}", init=False)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message, in a process that has these objects to the end."""
        _given[self.name] = self
        return app(message, context)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Let this process, too, know the objects by their name."""
        _given[self.name] = self
        try:
            yield
        finally:
            del _given[self.name]


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which share of the data this client holds and how many images it has."""
    client = _node_setting(context, "partition-id")
    share = len(client_images(context, _task(message)))
    metrics = MetricRecord({"partition-id": client, "num-examples": share})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train(mods=[defense_mod])
def train(message: Message, context: Context) -> Message:
    """Train the copy that came for the local epochs; return it with the number of images."""
    return _train_on(message, context, client_images(context, _task(message)))


@app.train("fedavg", mods=[defense_mod])
def train_on_the_rounds_images(message: Message, context: Context) -> Message:
    """Train as ``train`` does, on those of the client's images that are the round's turn."""
    return _train_on(message, context, _rounds_images(message, context))


def answer(message: Message, context: Context, images: Images) -> Message:
    """Return what a client with these images, not transformed yet, answers a train message.

    Under the defence that the task names, as ``train`` does.
    """
    transform = _defense(_task(message).defense).transform
    if transform is not None and is_fixed(transform):
        images = transformed(images, transform)

    def trained(message: Message, context: Context) -> Message:
        return _train_on(message, context, images)

    return defense_mod(message, context, trained)


def _train_on(
    message: Message, context: Context, images: Images, *, leaves: bool = True
) -> Message:
    """Train; the answer's statistics are the client's own only where they stay or are asked for."""
    torch.set_num_threads(1)
    task = _task(message)
    model = _model_for(task, context)
    model.load_state_dict(_arrays(message).to_torch_state_dict())
    privacy, strangers = _defense(task.defense).privacy, _strangers(message, images, task)
    received = _untrained(model)
    loss: float | None = None
    if privacy is None:
        loss = train_locally(
            model,
            images,
            task.training,
            generator=_generator(task, context),
            strangers=strangers,
        )
    elif strangers is None:
        train_privately(model, images, task.training, privacy)
    else:
        raise FedveilError(
            "DP-SGD cannot learn from the server's unlabelled images besides; leave out either"
        )
    state = (
        _returned(model, received, task) if leaves or privacy is not None else model.state_dict()
    )
    metrics = _metrics(len(images), loss, task)
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
    return Message(content, reply_to=message)


def _returned(
    model: nn.Module, received: Mapping[str, Tensor], task: ClientTask
) -> dict[str, Tensor]:
    """Return a trained model's state as it may leave the client.

    Args:
        model: After training.
        received: What is not trained, as it came.
        task: Says what is asked for, and the defence.
    """
    state: dict[str, Tensor] = model.state_dict()
    if _defense(task.defense).privacy is not None:
        # The accountant covers what is trained alone: the rest goes back as it came.
        return state | dict(received)
    if task.batch_statistics:
        return state
    # The mean of a batch in every layer is told by them, and the server measures its own.
    return state | {name: received[name] for name in batch_statistics_names(model)}


def _untrained(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    trained = {name for name, parameter in named if parameter.requires_grad}
    state = model.state_dict()
    return {name: value.clone() for name, value in state.items() if name not in trained}


def _metrics(images: int, loss: float | None, task: ClientTask) -> MetricRecord:
    """Return what a client says besides: no loss where privacy is promised."""
    told = {} if loss is None else {"loss": loss}
    return MetricRecord({"num-examples": images, "server-round": task.server_round, **told})


@app.train(STATISTICS)
def statistics(message: Message, context: Context) -> Message:
    """Return sums over this client's features, as an analytic federation asks for."""
    return answer_sums(message, context, client_images(context, _task(message)))


def answer_sums(message: Message, context: Context, images: Images) -> Message:
    """Return what a client with these images, transformed already, answers to such a message."""
    torch.set_num_threads(1)
    task = _task(message)
    return answer_statistics(
        message, context, images, server_round=task.server_round, seed=task.seed
    )


@app.train(ANSWERS)
def answers(message: Message, context: Context) -> Message:
    """Train as ``train`` does, and return what the model answers to the server's images."""
    task = _task(message)
    return answer_asked(message, context, client_images(context, task), asked_of=_stored_images)


def answer_asked(
    message: Message,
    context: Context,
    images: Images,
    *,
    asked_of: Callable[[Context, ClientTask], Images] | None = None,
) -> Message:
    """Return what a client with these images, transformed already, answers to such a message.

    Images of its own that it is asked about are not trained on, so that its answers on them are
    those of any client without them; under DP-SGD, which hides them, they are.

    Args:
        message: The question, and the model to train.
        context: Of the client.
        images: What it trains on.
        asked_of: Returns the same images as they were before any transformation; None where they
            are not asked about.
    """
    torch.set_num_threads(1)
    task = _task(message)
    model = _model_for(task, context)
    asked = Question.read(message, context, shape=_shape(task))
    own = images
    if asked_of is not None and _defense(task.defense).privacy is None:
        own = images[~asked_about(asked_of(context, task).raw, asked.images)]

    def trained(message: Message, context: Context) -> Message:
        if len(own):
            return _train_on(message, context, own, leaves=False)
        metrics = _metrics(len(images), None, task)
        content = RecordDict({"arrays": _arrays(message), "metrics": metrics})
        return Message(content, reply_to=message)

    protected = partial(_through, defense_mod, trained)
    return answer_with(protected, model, message, context, asked, weight=len(images))


@app.train("gradient", mods=[defense_mod])
def gradient(message: Message, context: Context) -> Message:
    """Return the gradient of one minibatch at the weights that came, as FedSGD does."""
    return _one_minibatch(message, context, lambda parameter, gradient, rate: gradient, whole=False)


@app.train("step", mods=[defense_mod])
def step(message: Message, context: Context) -> Message:
    """Return the state after one step of gradient descent on one minibatch."""
    return _one_minibatch(
        message, context, lambda parameter, gradient, rate: parameter - rate * gradient, whole=True
    )


def _strangers(message: Message, images: Images, task: ClientTask) -> Strangers | None:
    """Return the server's unlabelled images, if it sent any and this client lacks a class."""
    record = message.content.array_records.get(UNLABELLED)
    if record is None or int(images.labels.bincount().count_nonzero()) == _classes(task):
        return None
    raw = record.to_torch_state_dict()["images"]
    unlabelled = Images(raw, torch.full((len(raw),), -1))
    transform = _defense(task.defense).transform
    if transform is not None and is_fixed(transform):
        unlabelled = transformed(unlabelled, transform)
    return Strangers(unlabelled, task.batch_size)


def _one_minibatch(
    message: Message,
    context: Context,
    answer: Callable[[Tensor, Tensor, float], Tensor],
    *,
    whole: bool,
) -> Message:
    torch.set_num_threads(1)
    task, batch = _task(message), _rounds_images(message, context)
    model = _model_for(task, context)
    model.load_state_dict(_arrays(message).to_torch_state_dict())
    received = _untrained(model)
    gradients, loss = _gradients(model, batch, _defense(task.defense))
    answers = {
        name: answer(parameter.detach(), gradients[name], task.learning_rate)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if whole:
        further = {name: answers[own] for name, own in twins(model).items() if own in answers}
        answers = _returned(model, received, task) | answers | further
    metrics = _metrics(len(batch), loss, task)
    content = RecordDict({"arrays": ArrayRecord(answers), "metrics": metrics})
    return Message(content, reply_to=message)


def _gradients(
    model: nn.Module, batch: Images, defense: Defense
) -> tuple[dict[str, Tensor], float | None]:
    if defense.privacy is not None:
        private = defense.privacy.gradients(model, batch.pixels, batch.labels, expected=len(batch))
        return private, None
    loss = F.cross_entropy(model(batch.pixels), batch.labels)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True)), float(loss.detach())


def _rounds_images(message: Message, context: Context) -> Images:
    task = _task(message)
    images = client_images(context, task)
    client = _node_setting(context, "partition-id")
    return images[fedsgd_batch(len(images), task, client=client)]


def fedsgd_batch(images: int, task: ClientTask, *, client: int) -> torch.Tensor:
    """Return which of a client's images a FedSGD round uses, int64 [N].

    Rounds go through the client's images N at a time (the task's ``images``, or else B), in a new
    random order each time all have been used; unless the task repeats the first.

    Args:
        images: How many images the client has.
        task: Gives seed, round and N.
        client: The client's partition.
    """
    size = task.images or task.batch_size
    batches = -(-images // size)
    number = 1 if task.repeat else max(task.server_round, 1)
    epoch, batch = divmod(number - 1, batches)
    order = torch.randperm(images, generator=_shuffler(task.seed, epoch, client))
    return torch.split(order, size)[batch]


def client_images(context: Context, task: ClientTask) -> Images:
    """Return the images of one client: every image of its own folder, or its share of a dataset.

    A fixed transformation of the task has been applied to them.

    Args:
        context: Its node config names ``data``, a folder, or ``partition-id`` and
            ``num-partitions``.
        task: Names the dataset and how it is shared out, or the classes and shape images must have,
            and the transformation.

    Raises:
        FedveilError: The images cannot be loaded or do not fit the task, the dataset cannot be
            shared out, or the node config is incomplete.
    """
    transform = _defense(task.defense).transform
    if transform is None or not is_fixed(transform):
        return _stored_images(context, task)
    own, clients = (context.node_config.get(key) for key in ("data", "num-partitions"))
    return _kept.get(
        (task.dataset, task.partition, task.seed, task.defense, own, clients),
        _node_setting(context, "partition-id"),
        lambda: transformed(_stored_images(context, task), transform),
    )


def _stored_images(context: Context, task: ClientTask) -> Images:
    if own := context.node_config.get("data"):
        if task.shape is None:
            raise FedveilError("a node with data of its own needs a server with --engine deployed")
        return _own_images(str(own), task.classes, task.shape)
    return _dataset(task.dataset, task.seed).train[client_index(context, task)]


def client_index(context: Context, task: ClientTask) -> torch.Tensor:
    """Return which training images belong to one client, int64 [n]."""
    clients = _node_setting(context, "num-partitions")
    shares = _shares(task.dataset, task.partition, clients, task.seed)
    return shares[_node_setting(context, "partition-id")]


# One process serves many clients and many rounds, so these are kept.

_kept = KeptShares(limit=2**28)


def _dataset(name: str, seed: int) -> Dataset:
    given = _given.get(name)
    return _loaded(name, seed) if given is None else given.data


@lru_cache(maxsize=4)
def _loaded(name: str, seed: int) -> Dataset:
    return load_dataset(name, seed=seed)


@lru_cache(maxsize=4)
def _own_images(path: str, classes: tuple[str, ...], shape: tuple[int, int, int]) -> Images:
    return load_own_images(path, classes=classes, shape=shape, tell=partial(log, WARNING, "%s"))


@lru_cache(maxsize=4)
def _shares(dataset: str, scheme: str, clients: int, seed: int) -> tuple[torch.Tensor, ...]:
    labels = _dataset(dataset, seed).train.labels
    return partition(labels, clients=clients, scheme=parse_partition(scheme), seed=seed)


@lru_cache(maxsize=4)
def _defense(text: str) -> Defense:
    return parse_defense(text)


@lru_cache(maxsize=4)
def _model(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    given = _given.get(name)
    return build_model(name, shape, classes, seed=0) if given is None else deepcopy(given.model)


def _classes(task: ClientTask) -> int:
    return len(task.classes or _dataset(task.dataset, task.seed).classes)


def _shape(task: ClientTask) -> Shape:
    return task.shape or _dataset(task.dataset, task.seed).shape


def _model_for(task: ClientTask, context: Context) -> nn.Module:
    check_model_allowed(task.model, context)
    return model_of(task, _shape(task), _classes(task))


def forget_models() -> None:
    """Let the next client of this process build its model anew."""
    _model.cache_clear()


def model_of(task: ClientTask, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return the model that clients of this process train, one object for all of them."""
    return _model(task.model, shape, classes).train()


def _generator(task: ClientTask, context: Context) -> torch.Generator:
    return _shuffler(task.seed, task.server_round, _node_setting(context, "partition-id"))


def _shuffler(seed: int, number: int, client: int) -> torch.Generator:
    # Distinct for every (seed, round, client), so that no engine's order of work matters.
    return torch.Generator().manual_seed((seed * 1_000_003 + number) * 1_000_003 + client)


def _task(message: Message) -> ClientTask:
    record: ConfigRecord = message.content.config_records["config"]
    return ClientTask.from_record(record)


def _arrays(message: Message) -> ArrayRecord:
    record: ArrayRecord = message.content.array_records["arrays"]
    return record


def _node_setting(context: Context, name: str) -> int:
    value = context.node_config.get(name)
    if value is None:
        raise FedveilError(
            f"the node config has no {name}, so this client has no images; start the SuperNode "
            "with --node-config 'partition-id=0 num-partitions=10'"
        )
    return int(value)
