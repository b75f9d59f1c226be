"""Images parted out of mixtures of them, by where in the picture each has its edges."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.types import Shape

_SIDE = 3  # pixels of a filter's side
_POSITIONS = 4_096  # places of larger images that are looked at; more cost time and tell little
_FLAT = 1e-6  # responses below this share of the largest variance are rounding
_QUIET = 0.1  # variance, of an image's mean, that a flat place of it counts for at least
_STILL = 1e-4  # change of a direction at which the rotation has converged
_REFINEMENTS = 12
_WIDEST = 1.5  # sum of a row of one refinement at most, so that it stays invertible
_FAR = 0.05  # determinant of two sources' curvature at least: below, they look alike


def separated(rows: Tensor, shape: Shape, *, steps: int, seed: int) -> Tensor:
    """Return how rows are mixed of independent images.

    An image answers many filters at one place, all colours and directions, where it has an edge,
    and none where it is flat. So the samples of a source are not independent but come in groups
    that share a variance, which is another for every image. That tells sources apart by far fewer
    samples than their marginal distributions do: each image is the one whose groups' variances
    spread the most. First under the constraint that sources are uncorrelated, by fixed-point
    steps, then without it, by quasi-Newton steps on the likelihood, since a few thousand pixels of
    images that are independent are still correlated a little.

    Source: Hyvärinen & Hoyer, "Emergence of phase- and shift-invariant features by decomposition of
    natural images into independent feature subspaces", Neural Computation 2000 (groups that share
    a variance); Hyvärinen & Köster, "FastISA", ESANN 2006 (the fixed point); Pham & Garat, IEEE
    Trans. Signal Processing 1997, and Ablin, Cardoso & Gramfort, same 2018 (the quasi-Newton step).
    That the filters of one place make the group, whitened over all images, is ours.

    Args:
        rows: Float [r, C·H·W], mixtures of r images.
        shape: (C, H, W) of an image.
        steps: Most fixed-point steps.
        seed: Seeds the start, and which places of large images are looked at.

    Returns:
        Mixing [r, r], of the dtype of ``rows``, so that rows are ``mixing @ images``; each image
        up to sign and scale.
    """
    if len(rows) == 1:
        return torch.ones_like(rows[:, :1])
    generator = torch.Generator().manual_seed(seed)
    seen = _responses(rows, shape, generator)
    kinds, flat = seen.shape[1], seen.flatten(1)
    values, vectors = torch.linalg.eigh((flat @ flat.T / flat.shape[1]).double())
    values = values.clamp_min(values[-1].clamp_min(1e-30) * _FLAT**2)
    whitener = vectors * values.rsqrt() @ vectors.T
    white = whitener.to(flat) @ flat
    start = torch.randn(len(rows), len(rows), generator=generator).to(white)
    rotation = _rotated(torch.linalg.qr(start)[0], white, kinds, steps)
    unmixing = _refined(rotation, white, kinds)
    mixing: Tensor = torch.linalg.inv(unmixing.double() @ whitener)
    return mixing.to(rows)


def _responses(rows: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return what filters without a mean answer at each place, float32 [r, kinds, places].

    They are the cosines of small windows, whitened over all rows and places, which leaves mixtures
    mixed as they were.
    """
    images = rows.reshape(-1, 1, *shape[1:]).float()
    high, wide = (min(_SIDE, side) for side in shape[1:])
    filters = torch.einsum("ia,jb->ijab", _cosines(high), _cosines(wide)).reshape(-1, 1, high, wide)
    seen = F.conv2d(images, filters[1:] if len(filters) > 1 else filters)
    seen = seen.reshape(len(rows), -1, seen.shape[2] * seen.shape[3])
    if seen.shape[2] > _POSITIONS:
        seen = seen[:, :, torch.randperm(seen.shape[2], generator=generator)[:_POSITIONS]]
    across = seen.transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh((across @ across.T / across.shape[1]).double())
    kept = values > _FLAT * values[-1]
    whitener = (vectors[:, kept] * values[kept].rsqrt()).T
    return torch.einsum("st,rtp->rsp", whitener.to(seen), seen)


def _cosines(count: int) -> Tensor:
    """Return the orthonormal cosines of a window of ``count`` pixels, a row each."""
    places = 2 * torch.arange(count) + 1
    waves = [torch.cos(places * order * math.pi / (2 * count)) for order in range(count)]
    return F.normalize(torch.stack(waves), dim=1)


def _rotated(rotation: Tensor, white: Tensor, kinds: int, steps: int) -> Tensor:
    """Return the orthogonal unmixing [r, r] of whitened mixtures, by fixed-point steps."""
    for _ in range(steps):
        sources = rotation @ white
        weights = _weights(sources, kinds)
        turned = (weights * sources) @ white.T / white.shape[1]
        turned -= weights.mean(dim=1, keepdim=True) * rotation
        left, _, right = torch.linalg.svd(turned)
        turned, before = left @ right, rotation
        rotation = turned
        if float((1 - (turned * before).sum(dim=1).abs()).max()) < _STILL:
            break
    return rotation


def _refined(unmixing: Tensor, white: Tensor, kinds: int) -> Tensor:
    """Return the unmixing that is likelier without the constraint that sources are uncorrelated."""
    same = torch.eye(len(unmixing)).to(white)
    for _ in range(_REFINEMENTS):
        sources = unmixing @ white
        squares = sources.square()
        weights = _weights(sources, kinds)
        weights = weights / (weights * squares).mean(dim=1, keepdim=True)
        slope = (weights * sources) @ sources.T / white.shape[1] - same
        curve = weights @ squares.T / white.shape[1]
        step = (slope.T - curve.T * slope) / (curve * curve.T - 1).clamp_min(_FAR)
        step.fill_diagonal_(0)
        step *= (_WIDEST / step.abs().sum(dim=1).max().clamp_min(1e-30)).clamp_max(1)
        unmixing = unmixing + step @ unmixing
        unmixing = unmixing / (unmixing @ white).square().mean(dim=1, keepdim=True).sqrt()
    return unmixing


def _weights(sources: Tensor, kinds: int) -> Tensor:
    """Return one over the variance of each sample's place, [r, kinds · places]."""
    places = sources.reshape(len(sources), kinds, -1)
    weights = 1 / (places.square().mean(dim=1, keepdim=True) + _QUIET)
    return weights.expand_as(places).reshape(len(sources), -1)
