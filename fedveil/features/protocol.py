"""Maps from images to numbers that nobody's secret is in, and how they are told and checked."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn

from fedveil.errors import FedveilError
from fedveil.types import Shape

Options = Mapping[str, Any]

_BLOCK = 20  # images mapped at once: what they become stays in a cache


class FeatureMap(nn.Module):
    """A fixed map φ of images to D numbers; it is never trained.

    Args:
        shape: (C, H, W) of one image.
        dimension: D.

    Shape: float [N, C, H, W] in [0, 1] to float32 [N, D].
    """

    name: str
    """How it is asked for: a key of ``fedveil.features.MAPS``."""

    slow: bool = False
    """Whether its features of an image are worth keeping on disk."""

    views: int = 1
    """In how many ways an image is looked at, each of which has D numbers in its row."""

    def __init__(self, shape: Shape, dimension: int) -> None:
        super().__init__()
        self.shape = shape
        self.dimension = dimension

    @property
    def width(self) -> int:
        """Numbers in an image's row: D for each view."""
        return self.views * self.dimension

    @property
    def options(self) -> Options:
        """What ``rebuild`` needs besides the tensors that are sent; JSON can hold it."""
        return {}

    def sent(self) -> dict[str, Tensor]:
        """Return the tensors a client has to be sent; what it can load itself is not among them."""
        return {}

    def remade(self, images: Tensor, *, seed: int) -> "FeatureMap":
        """Return a map of this kind made of other images; itself where it is made of none.

        Args:
            images: uint8, or float in [0, 1], [N, C, H, W], at least two.
            seed: Seeds what is drawn.
        """
        return self

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of images."""


@dataclass(frozen=True)
class MapDescription:
    """What a client is told of a map, with a digest that pins every number of it.

    Attributes:
        name: A key of ``fedveil.features.MAPS``, or ``package.module:factory``.
        shape: (C, H, W) of one image.
        dimension: D.
        options: JSON text of the map's options.
        digest: SHA-256 of all of the above and of every tensor, hexadecimal.
    """

    name: str
    shape: Shape
    dimension: int
    options: str
    digest: str

    @classmethod
    def of(cls, features: FeatureMap) -> "MapDescription":
        """Describe a map."""
        options = json.dumps(features.options, sort_keys=True)
        told = [features.name, list(features.shape), features.dimension, options]
        digest = sha256(json.dumps(told).encode())
        for name, value in sorted(features.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().numpy().tobytes())
        return cls(features.name, features.shape, features.dimension, options, digest.hexdigest())

    @classmethod
    def from_record(cls, record: ConfigRecord) -> "MapDescription":
        """Read a record as ``to_record`` wrote it.

        Raises:
            FedveilError: It describes no map.
        """
        name, options, digest = (record.get(key) for key in ("name", "options", "digest"))
        shape, dimension = record.get("shape"), record.get("dimension")
        if not (
            all(isinstance(text, str) for text in (name, options, digest))
            and isinstance(shape, list)
            and len(shape) == 3
            and all(type(side) is int and side > 0 for side in shape)
            and type(dimension) is int
            and dimension > 0
        ):
            raise FedveilError(
                "the server's message describes no feature map; it must be of this version"
            )
        sides = (int(shape[0]), int(shape[1]), int(shape[2]))
        return cls(str(name), sides, dimension, str(options), str(digest))

    def to_record(self) -> ConfigRecord:
        """Return the record for a message."""
        return ConfigRecord(
            {
                "name": self.name,
                "shape": list(self.shape),
                "dimension": self.dimension,
                "options": self.options,
                "digest": self.digest,
            }
        )


def features_of(features: FeatureMap, pixels: Tensor) -> Tensor:
    """Return the features of any number of images, a block at a time, float32 [N, width].

    Args:
        features: The map.
        pixels: uint8, or float in [0, 1], [N, C, H, W].

    Raises:
        FedveilError: The map gave something else, or what is not finite.
    """
    found = torch.empty(len(pixels), features.width)
    with torch.inference_mode():
        for start in range(0, len(pixels), _BLOCK):
            block = pixels[start : start + _BLOCK]
            floats = block if block.is_floating_point() else block.float().div_(255)
            found[start : start + _BLOCK] = _checked(features, features(floats), len(block))
    return found


def _checked(features: FeatureMap, block: object, images: int) -> Tensor:
    wanted = (images, features.width)
    if not isinstance(block, Tensor) or block.shape != wanted:
        got = tuple(block.shape) if isinstance(block, Tensor) else type(block).__name__
        raise FedveilError(
            f"feature map {features.name} returns {got} for {images} images; "
            f"{wanted} is needed, a row an image"
        )
    if not bool(block.isfinite().all()):
        raise FedveilError(
            f"feature map {features.name} returns NaN or infinity; give one whose features are "
            "finite for every image"
        )
    return block
