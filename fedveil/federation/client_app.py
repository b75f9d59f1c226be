"""The ClientApp that every engine runs: finds its images, trains the copy it received, answers."""

from functools import lru_cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedveil.data import Dataset, Images, load_dataset, parse_partition
from fedveil.data.partition import partition
from fedveil.errors import FedveilError
from fedveil.federation.task import ClientTask
from fedveil.federation.training import train_locally
from fedveil.models import build_model

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which share of the data this client holds and how many images it has."""
    client = _node_setting(context, "partition-id")
    share = len(client_index(context, _task(message)))
    metrics = MetricRecord({"partition-id": client, "num-examples": share})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the copy that came for the local epochs; return it with the number of images."""
    torch.set_num_threads(1)
    task = _task(message)
    images = client_images(context, task)
    model = _model_for(task)
    model.load_state_dict(_arrays(message).to_torch_state_dict())
    loss = train_locally(model, images, task.training, generator=_generator(task, context))
    metrics = MetricRecord(
        {"num-examples": len(images), "loss": loss, "server-round": task.server_round}
    )
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


def client_images(context: Context, task: ClientTask) -> Images:
    """Return the images of one client.

    Args:
        context: Its node config names ``partition-id`` and ``num-partitions``.
        task: Names the dataset and how it is shared out.

    Raises:
        FedveilError: The dataset cannot be loaded or shared out, or the node config is incomplete.
    """
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
def _shares(dataset: str, scheme: str, clients: int, seed: int) -> tuple[torch.Tensor, ...]:
    labels = _dataset(dataset, seed).train.labels
    return partition(labels, clients=clients, scheme=parse_partition(scheme), seed=seed)


@lru_cache(maxsize=4)
def _model(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    return build_model(name, shape, classes, seed=0)


def _model_for(task: ClientTask) -> nn.Module:
    dataset = _dataset(task.dataset, task.seed)
    return _model(task.model, dataset.shape, len(dataset.classes)).train()


def _generator(task: ClientTask, context: Context) -> torch.Generator:
    # Distinct for every (seed, round, client), so that no engine's order of work matters.
    client = _node_setting(context, "partition-id")
    seed = (task.seed * 1_000_003 + task.server_round) * 1_000_003 + client
    return torch.Generator().manual_seed(seed)


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
