"""The ClientApp that every engine runs: finds its images, trains the copy it received, answers."""

from collections.abc import Callable
from functools import lru_cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.data import Dataset, Images, load_dataset, load_own_images, parse_partition
from fedveil.data.partition import partition
from fedveil.defenses.mods import transform_inputs
from fedveil.defenses.specs import parse_defense
from fedveil.errors import FedveilError
from fedveil.federation.task import UNLABELLED, ClientTask
from fedveil.federation.training import Strangers, train_locally
from fedveil.models import build_model


def transform_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Train on images transformed as the task says; hand everything else through.

    A Flower mod of its own because the task is known only once the message is there.
    """
    task = _task(message)
    if task.transform is None:
        return call_next(message, context)
    return transform_inputs(_transform(task.transform))(message, context, call_next)


app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which share of the data this client holds and how many images it has."""
    client = _node_setting(context, "partition-id")
    share = len(client_images(context, _task(message)))
    metrics = MetricRecord({"partition-id": client, "num-examples": share})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train(mods=[transform_mod])
def train(message: Message, context: Context) -> Message:
    """Train the copy that came for the local epochs; return it with the number of images."""
    torch.set_num_threads(1)
    task = _task(message)
    images = client_images(context, task)
    model = _model_for(task)
    model.load_state_dict(_arrays(message).to_torch_state_dict())
    loss = train_locally(
        model,
        images,
        task.training,
        generator=_generator(task, context),
        strangers=_strangers(message, images, task),
    )
    metrics = MetricRecord(
        {"num-examples": len(images), "loss": loss, "server-round": task.server_round}
    )
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@app.train("gradient", mods=[transform_mod])
def gradient(message: Message, context: Context) -> Message:
    """Return the gradient of one minibatch at the weights that came, as FedSGD does."""
    return _one_minibatch(message, context, lambda parameter, gradient, rate: gradient)


@app.train("step", mods=[transform_mod])
def step(message: Message, context: Context) -> Message:
    """Return the weights after one step of gradient descent on one minibatch."""
    return _one_minibatch(
        message, context, lambda parameter, gradient, rate: parameter - rate * gradient
    )


def _strangers(message: Message, images: Images, task: ClientTask) -> Strangers | None:
    """Return the server's unlabelled images, if it sent any and this client lacks a class."""
    record = message.content.array_records.get(UNLABELLED)
    lacking = int(images.labels.bincount().count_nonzero()) < len(
        _dataset(task.dataset, task.seed).classes
    )
    if record is None or not lacking:
        return None
    return Strangers(record.to_torch_state_dict()["images"], task.batch_size)


def _one_minibatch(
    message: Message, context: Context, answer: Callable[[Tensor, Tensor, float], Tensor]
) -> Message:
    torch.set_num_threads(1)
    task, images = _task(message), client_images(context, _task(message))
    client = _node_setting(context, "partition-id")
    batch = images[fedsgd_batch(len(images), task, client=client)]
    model = _model_for(task)
    model.load_state_dict(_arrays(message).to_torch_state_dict())
    loss = F.cross_entropy(model(batch.pixels), batch.labels)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    answers = {
        name: answer(parameter.detach(), gradient, task.learning_rate)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }
    metrics = MetricRecord(
        {
            "num-examples": len(batch),
            "loss": float(loss.detach()),
            "server-round": task.server_round,
        }
    )
    content = RecordDict({"arrays": ArrayRecord(answers), "metrics": metrics})
    return Message(content, reply_to=message)


def fedsgd_batch(images: int, task: ClientTask, *, client: int) -> torch.Tensor:
    """Return which of a client's images a FedSGD round uses, int64 [B].

    Rounds go through the client's images in minibatches of B, in a new random order each time all
    have been used.

    Args:
        images: How many images the client has.
        task: Gives seed, round and B.
        client: The client's partition.
    """
    batches = -(-images // task.batch_size)
    epoch, batch = divmod(max(task.server_round, 1) - 1, batches)
    order = torch.randperm(images, generator=_shuffler(task.seed, epoch, client))
    return torch.split(order, task.batch_size)[batch]


def client_images(context: Context, task: ClientTask) -> Images:
    """Return the images of one client: every image of its own folder, or its share of a dataset.

    Args:
        context: Its node config names ``data``, a folder, or ``partition-id`` and
            ``num-partitions``.
        task: Names the dataset and how it is shared out, or the classes and shape images must have.

    Raises:
        FedveilError: The images cannot be loaded or do not fit the task, the dataset cannot be
            shared out, or the node config is incomplete.
    """
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


@lru_cache(maxsize=4)
def _dataset(name: str, seed: int) -> Dataset:
    return load_dataset(name, seed=seed)


@lru_cache(maxsize=4)
def _own_images(path: str, classes: tuple[str, ...], shape: tuple[int, int, int]) -> Images:
    return load_own_images(path, classes=classes, shape=shape)


@lru_cache(maxsize=4)
def _shares(dataset: str, scheme: str, clients: int, seed: int) -> tuple[torch.Tensor, ...]:
    labels = _dataset(dataset, seed).train.labels
    return partition(labels, clients=clients, scheme=parse_partition(scheme), seed=seed)


@lru_cache(maxsize=4)
def _transform(text: str) -> nn.Module:
    return parse_defense(text).transform or nn.Identity()


@lru_cache(maxsize=4)
def _model(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    return build_model(name, shape, classes, seed=0)


def _model_for(task: ClientTask) -> nn.Module:
    if task.shape is not None:
        return _model(task.model, task.shape, len(task.classes)).train()
    dataset = _dataset(task.dataset, task.seed)
    return _model(task.model, dataset.shape, len(dataset.classes)).train()


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
