"""Gaussian blur of the images."""

import math

from torch import Tensor

from fedveil.defenses.protocol import KNOWN_FORWARD, SEARCHED, Metadata, Transformation
from fedveil.errors import FedveilError


class GaussianBlur(Transformation):
    """Convolve every image with a Gaussian, by kornia.

    Linear, and nearly invertible where the Gaussian is narrow: what it damps it does not remove.

    Args:
        sigma: Standard deviation in pixels, above 0; the kernel reaches three of them.

    Shape: float [..., C, H, W] to the same shape; borders are reflected.

    Raises:
        FedveilError: A deviation of 0 or less; on a call: images smaller than the kernel's half.
    """

    metadata = Metadata(
        attack=SEARCHED, broken_by=KNOWN_FORWARD, strengths=("sigma=0.7", "sigma=1.5", "sigma=3")
    )

    def __init__(self, *, sigma: float) -> None:
        super().__init__()
        if not 0 < sigma < math.inf:
            raise FedveilError(f"sigma={sigma} is out of range: give pixels above 0")
        self.sigma = sigma

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return f"sigma={self.sigma}"

    @property
    def strength(self) -> float:
        """Standard deviation in pixels."""
        return self.sigma

    def forward(self, images: Tensor) -> Tensor:
        """Return the blurred images."""
        from kornia.filters import gaussian_blur2d

        reach = math.ceil(3 * self.sigma)
        if reach >= min(images.shape[-2:]):
            raise FedveilError(
                f"sigma={self.sigma} needs images of more than {reach} pixels a side, not "
                f"{tuple(images.shape[-2:])}; use a smaller sigma"
            )
        flat = images.reshape(-1, *images.shape[-3:])
        size = 2 * reach + 1
        blurred = gaussian_blur2d(flat, (size, size), (self.sigma, self.sigma))
        return blurred.reshape(images.shape)
