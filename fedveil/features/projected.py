"""A map centred and projected on what the server's own images vary in."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.errors import FedveilError
from fedveil.features.protocol import FeatureMap, Options, features_of


class Projected(FeatureMap):
    """Principal components, of images that are no client's, of another map's normalised features.

    Fewer features take less noise and fewer images; and centred ones use the norm of 1 that an
    image may have for what tells it from others.

    Args:
        inner: The other map.
        mean: Float32 [D], of its features scaled to norm 1.
        components: Float32 [D', D].

    Raises:
        FedveilError: Tensors do not fit the map.
    """

    name = "projected"
    mean: Tensor
    components: Tensor

    def __init__(self, inner: FeatureMap, mean: Tensor, components: Tensor) -> None:
        fits = components.ndim == 2 and components.shape[1] == inner.dimension
        if not fits or mean.shape != (inner.dimension,):
            raise FedveilError(
                f"a projection's tensors are {tuple(mean.shape)} and {tuple(components.shape)}; "
                f"allowed: ({inner.dimension},) and (D', {inner.dimension})"
            )
        super().__init__(inner.shape, len(components))
        self.inner = inner
        self.register_buffer("mean", mean.float().contiguous())
        self.register_buffer("components", components.float().contiguous())

    @property
    def options(self) -> Options:
        """Of the inner map."""
        return {"name": self.inner.name, "options": json.dumps(self.inner.options, sort_keys=True)}

    def sent(self) -> dict[str, Tensor]:
        """Return the projection, and what the inner map sends."""
        inner = {f"inner.{name}": value for name, value in self.inner.sent().items()}
        return {"mean": self.mean, "components": self.components, **inner}

    def remade(self, images: Tensor, *, seed: int) -> "Projected":
        """Return the inner map remade, and as many of its components as other images allow."""
        inner = self.inner.remade(images, seed=seed)
        count = min(self.dimension, inner.dimension, len(images) - 1)
        return project(inner, features_of(inner, images), count)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float32 [N, D']."""
        return self.of_inner(self.inner(pixels))

    def of_inner(self, rows: Tensor) -> Tensor:
        """Return the same of what the other map gives, float32 [N, D]."""
        return (F.normalize(rows, dim=1) - self.mean) @ self.components.T


def inner_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the inner map among those that ``Projected.sent`` gave."""
    prefix = "inner."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def project(
    inner: FeatureMap, features: Tensor, dimension: int, *, whitening: float = 0.0
) -> Projected:
    """Return a map's first principal components on unlabelled images.

    With ``whitening`` s a component of variance v is multiplied by v^(-s/2), up to a factor for
    all: noise is alike on all of them, and so drowns small ones first.

    Args:
        inner: The map.
        features: What it gives of images that are no client's, float [N, D].
        dimension: D', at most D and N - 1.
        whitening: From 0, which leaves variances as they are, to 1, which makes all the same.

    Raises:
        FedveilError: ``dimension`` or ``whitening`` out of range.
    """
    most = min(inner.dimension, len(features) - 1)
    if not 1 <= dimension <= most:
        raise FedveilError(
            f"{dimension} components are out of range: {len(features)} images of the server and "
            f"{inner.dimension} features allow 1 to {most}"
        )
    if not 0 <= whitening <= 1:
        raise FedveilError(f"whitening={whitening} is out of range: give 0 to 1")
    rows = F.normalize(features, dim=1).double()
    mean = rows.mean(0)
    _, lengths, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    kept = lengths[:dimension].clamp(min=1e-6 * float(lengths[0]) or 1.0)
    return Projected(inner, mean, directions[:dimension] * (kept[:1] / kept)[:, None] ** whitening)
