"""Gaussian noise on the update that a client returns."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedveil.defenses.protocol import BALUNOVIC, WU, Metadata, Tensors, difference
from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator


@dataclass(frozen=True, kw_only=True)
class GaussianNoise:
    """Add independent normal values to every entry of an update.

    The unit is the update's own root mean square over all parameters, so one number means the same
    for a gradient, for a difference of weights and for every model. Without clipping to a fixed
    norm this is no differential privacy.

    Source: Zhu, Liu & Han, "Deep Leakage from Gradients", NeurIPS 2019, section 5.1, where the unit
    is absolute.

    Args:
        ratio: Standard deviation, as a share of the update's root mean square; at least 0.

    Raises:
        FedveilError: A ratio below 0.
    """

    metadata: ClassVar = Metadata(
        attack="priors on images in ig; nothing is masked",
        broken_by=f"{BALUNOVIC}; {WU}",
        strengths=("ratio=0.3", "ratio=1", "ratio=2", "ratio=3", "ratio=10"),
    )

    ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < math.inf:
            raise FedveilError(f"ratio={self.ratio} is out of range: give 0 or more")

    @property
    def strength(self) -> float:
        """Standard deviation over the update's root mean square."""
        return self.ratio

    def __call__(self, update: Tensors, generator: SecureGenerator) -> dict[str, Tensor]:
        """Return the noisy update."""
        squares = sum(float(value.double().square().sum()) for value in update.values())
        count = sum(value.numel() for value in update.values())
        sigma = self.ratio * math.sqrt(squares / count)
        return {
            name: (value.double() + sigma * generator.normal(*value.shape).to(value.device)).to(
                value.dtype
            )
            for name, value in update.items()
        }

    def residual(self, dummy: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Compare everything: no entry is worth more than another."""
        return difference(dummy, observed)
