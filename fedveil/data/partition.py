"""Who gets which images: the partition of a training set over clients."""

import hashlib
import heapq
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedveil.data import cache
from fedveil.errors import FedveilError
from fedveil.wording import quantity

_Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Iid:
    """Every client draws from all images alike; sizes differ by one image at most."""

    def __str__(self) -> str:
        return "iid"


@dataclass(frozen=True)
class Dirichlet:
    """A client's share of each class follows a Dirichlet distribution (arXiv:1905.12022).

    Attributes:
        alpha: Greater than 0. Small: clients hold few classes, in unequal numbers. Large: like
            ``Iid``.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise FedveilError(
                f"the Dirichlet partition's alpha is {self.alpha}; it must be a number above 0, "
                "like 0.5."
            )

    def __str__(self) -> str:
        return f"dirichlet:{self.alpha}"


@dataclass(frozen=True)
class Shards:
    """Images sorted by class, cut into equal shards, a few to a client (arXiv:1602.05629).

    Attributes:
        per_client: Shards a client receives, at least 1. It sees about as many classes.
    """

    per_client: int = 2

    def __post_init__(self) -> None:
        if self.per_client < 1:
            raise FedveilError(
                f"the shards per client are {self.per_client}; they must be a whole number from 1, "
                "like 2."
            )

    def __str__(self) -> str:
        return f"shards:{self.per_client}"


Partition = Iid | Dirichlet | Shards

_SCHEMES: Mapping[str, tuple[Callable[..., Partition], Callable[[str], Any] | None]] = {
    "iid": (Iid, None),
    "dirichlet": (Dirichlet, float),
    "shards": (Shards, int),
}
_FORMS = "iid, dirichlet:ALPHA (like dirichlet:0.5) or shards:PER_CLIENT (like shards:2)"


def parse_partition(text: str) -> Partition:
    """Return the scheme that ``text`` names.

    Args:
        text: ``iid``, ``dirichlet:0.3`` or ``shards:2``; without a number, the scheme's default.

    Returns:
        The scheme; its ``str`` is such a text again.

    Raises:
        FedveilError: The scheme is unknown, or its number is missing, malformed or out of range.
    """
    name, colon, number = text.strip().lower().partition(":")
    if name not in _SCHEMES:
        raise FedveilError(f"unknown partition {text!r}; use {_FORMS}.")
    scheme, read = _SCHEMES[name]
    if not colon:
        return scheme()
    if read is None:
        raise FedveilError(f"the partition {text!r} takes no number; use {name}.")
    try:
        value = read(number)
    except ValueError as error:
        kind = "a whole number" if read is int else "a number"
        raise FedveilError(
            f"the partition {text!r} has {number!r} where {kind} belongs; use {_FORMS}."
        ) from error
    return scheme(value)


def partition(labels: Tensor, *, clients: int, scheme: Partition, seed: int) -> tuple[Tensor, ...]:
    """Share images out among clients.

    Args:
        labels: int64 [N], the class of each image.
        clients: From 1 to N.
        scheme: How to share.
        seed: At least 0. The same arguments give the same partition.

    Returns:
        For each client, the int64 indices of its images: at least one a client, every image with
        exactly one client. A client that a Dirichlet draw leaves empty receives an image of the
        largest client; images that equal shards leave over go to clients that know their class.

    Raises:
        FedveilError: Not enough images, or ``clients`` or ``seed`` out of range.
    """
    _check(len(labels), clients, scheme, seed)
    content = labels.to(torch.int64).numpy()
    key = "clients-" + cache.digest(
        _digest(content), clients, str(scheme), seed, version("flwr-datasets")
    )
    entry = cache.read(key)
    if entry is None:
        parts = _draw(content, clients, scheme, seed)
        sizes = torch.tensor([len(part) for part in parts])
        tensors = {"indices": torch.from_numpy(np.concatenate(parts)), "sizes": sizes}
        cache.write(key, tensors, [])
    else:
        tensors = entry[0]
    return torch.split(tensors["indices"], tensors["sizes"].tolist())


def _digest(labels: _Indices) -> str:
    return hashlib.blake2b(labels.tobytes(), digest_size=16).hexdigest()


def _check(images: int, clients: int, scheme: Partition, seed: int) -> None:
    if clients < 1:
        raise FedveilError(f"the number of clients is {clients}; it must be at least 1.")
    if seed < 0:
        raise FedveilError(f"the seed is {seed}; it must be at least 0.")
    if clients > images:
        raise FedveilError(
            f"{clients} clients cannot share {quantity(images, 'training image')}: each needs at "
            f"least one. Use at most {quantity(images, 'client')} (--clients {images}), or a "
            "larger dataset."
        )
    if isinstance(scheme, Shards) and clients * scheme.per_client > images:
        raise FedveilError(
            f"{quantity(clients, 'client')} with {quantity(scheme.per_client, 'shard')} each need "
            f"{clients * scheme.per_client} images, but there are {images}. Use fewer clients "
            f"(--clients), or --partition "
            f"shards:{images // clients}."
        )


def _draw(labels: _Indices, clients: int, scheme: Partition, seed: int) -> list[_Indices]:
    """Return each client's indices into ``labels``."""
    # The partitioners cut in the order given, which in a file may follow time, place or class.
    order = np.random.default_rng([seed, 0]).permutation(len(labels)).astype(np.int64)
    shuffled = labels[order]
    match scheme:
        case Iid():
            # What flwr-datasets' IidPartitioner does, without a dataset object for each client:
            # that takes 11 s for 10,000 of them.
            positions = np.array_split(np.arange(len(labels)), clients)
        case Dirichlet(alpha):
            positions = _fill_empty(_draw_dirichlet(shuffled, clients, alpha, seed))
        case Shards(per_client):
            positions = _deal_rest(_draw_shards(shuffled, clients, per_client, seed), shuffled)
    return [order[part] for part in positions]


