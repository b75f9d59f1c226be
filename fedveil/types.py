"""Types that every part of the package means the same by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # settings are read without PyTorch
    from torch import Tensor

Weights = Mapping[str, "Tensor"]
"""A model's state: the name of each tensor to it."""

Shape = tuple[int, int, int]
"""(C, H, W) of an image."""

UpdateKind = Literal["gradient", "step", "fedavg"]
"""What a client returns: a gradient, or its weights after one local step or after training."""


@dataclass(frozen=True)
class Copy:
    """A model that a client received.

    Attributes:
        round: Round, from 1.
        client: Partition of the client.
        weights: Exactly what it was sent, parameters and buffers by name.
    """

    round: int
    client: int
    weights: Weights
