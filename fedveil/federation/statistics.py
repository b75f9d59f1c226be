"""What a client of an analytic federation does: it sums over its images, and answers no less."""

import hashlib
import json
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedveil.analytic import Statistics, rows_of
from fedveil.analytic.privacy import GaussianRelease, Unit, noise_sharers
from fedveil.data import Images
from fedveil.errors import FedveilError
from fedveil.features import FeatureMap, MapDescription, names_of, rebuild
from fedveil.federation.permission import check_epsilon, check_model_allowed
from fedveil.federation.secagg.client import WORDS, Sum, announced_sum
from fedveil.progress import PlainLines
from fedveil.secure_random import SecureGenerator

FEATURES = "features"
"""Record of a message, and key of a node config: the map, and the one digest a node answers to."""

ASKED = "statistics"
"""Record of a message that holds a ``StatisticsTask``."""

RATIO = "images-per-feature"
"""Key of a node config: this node is part of sums of so many images a feature only."""

LEAST_RATIO = 4.0
"""Images a feature below which no client answers: fewer lie alone in the span of their sum.

It hides nobody from whoever has public images to trace by; that takes noise.
"""


class StatisticsTask(BaseModel):
    """What is asked of a client besides the map.

    Attributes:
        classes: K.
        most_images: How many of its images a client sums at most; None for all.
        images_per_feature: Images that a sum under secure aggregation has for each feature;
            of no matter where there is noise.
        epsilon: ε of the sums' noise; None for none.
        delta: δ of it.
        unit: Whom it protects.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: int = Field(ge=1)
    most_images: int | None = Field(default=None, ge=1)
    images_per_feature: float = Field(default=LEAST_RATIO, ge=0)
    epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    unit: Unit = "image"

    @property
    def release(self) -> GaussianRelease | None:
        """The noise that is asked for."""
        if self.epsilon is None:
            return None
        return GaussianRelease(self.epsilon, self.delta, self.unit)

    @classmethod
    def from_record(cls, record: ConfigRecord) -> "StatisticsTask":
        """Read the record of a message; keys have - where names have _."""
        return cls.model_validate({key.replace("-", "_"): record[key] for key in record})

    def to_record(self) -> ConfigRecord:
        """Return the record for a message."""
        settings = self.model_dump(exclude_none=True)
        return ConfigRecord({key.replace("_", "-"): value for key, value in settings.items()})


def answer_statistics(
    message: Message, context: Context, images: Images, *, server_round: int, seed: int
) -> Message:
    """Return the sums over a client's images.

    Args:
        message: Describes the map, holds the tensors it is made of, and what is asked.
        context: Whose node config may pin the map and the size of the sums.
        images: The client's.
        server_round: The round, which the answer repeats.
        seed: Seeds which images are left out where a client has more than are asked for.

    Raises:
        FedveilError: The map is not the one described or allowed, or the sum would show this
            client's images.
    """
    records = message.content.config_records
    description = MapDescription.from_record(records[FEATURES])
    task = StatisticsTask.from_record(records[ASKED])
    _check_pinned(description, context)
    together = announced_sum(message, context)
    check_epsilon(task.epsilon, context)
    if task.release is None:
        _check_sum(description, task, together, context)
    features = _map(description, message.content.array_records["arrays"])
    some = at_most(images, task.most_images, seed)
    words = _released(_summed(features, some, task.classes), task, together).words
    metrics = MetricRecord({"num-examples": len(some), "server-round": server_round})
    content = RecordDict({"arrays": ArrayRecord({WORDS: words}), "metrics": metrics})
    return Message(content, reply_to=message)


def summing(images: Callable[[Context], Images], *, config: str = "config") -> ClientAppCallable:
    """Return what answers ``Analytic`` for a Flower app of one's own.

    Nothing is trained on the client: it returns sums over the features of its images. With
    ``secure_aggregation_mod`` among the app's mods, and a query function, the server learns the
    sum of all clients alone; a function for plain train messages must be registered, too, since
    its stages come as such.

    Args:
        images: Returns a client's images and labels: uint8, or float32 in [0, 1], [N, C, H, W].
        config: Name of the record in which a message's settings come.

    Example:
        >>> app.train("statistics")(summing(own_images))  # doctest: +SKIP
    """

    def answer(message: Message, context: Context) -> Message:
        number = message.content.config_records[config]["server-round"]
        if not isinstance(number, int):
            raise FedveilError(f"the message's server-round is {number!r}; allowed: a whole number")
        return answer_statistics(
            message, context, images(context), server_round=number, seed=number
        )

    return answer


def least_images(ratio: float, dimension: int) -> int:
    """Return of how many images a sum of D features must be: ``ratio``·D, rounded up."""
    return math.ceil(ratio * dimension)


def _check_pinned(description: MapDescription, context: Context) -> None:
    # Before it is made: the name of a map may be that of a module to import.
    for name in names_of(description):
        if ":" in name:
            check_model_allowed(name, context)
    pinned = context.node_config.get(FEATURES)
    if pinned is not None and pinned != description.digest:
        raise FedveilError(
            f"this node's config allows the feature map with SHA-256 {pinned}, and the server "
            f"asked for {description.name} with {description.digest}; a server that chooses the "
            "map freely can choose one that singles somebody out: ask the site to allow it"
        )


def _check_sum(
    description: MapDescription, task: StatisticsTask, together: Sum | None, context: Context
) -> None:
    if together is None:
        return
    own = float(context.node_config.get(RATIO, LEAST_RATIO))
    least = least_images(max(own, LEAST_RATIO, task.images_per_feature), description.dimension)
    if together.images < least:
        raise FedveilError(
            f"the sum is of {together.images} images, and of {description.dimension} features it "
            f"takes {least} and more not to show single ones; ask for fewer features (--filters), "
            "or for more clients a round (--fraction)"
        )


def _released(sums: Statistics, task: StatisticsTask, together: Sum | None) -> Statistics:
    if task.release is None:
        return sums
    most, unit = task.most_images, task.unit
    if most is None and unit == "client":
        raise FedveilError(
            "the server asks for noise that hides a client, and does not bound how many images "
            "one sums; train with a --weight-limit above 0"
        )
    sharers = noise_sharers(together.clients if together else None)
    # Fresh bits: no seed of the run's may foretell what protects somebody.
    return task.release.noised(sums, SecureGenerator(), most_images=most or 1, sharers=sharers)


def at_most(images: Images, most: int | None, seed: int) -> Images:
    """Return those of a client's images that it sums: all, or as many as it is asked for.

    Args:
        images: The client's.
        most: How many are asked for at most; None for all.
        seed: Of the run.
    """
    if most is None or len(images) <= most:
        return images
    generator = torch.Generator().manual_seed(seed)
    return images[torch.randperm(len(images), generator=generator)[:most]]


def _summed(features: FeatureMap, images: Images, classes: int) -> Statistics:
    lines = PlainLines(patient=True)
    rows = rows_of(
        features,
        images.raw,
        on_block=lambda done: lines("features of images:", done, len(images)),
    )
    return Statistics.of(rows, images.labels, classes=classes, dimension=features.dimension)


def _map(description: MapDescription, record: ArrayRecord) -> FeatureMap:
    tensors = record.to_torch_state_dict()
    return _made(description, _Tensors(tensors))


class _Tensors:
    """Tensors that are equal where all their bytes are, to be remembered by."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        told = hashlib.sha256()
        for name, value in sorted(tensors.items()):
            told.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            told.update(value.contiguous().numpy().tobytes())
        self._digest = told.digest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensors) and self._digest == other._digest


@lru_cache(maxsize=1)
def _made(description: MapDescription, tensors: _Tensors) -> FeatureMap:
    # One process serves many clients, who are told of the same map.
    return rebuild(description, tensors.tensors)
