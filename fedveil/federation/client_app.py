"""The ClientApp that every engine runs: finds its images, trains the copy it received, answers."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import nn

from fedveil.data import Dataset, Images, load_dataset, parse_partition
from fedveil.data.partition import partition
from fedveil.errors import FedveilError
from fedveil.federation.training import LocalTraining, train_locally
from fedveil.models import build_model

_MISSING = "without partition-id and num-partitions in its node config a client has no images; "


def client_config(settings: Mapping[str, Any]) -> ConfigRecord:
    """Return what a client is told: its task, and nothing of the cap, the noise or the groups.

    Args:
        settings: A ``TrainConfig`` as a dictionary.
    """
    told = (
        "dataset",
        "model",
        "partition",
        "transform",
        "epochs",
        "batch_size",
        "learning_rate",
        "momentum",
        "clip",
        "seed",
    )
    return ConfigRecord(
        {key.replace("_", "-"): settings[key] for key in told if settings[key] is not None}
    )


app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which share of the data this client holds and how many images it has."""
    config = _config(message)
    metrics = MetricRecord(
        {
            "partition-id": _node_setting(context, "partition-id"),
            "num-examples": len(client_index(context, config)),
        }
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the copy that came for the local epochs; return it with the number of images."""
    torch.set_num_threads(1)
    config = _config(message)
    images = client_images(context, config)
    dataset = _dataset(str(config["dataset"]), int(config["seed"]))  # type: ignore[arg-type]
    model = _model(str(config["model"]), dataset.shape, len(dataset.classes))
    arrays: ArrayRecord = message.content["arrays"]  # type: ignore[assignment]
    model.load_state_dict(arrays.to_torch_state_dict())
    model.train()
    loss = train_locally(model, images, _training(config), generator=_generator(config, context))
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord(
                {
                    "num-examples": len(images),
                    "loss": loss,
                    "server-round": int(config["server-round"]),  # type: ignore[arg-type]
                }
            ),
        }
    )
    return Message(content, reply_to=message)


def client_images(context: Context, config: ConfigRecord) -> Images:
    """Return the images of one client.

    Args:
        context: Its node config names ``partition-id`` and ``num-partitions``.
        config: The task, with ``dataset``, ``partition`` and ``seed``.

    Raises:
        FedveilError: The dataset cannot be loaded or shared out, or the node config is incomplete.
    """
    dataset = _dataset(str(config["dataset"]), int(config["seed"]))  # type: ignore[arg-type]
    return dataset.train[client_index(context, config)]


def client_index(context: Context, config: ConfigRecord) -> torch.Tensor:
    """Return which training images belong to one client, int64 [n]."""
    shares = _shares(
        str(config["dataset"]),
        str(config["partition"]),
        _node_setting(context, "num-partitions"),
        int(config["seed"]),  # type: ignore[arg-type]
    )
    return shares[_node_setting(context, "partition-id")]


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


def _training(config: ConfigRecord) -> LocalTraining:
    clip = config.get("clip")
    return LocalTraining(
        epochs=int(config["epochs"]),  # type: ignore[arg-type]
        batch_size=int(config["batch-size"]),  # type: ignore[arg-type]
        learning_rate=float(config["learning-rate"]),  # type: ignore[arg-type]
        momentum=float(config["momentum"]),  # type: ignore[arg-type]
        clip=None if clip is None else float(clip),  # type: ignore[arg-type]
    )


def _generator(config: ConfigRecord, context: Context) -> torch.Generator:
    # Distinct for every (seed, round, client), so that no engine's order of work matters.
    seed, round_number = int(config["seed"]), int(config["server-round"])  # type: ignore[arg-type]
    client = _node_setting(context, "partition-id")
    return torch.Generator().manual_seed((seed * 1_000_003 + round_number) * 1_000_003 + client)


def _config(message: Message) -> ConfigRecord:
    return message.content["config"]  # type: ignore[return-value]


def _node_setting(context: Context, name: str) -> int:
    value = context.node_config.get(name)
    if value is None:
        raise FedveilError(
            _MISSING + "start the SuperNode with --node-config 'partition-id=0 num-partitions=10'"
        )
    return int(value)
