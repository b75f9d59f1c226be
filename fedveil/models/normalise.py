"""The normalisation every model of this package applies to its own input."""

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Map pixels in [0, 1] to about zero mean and unit variance.

    The constants are the same for every dataset, so that a model carries nothing of its data and
    an attack reconstructs pixels, never normalised values.

    Shape: float [N, C, H, W] to the same.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``(pixels - 0.5) / 0.25``."""
        return torch.sub(pixels, 0.5).mul(4.0)
