"""The images that a known linear transformation can produce."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedveil.errors import FedveilError
from fedveil.types import Shape

_PROBES = 512
_RANK_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Subspace:
    """Images ``x = U·z``.

    Attributes:
        basis: Float64 [C·H·W, R], orthonormal columns; None for every image there is.
        shape: (C, H, W).
    """

    basis: Tensor | None
    shape: Shape

    @property
    def size(self) -> int:
        """Number of unknowns R."""
        return math.prod(self.shape) if self.basis is None else self.basis.shape[1]

    def to(self, like: Tensor) -> "Subspace":
        """Return the subspace with the dtype and device of ``like``."""
        return self if self.basis is None else Subspace(self.basis.to(like), self.shape)

    def images(self, coordinates: Tensor) -> Tensor:
        """Map coordinates [..., R] to images [..., C, H, W]."""
        flat = coordinates if self.basis is None else coordinates @ self.basis.T
        return flat.reshape(*flat.shape[:-1], *self.shape)

    def coordinates(self, images: Tensor) -> Tensor:
        """Map images [..., C, H, W] to the coordinates [..., R] of the nearest image inside."""
        flat = images.flatten(-3)
        return flat if self.basis is None else flat @ self.basis


def range_of(transform: nn.Module | None, shape: Shape) -> Subspace:
    """Return the range of a linear transformation, exactly and whatever its form.

    The operator's matrix comes from applying it to every unit image. Pixels that no chain of
    non-zero entries joins are independent, so a block-wise transformation costs one small singular
    value decomposition a block, a global one a single large one.

    Args:
        transform: Linear module, float [N, C, H, W] to the same shape; None for the identity.
        shape: (C, H, W) of one image.

    Raises:
        FedveilError: The transformation is not linear, or changes the shape.
    """
    if transform is None:
        return Subspace(None, shape)
    matrix = _matrix(transform, shape)
    size = len(matrix)
    members = _components(matrix)
    columns: list[Tensor] = []
    for width in sorted({len(group) for group in members}):
        index = torch.stack([group for group in members if len(group) == width])
        blocks = matrix[index[:, :, None], index[:, None, :]]
        left, values, _ = torch.linalg.svd(blocks)
        scale = values.amax().clamp_min(1e-30)
        for pixels, vectors, strength in zip(index, left, values, strict=True):
            kept = vectors[:, strength > _RANK_TOLERANCE * scale]
            column = matrix.new_zeros(size, kept.shape[1])
            column[pixels] = kept
            columns.append(column)
    return Subspace(torch.cat(columns, dim=1), shape)


def _matrix(transform: nn.Module, shape: Shape) -> Tensor:
    size = math.prod(shape)
    name = type(transform).__name__
    with torch.no_grad():
        zero = transform(torch.zeros(1, *shape, dtype=torch.float64))
        if zero.shape != (1, *shape):
            raise FedveilError(
                f"transformation {name} turns images of shape {shape} into "
                f"{tuple(zero.shape[1:])}; an attack needs one that keeps the shape"
            )
        images = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
        rows = torch.cat([transform(part).flatten(1) for part in torch.split(images, _PROBES)])
        probe = torch.linspace(0.1, 0.9, size, dtype=torch.float64).sin()
        image = transform(probe.reshape(1, *shape)).flatten()
    if zero.abs().max() > 1e-6 or not torch.allclose(probe @ rows, image, atol=1e-5):
        raise FedveilError(
            f"transformation {name} is not linear, so its images form no subspace; "
            "attack it as the naive attacker does, without knows="
        )
    return rows.T


def _components(matrix: Tensor) -> list[Tensor]:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    linked = (matrix.abs() > 1e-12).numpy()
    count, label = connected_components(csr_array(linked), directed=False)
    labels = torch.from_numpy(label)
    return [torch.nonzero(labels == group)[:, 0] for group in range(count)]
