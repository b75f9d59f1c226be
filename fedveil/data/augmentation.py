"""Random changes of training images that leave their class as it is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.errors import FedveilError

_WRITTEN = (
    "none, or some of crop:PIXELS (1 to 64), rotate:DEGREES (up to 180), zoom:FRACTION (up to "
    "0.9), shear:FRACTION (up to 1) and flip, with commas between them, each once"
)
_LARGEST = {"crop": 64.0, "rotate": 180.0, "zoom": 0.9, "shear": 1.0}


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the padded image, random affine map, and random mirroring.

    Attributes:
        crop: Black pixels added on every side before an image's own size is cut out at random;
            0 for none. At least 0.
        flip: Whether half of the images are mirrored left to right.
        rotate: Largest angle an image is turned by about its centre, either way, in degrees.
        zoom: Largest change of its size, as a fraction of it, either way.
        shear: Largest shift of a row per row that it lies from the centre, either way.
    """

    crop: int = 0
    flip: bool = False
    rotate: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``pixels``, float [N, C, H, W], each image changed in its own way.

        Args:
            pixels: The images; not modified.
            generator: Draws offsets, maps and mirrorings.
        """
        if self.crop:
            pixels = _crop(pixels, self.crop, generator)
        if self.rotate or self.zoom or self.shear:
            drawn = 2 * torch.rand(3, len(pixels), generator=generator) - 1
            degrees, zoom, shear = drawn * torch.tensor([[self.rotate], [self.zoom], [self.shear]])
            pixels = warp(pixels, degrees=degrees, scale=1 + zoom, shear=shear)
        if self.flip:
            mirrored = torch.rand(len(pixels), generator=generator) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return pixels


def warp(pixels: Tensor, *, degrees: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Return images turned about their centre, scaled and sheared; bilinear, black outside.

    The pixel at offset (x, y) from the centre, y pointing down, goes to scale · R (x + shear · y,
    y), where R turns by ``degrees`` from the x axis towards the y axis.

    Args:
        pixels: float [N, C, H, W].
        degrees: float [N].
        scale: float [N], above 0.
        shear: float [N].
    """
    height, width = pixels.shape[2:]
    angle = torch.deg2rad(degrees)
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    # What is asked for is where each pixel comes from, so this is the inverse map, and in units of
    # half the image's width and height.
    x_of = torch.stack([cosine + shear * sine, (sine - shear * cosine) * height / width], dim=1)
    y_of = torch.stack([-sine * width / height, cosine], dim=1)
    maps = F.pad(torch.stack([x_of, y_of], dim=1), (0, 1)).to(pixels)
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def parse_augmentation(text: str | None) -> Augmentation:
    """Read ``crop:2,rotate:15,zoom:0.15,shear:0.15,flip``, some of it, or ``none``.

    Raises:
        FedveilError: Anything else.
    """
    parts = [part.strip() for part in (text or "none").split(",")]
    if parts == ["none"]:
        return Augmentation()
    numbers = dict(part.split(":", 1) for part in parts if ":" in part)
    given = {name: _number(name, value) for name, value in numbers.items()}
    rest = [part for part in parts if ":" not in part]
    repeated = len(numbers) + len(rest) < len(parts)
    if repeated or rest not in ([], ["flip"]) or None in given.values():
        raise FedveilError(f"augmentation {text!r} is unknown; allowed: {_WRITTEN}")
    strengths = {name: value for name, value in given.items() if value is not None}
    crop = int(strengths.pop("crop", 0))
    return Augmentation(crop, bool(rest), **strengths)


def _number(name: str, text: str) -> float | None:
    """Return the strength written as ``text``; None where it is none of ``name``."""
    try:
        value = float(int(text) if name == "crop" else float(text))
    except ValueError:
        return None
    fits = name in _LARGEST and math.isfinite(value) and 0 < value <= _LARGEST[name]
    return value if fits else None


def _crop(pixels: Tensor, margin: int, generator: torch.Generator) -> Tensor:
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, (margin,) * 4)
    down, right = torch.randint(0, 2 * margin + 1, (2, count, 1), generator=generator)
    rows = (down + torch.arange(height))[:, :, None]
    columns = (right + torch.arange(width))[:, None, :]
    # The advanced indices stand apart, so the channels come last: put them back.
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
