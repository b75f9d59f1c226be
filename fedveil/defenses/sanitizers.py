"""Changes of the update that a client returns: clipping, pruning and Gaussian noise."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedveil.defenses.protocol import BALUNOVIC, WU, Metadata, Tensors, difference
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


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Set the smallest entries of every tensor of an update to zero.

    Source: Zhu, Liu & Han, "Deep Leakage from Gradients", NeurIPS 2019, section 5.2, after Lin et
    al., "Deep Gradient Compression", ICLR 2018; without the error feedback of the latter, which
    would send what is left out later.

    Args:
        share: Share of the entries that becomes zero, 0 to below 1; at least one entry is kept.

    Raises:
        FedveilError: A share out of range.
    """

    metadata: ClassVar = Metadata(
        attack="only entries that were sent are compared",
        broken_by=f"{BALUNOVIC}; {WU}",
        strengths=("share=0.7", "share=0.9", "share=0.99"),
        masks=True,
    )

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise FedveilError(f"share={self.share} is out of range: give 0 to below 1")

    @property
    def strength(self) -> float:
        """Share of the entries that is lost."""
        return self.share

    def __call__(self, update: Tensors, generator: SecureGenerator) -> dict[str, Tensor]:
        """Return the pruned update."""
        return {name: self._prune(value) for name, value in update.items()}

    def residual(self, dummy: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Compare the entries that were sent only."""
        return {
            name: torch.where(observed[name] != 0, value - observed[name], torch.zeros_like(value))
            for name, value in dummy.items()
        }

    def _prune(self, value: Tensor) -> Tensor:
        if not value.numel():
            return value
        kept = max(1, round(value.numel() * (1 - self.share)))
        largest = value.abs().flatten().topk(kept).indices
        mask = torch.zeros(value.numel(), dtype=torch.bool, device=value.device)
        mask[largest] = True
        return torch.where(mask.reshape(value.shape), value, torch.zeros_like(value))


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
