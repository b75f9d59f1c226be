"""Colours, grids of images and PNG: what every figure is drawn with."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers.
BLACK, BLUE, ORANGE = "#000000", "#0072B2", "#D55E00"
GREEN, GREY = "#009E73", "#666666"

Column = tuple[str, Tensor, Sequence[float] | Tensor | None]
"""A title, images [N, C, H, W] in [0, 1], and their PSNR in dB to the originals where shown."""


def png(figure: "Figure") -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_images(grid: Any, columns: Sequence[Column], shown: Sequence[int], *, size: int) -> None:
    """Draw images in columns, each with its PSNR below.

    Args:
        grid: Axes, a row for each of ``shown`` and a column for each of ``columns``.
        columns: Images that belong together have the same place in each.
        shown: Places of the images that are drawn.
        size: Of the titles' letters, in points.
    """
    for place, (title, images, decibels) in enumerate(columns):
        grid[0][place].set_title(title, fontsize=size)
        for row, index in enumerate(shown):
            axes = grid[row][place]
            pixels = images[index].clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if decibels is not None:
                axes.set_xlabel(f"{decibels[index]:.1f} dB", fontsize=size - 1)
