"""Features of a slow map, kept on this machine between runs."""

from collections.abc import Iterator
from hashlib import sha256

import torch
from torch import Tensor

from fedveil.data import cache
from fedveil.features.mirrored import Mirrored, of_views
from fedveil.features.projected import Projected
from fedveil.features.protocol import FeatureMap, MapDescription, features_of

_IMAGES = 500  # whose features are held, and kept, at once
_FORMAT = 1  # raise it whenever the same map and images have other features


def blocks_of_features(features: FeatureMap, pixels: Tensor) -> Iterator[Tensor]:
    """Yield the features of any number of images, float32 [500, width] at a time.

    Those of a slow map are kept under its digest and the images' content: another run reads them,
    and one that was killed goes on with the next block. Of a map that is made of another those of
    the slow one beneath are kept, which it shares with others.

    Args:
        features: The map.
        pixels: uint8, or float in [0, 1], [N, C, H, W].

    Raises:
        FedveilError: As ``features_of``.
    """
    slow = slow_beneath(features)
    pinned = MapDescription.of(slow).digest if slow else ""
    for block in torch.split(pixels, _IMAGES):
        yield _block(features, block, pinned) if slow else features_of(features, block)


def slow_beneath(features: FeatureMap) -> FeatureMap | None:
    """Return the slow map that another is made of, or that it is; None where there is none."""
    while isinstance(features, Projected | Mirrored):
        features = features.inner
    return features if features.slow else None


def _block(features: FeatureMap, block: Tensor, pinned: str) -> Tensor:
    if isinstance(features, Mirrored):
        upright, mirrored = block, block.flip(3)
        return of_views(*(_block(features.inner, some, pinned) for some in (upright, mirrored)))
    if isinstance(features, Projected):
        return features.of_inner(_block(features.inner, block, pinned))
    return _kept(features, block, pinned)


def _kept(features: FeatureMap, block: Tensor, pinned: str) -> Tensor:
    content = sha256(block.contiguous().numpy().tobytes()).hexdigest()
    parts = (pinned, content, str(block.dtype), list(block.shape), torch.__version__)
    key = cache.digest("features", _FORMAT, *parts)
    if found := cache.read(key):
        return found[0]["features"]
    made = features_of(features, block)
    cache.write(key, {"features": made}, [])
    return made
