"""A small vision transformer."""

import torch
from torch import Tensor, nn

from fedveil.errors import FedveilError
from fedveil.models.normalise import Normalise


class ViT(nn.Module):
    """Vision transformer: patches, learned positions, pre-norm blocks, mean pooling.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1; the mean of
    the tokens replaces the class token.

    Args:
        shape: (C, H, W) of one image, pixels in [0, 1]; H and W multiples of ``patch``.
        classes: Number of classes.
        patch: Side of a square patch in pixels.
        width: Token width.
        depth: Number of transformer blocks.
        heads: Attention heads a block.

    Shape: float [N, C, H, W] to logits [N, classes].

    Raises:
        FedveilError: H or W is no multiple of ``patch``.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        patch: int = 4,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        channels, height, w = shape
        if height % patch or w % patch:
            raise FedveilError(
                f"model vit: images of {height}×{w} do not divide into {patch}×{patch} patches; "
                f"use sizes that are multiples of {patch}, or another model"
            )
        self.normalise = Normalise()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(
            torch.randn(1, (height // patch) * (w // patch), width) * 0.02
        )
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width,
                    heads,
                    dim_feedforward=2 * width,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        tokens = self.patches(self.normalise(pixels)).flatten(2).transpose(1, 2)
        tokens = self.blocks(tokens + self.positions)
        return self.output(self.norm(tokens).mean(dim=1))  # type: ignore[no-any-return]
