"""Clipping of the whole update."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedveil.defenses.protocol import Metadata, Tensors
from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Shrink an update to a largest norm.

    It hides the update's length and nothing else.

    Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018,
    section 2 (flat clipping); alone, without noise, it gives no privacy guarantee.

    Args:
        norm: Largest Euclidean norm over all parameters together, above 0.

    Raises:
        FedveilError: A norm of 0 or less.
    """

    metadata: ClassVar = Metadata(
        attack="the candidate's update is clipped too; ig compares directions, which clipping "
        "keeps",
        broken_by='Geiping et al., "Inverting Gradients", NeurIPS 2020',
        strengths=("norm=1",),
        masks=True,
    )

    norm: float

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise FedveilError(f"norm={self.norm} is out of range: give a norm above 0")

    @property
    def strength(self) -> float:
        """1 / norm."""
        return 1 / self.norm

    def __call__(self, update: Tensors, generator: SecureGenerator) -> dict[str, Tensor]:
        """Return the clipped update."""
        return self._clip(update)

    def residual(self, dummy: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Clip the candidate's update too."""
        return {name: value - observed[name] for name, value in self._clip(dummy).items()}

    def _clip(self, update: Tensors) -> dict[str, Tensor]:
        squares = sum(value.square().sum() for value in update.values())
        length = torch.as_tensor(squares).clamp_min(1e-30).sqrt()
        factor = (self.norm / length).clamp(max=1)
        return {name: value * factor.to(value) for name, value in update.items()}
