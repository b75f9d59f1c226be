"""Filters of images: a blur, fewer pixels, and JPEG."""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

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


class DownSampling(Transformation):
    """Average the pixels of every square and enlarge the result to the old size, bilinearly.

    Linear; its range has one dimension for each square.

    Args:
        factor: Side of a square in pixels, at least 1; 1 changes nothing.

    Shape: float [..., C, H, W] to the same shape; sides that are no multiples give squares of
        unequal size.

    Raises:
        FedveilError: A factor below 1; on a call: one larger than the images.
    """

    metadata = Metadata(
        attack=SEARCHED, broken_by=KNOWN_FORWARD, strengths=("factor=2", "factor=4")
    )

    def __init__(self, *, factor: int) -> None:
        super().__init__()
        if factor < 1:
            raise FedveilError(f"factor={factor} is out of range: give at least 1")
        self.factor = factor

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return f"factor={self.factor}"

    @property
    def strength(self) -> float:
        """Side of a square in pixels."""
        return float(self.factor)

    def forward(self, images: Tensor) -> Tensor:
        """Return the coarser images at their old size."""
        size = images.shape[-2:]
        if self.factor > min(size):
            raise FedveilError(
                f"factor={self.factor} is larger than images of {tuple(size)}; use a smaller one"
            )
        if self.factor == 1:
            return images
        flat = images.reshape(-1, *images.shape[-3:])
        small = F.adaptive_avg_pool2d(flat, (size[0] // self.factor, size[1] // self.factor))
        large = F.interpolate(small, tuple(size), mode="bilinear", align_corners=False)
        return large.reshape(images.shape)


class JPEG(Transformation):
    """Encode every image as JPEG and decode it again.

    The codec is the real one, libjpeg by Pillow, with its rounding to 8 bits; colour images lose
    half the resolution of their chroma. No gradient passes through it; ``surrogate`` is kornia's
    differentiable codec.

    Args:
        quality: 1 to 100 on libjpeg's scale.

    Shape: float [..., C, H, W] in [0, 1] to the same shape; C is 1 or 3.

    Raises:
        FedveilError: A quality out of range; on a call: neither 1 nor 3 channels.
    """

    metadata = Metadata(
        attack="exact attacks search all images and find the decoded one; ig has the "
        "differentiable codec inside its forward pass; a learned inverse on top",
        broken_by="Athalye et al., ICML 2018 (a differentiable stand-in in the backward pass)",
        strengths=("quality=5", "quality=20", "quality=60"),
    )
    linear = False

    def __init__(self, *, quality: int) -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise FedveilError(f"quality={quality} is out of range: give 1 to 100")
        self.quality = quality

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return f"quality={self.quality}"

    @property
    def strength(self) -> float:
        """100 − quality."""
        return 100.0 - self.quality

    @property
    def surrogate(self) -> nn.Module:
        """The differentiable codec.

        Source: Reich et al., "Differentiable JPEG: The Devil is in the Details", WACV 2024.
        """
        return _DifferentiableJPEG(self.quality)

    def forward(self, images: Tensor) -> Tensor:
        """Return the decoded images."""
        _check_channels(images)
        flat = images.detach().reshape(-1, *images.shape[-3:])
        raw = flat.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        decoded = np.stack([self._recode(pixels) for pixels in raw])
        found = torch.from_numpy(decoded).permute(0, 3, 1, 2).to(images) / 255
        return found.reshape(images.shape)

    def _recode(self, pixels: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
            buffer, format="JPEG", quality=self.quality
        )
        return np.asarray(Image.open(buffer)).reshape(pixels.shape)


class _DifferentiableJPEG(nn.Module):
    def __init__(self, quality: int) -> None:
        super().__init__()
        self.quality = quality

    def forward(self, images: Tensor) -> Tensor:
        from kornia.enhance import jpeg_codec_differentiable

        _check_channels(images)
        flat = images.reshape(-1, *images.shape[-3:])
        quality = flat.new_full((1,), self.quality)
        # Grey has no chroma to lose, and the codec wants three channels.
        coloured = jpeg_codec_differentiable(flat.expand(-1, 3, -1, -1), quality)
        return coloured[:, : flat.shape[1]].reshape(images.shape)


def _check_channels(images: Tensor) -> None:
    if images.ndim < 3 or images.shape[-3] not in (1, 3):
        raise FedveilError(
            f"JPEG takes grey or RGB images [..., 1 or 3, H, W], not {tuple(images.shape)}; "
            "use another defence for other channels"
        )
