"""Quantised features of images: the rows that sums are made of."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedveil.analytic.statistics import quantised
from fedveil.features import FeatureMap, blocks_of_features


def rows_of(
    features: FeatureMap, pixels: Tensor, *, on_block: Callable[[int], object] = lambda done: None
) -> Tensor:
    """Return the rows that sums are made of, int16 [N, width], in units of 2⁻¹⁴.

    Args:
        features: The map; what a slow one gives is kept between runs.
        pixels: uint8, or float in [0, 1], [N, C, H, W].
        on_block: Told how many images are done, after every block.

    Raises:
        FedveilError: As ``fedveil.features.features_of``.
    """
    rows = torch.empty(len(pixels), features.width, dtype=torch.int16)
    done = 0
    for block in blocks_of_features(features, pixels):
        rows[done : done + len(block)] = quantised(block)
        done += len(block)
        on_block(done)
    return rows
