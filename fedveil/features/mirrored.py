"""A map that looks at an image and at its mirror image."""

import json

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.features.protocol import FeatureMap, Options


class Mirrored(FeatureMap):
    """An image's features and its mirror image's, scaled to norm 1: their half sum and difference.

    With a and b the two, a row is (m, d) with m = (a + b)/2 and d = (a - b)/2, of norm 1 as each of
    them is. Since (aaᵀ + bbᵀ)/2 = mmᵀ + ddᵀ and (a + b)yᵀ/2 = myᵀ, sums over such rows are those of
    both images, each of which counts half: twice as much for a classifier to learn from, and no
    more of a single image in the sums than without. What an image is told by is m.

    Args:
        inner: The other map.

    Shape: float [N, C, H, W] in [0, 1] to float32 [N, 2·D].
    """

    name = "mirrored"
    views = 2

    def __init__(self, inner: FeatureMap) -> None:
        super().__init__(inner.shape, inner.dimension)
        self.inner = inner

    @property
    def options(self) -> Options:
        """Of the inner map."""
        return {"name": self.inner.name, "options": json.dumps(self.inner.options, sort_keys=True)}

    def sent(self) -> dict[str, Tensor]:
        """Return what the inner map sends."""
        return {f"inner.{name}": value for name, value in self.inner.sent().items()}

    def remade(self, images: Tensor, *, seed: int) -> "Mirrored":
        """Return the inner map remade, and mirrored."""
        return Mirrored(self.inner.remade(images, seed=seed))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the rows (m, d)."""
        return of_views(self.inner(pixels), self.inner(pixels.flip(3)))


def of_views(upright: Tensor, mirrored: Tensor) -> Tensor:
    """Return the rows (m, d) of features of images and of their mirror images.

    Args:
        upright: Float [N, D].
        mirrored: Float [N, D].
    """
    one, other = F.normalize(upright, dim=1), F.normalize(mirrored, dim=1)
    return torch.cat([one + other, one - other], 1) / 2