def _draw_dirichlet(labels: _Indices, clients: int, alpha: float, seed: int) -> list[_Indices]:
    from flwr_datasets.partitioner import DirichletPartitioner

    # With a minimum, the partitioner draws anew until all have it, and gives up after ten draws:
    # with many clients or a small alpha that is always. Empty clients are filled afterwards.
    partitioner = DirichletPartitioner(
        num_partitions=clients, partition_by="label", alpha=alpha, min_partition_size=0, seed=seed
    )
    return _positions(partitioner, labels)


def _draw_shards(labels: _Indices, clients: int, per_client: int, seed: int) -> list[_Indices]:
    from flwr_datasets.partitioner import ShardPartitioner

    partitioner = ShardPartitioner(
        num_partitions=clients, partition_by="label", num_shards_per_partition=per_client, seed=seed
    )
    return _positions(partitioner, labels)


def _positions(partitioner: Any, labels: _Indices) -> list[_Indices]:
    """Return each client's positions in ``labels``."""
    import datasets

    partitioner.dataset = datasets.Dataset.from_dict(
        {"label": labels, "position": np.arange(len(labels))}
    )
    with warnings.catch_warnings():
        # Of pyarrow to datasets, about how it sorts: nothing a user could act on.
        warnings.simplefilter("ignore", FutureWarning)
        clients = partitioner.num_partitions  # asking for it is what draws the partition
    # Its dataset, not ours: to cut shards the partitioner has sorted it by class.
    position = np.asarray(partitioner.dataset.with_format("numpy")["position"][:])
    # Private, but the public way makes a dataset object for each client: 15 s for 10,000 of them.
    rows = partitioner._partition_id_to_indices
    return [position[np.asarray(rows[client], dtype=np.int64)] for client in range(clients)]


def _fill_empty(parts: list[_Indices]) -> list[_Indices]:
    """Give every empty client one image of the client that has most at that moment."""
    heap = [(-len(part), client) for client, part in enumerate(parts)]
    heapq.heapify(heap)
    for client in (client for client, part in enumerate(parts) if not len(part)):
        size, donor = heapq.heappop(heap)
        parts[client], parts[donor] = parts[donor][-1:], parts[donor][:-1]
        heapq.heappush(heap, (size + 1, donor))
    return parts


def _deal_rest(parts: list[_Indices], labels: _Indices) -> list[_Indices]:
    """Deal out what no shard holds, each image to the smallest client that knows its class."""
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate(parts))
    extra: list[list[int]] = [[] for _ in parts]
    for label in np.unique(labels[rest]):
        knowing = [c for c, part in enumerate(parts) if label in labels[part]]
        heap = [(len(parts[c]) + len(extra[c]), c) for c in knowing or range(len(parts))]
        heapq.heapify(heap)
        for image in rest[labels[rest] == label]:
            size, client = heap[0]
            extra[client].append(int(image))
            heapq.heapreplace(heap, (size + 1, client))
    return [
        np.concatenate([part, np.asarray(more, dtype=np.int64)])
        for part, more in zip(parts, extra, strict=True)
    ]
