"""Random changes of training images that leave their class as it is."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.errors import FedveilError

_WRITTEN = "none, crop:PIXELS, flip, or crop:PIXELS,flip"


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the padded image, and random mirroring.

    Attributes:
        crop: Black pixels added on every side before an image's own size is cut out at random;
            0 for none. At least 0.
        flip: Whether half of the images are mirrored left to right.
    """

    crop: int = 0
    flip: bool = False

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``pixels``, float [N, C, H, W], each image changed in its own way.

        Args:
            pixels: The images; not modified.
            generator: Draws offsets and mirrorings.
        """
        if self.crop:
            pixels = _crop(pixels, self.crop, generator)
        if self.flip:
            mirrored = torch.rand(len(pixels), generator=generator) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return pixels


def parse_augmentation(text: str | None) -> Augmentation:
    """Read ``crop:PIXELS``, ``flip``, both with a comma between them, or ``none``.

    Raises:
        FedveilError: Anything else.
    """
    crop, flip = 0, False
    for part in (text or "none").split(","):
        name, _, value = part.strip().partition(":")
        if name == "crop" and value.isdecimal() and 0 < int(value) <= 64:
            crop = int(value)
        elif part.strip() == "flip":
            flip = True
        elif part.strip() != "none":
            raise FedveilError(
                f"augmentation {text!r} is unknown; allowed: {_WRITTEN}, PIXELS from 1 to 64"
            )
    return Augmentation(crop, flip)


def _crop(pixels: Tensor, margin: int, generator: torch.Generator) -> Tensor:
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, (margin,) * 4)
    down, right = torch.randint(0, 2 * margin + 1, (2, count, 1), generator=generator)
    rows = (down + torch.arange(height))[:, :, None]
    columns = (right + torch.arange(width))[:, None, :]
    # The advanced indices stand apart, so the channels come last: put them back.
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
