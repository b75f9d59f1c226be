"""Block DCT coefficients dropped at random, other ones in every image."""

import hashlib

import torch
from torch import Tensor, nn

from fedveil.defenses.block_dct import BlockDCT, zigzag_mask
from fedveil.defenses.protocol import Metadata, Transformation
from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator


class RandomBlockDCT(Transformation):
    """Drop each AC coefficient of an image with one probability, the same in all its blocks.

    The draw is seeded by a hash of the image itself. A client that trains on an image in many
    rounds therefore drops the same coefficients each time, and its updates together tell no more
    than one; somebody who does not hold the image cannot predict which they are. Augmentation
    before the transformation would undo this: each variant would drop others.

    Args:
        drop: Probability with which a coefficient is dropped, 0 to 1; the DC coefficient stays.
        keep: Of the first so many coefficients in zigzag order; the others are always dropped.
        block: Side of a block in pixels.
        seed: Enters the hash.

    Shape: float [..., C, H, W] to the same shape.

    Raises:
        FedveilError: A number out of range; on a call: images of integers or too small to pad.
    """

    metadata = Metadata(
        attack="exact attacks search all images and find the transformed one, whose missing "
        "coefficients a learned inverse fills; ig takes the expectation over masks drawn anew each "
        "step",
        broken_by="Athalye et al., ICML 2018 (expectation over transformation)",
        strengths=("drop=0.5", "drop=0.8", "drop=0.95"),
    )
    linear = False

    def __init__(self, *, drop: float, keep: int = 64, block: int = 8, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= drop <= 1:
            raise FedveilError(f"drop={drop} is out of range: give a probability from 0 to 1")
        self.drop = drop
        self.candidates = zigzag_mask(keep, block)
        self.seed = seed
        self._dct = BlockDCT(mask=torch.ones(block, block), block=block)

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return f"drop={self.drop}, of={int(self.candidates.sum())}"

    @property
    def strength(self) -> float:
        """Expected share of the coefficients that is dropped."""
        kept = 1 + (int(self.candidates.sum()) - 1) * (1 - self.drop)
        return 1 - kept / self.candidates.numel()

    @property
    def surrogate(self) -> nn.Module:
        """The transformation with independent draws at every call."""
        return _Drawn(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the images without the coefficients drawn for each."""
        flat = images.reshape(-1, *images.shape[-3:])
        draws = [self._seeded(i).uniform(*self.candidates.shape) for i in flat]
        return self.project(flat, torch.stack(draws).to(flat.device)).reshape(images.shape)

    def project(self, images: Tensor, draws: Tensor) -> Tensor:
        """Drop where a draw is below the probability.

        Args:
            images: Float [N, C, H, W].
            draws: Float [N, block, block], uniform in [0, 1).
        """
        kept = (draws >= self.drop) & self.candidates.to(draws.device)
        first = torch.zeros_like(kept)
        first[:, 0, 0] = True
        masks = (kept | first).to(images)[:, None, None, None]
        found = self._dct.from_coefficients(self._dct.coefficients(images) * masks)
        return found[..., : images.shape[-2], : images.shape[-1]]

    def _seeded(self, image: Tensor) -> SecureGenerator:
        raw = image.detach().mul(255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous()
        digest = hashlib.sha256(f"{self.seed}".encode() + raw.numpy().tobytes()).digest()
        return SecureGenerator(digest)


class _Drawn(nn.Module):
    def __init__(self, transform: RandomBlockDCT) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, images: Tensor) -> Tensor:
        flat = images.reshape(-1, *images.shape[-3:])
        draws = torch.rand(len(flat), *self.transform.candidates.shape, device=images.device)
        return self.transform.project(flat, draws).reshape(images.shape)
