"""Gradient pruning, also called compression."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedveil.defenses.protocol import BALUNOVIC, WU, Metadata, Tensors
from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator


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
