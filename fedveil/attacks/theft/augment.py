"""Small shifts of images, which attacks and training alone may use alike."""

import torch
from torch import Tensor
from torch.nn import functional as F

_SHARE = 14  # two pixels of 28 or 32, none of 8


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image by up to a fourteenth of its width, at random; borders are repeated.

    Args:
        pixels: float [N, C, H, W].
        generator: Draws the shifts.

    Returns:
        float [N, C, H, W] in channels-last memory.
    """
    count, _, height, width = pixels.shape
    reach = width // _SHARE
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    down, right = torch.randint(2 * reach + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    image = torch.arange(count)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
