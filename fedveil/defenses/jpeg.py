"""JPEG compression, the transformation that everybody has."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fedveil.defenses.protocol import Metadata, Transformation
from fedveil.errors import FedveilError


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
