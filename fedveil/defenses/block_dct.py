"""The first paper's defence: images that have lost their high spatial frequencies."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.defenses.protocol import KNOWN_FORWARD, SEARCHED, Metadata, Transformation
from fedveil.errors import FedveilError

_LARGEST_BLOCK = 256  # its zigzag order alone takes seconds beyond
_GROUP = 16  # columns handled by one matrix product; wider ones multiply more zeros than they save
_CHUNK = 2**17  # values whose intermediate results stay in a core's cache

# ITU-R BT.601, without the constant that JPEG adds to chroma: a linear map needs none.
_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal DCT-II matrix T, float64 [size, size].

    ``T[0, j] = sqrt(1/M)`` and ``T[i, j] = sqrt(2/M)·cos((2j + 1)·i·π/(2M))``.

    Source: the discrete-cosine-transform defence paper, equations (1) and (2).
    """
    i = torch.arange(size, dtype=torch.float64)[:, None]
    j = torch.arange(size, dtype=torch.float64)[None, :]
    matrix = math.sqrt(2 / size) * torch.cos((2 * j + 1) * i * math.pi / (2 * size))
    matrix[0] = math.sqrt(1 / size)
    return matrix


def zigzag_mask(keep: int, block: int = 8) -> Tensor:
    """Return the bool [block, block] mask of the first ``keep`` coefficients in zigzag order.

    Raises:
        FedveilError: ``keep`` is not from 1 to block².
    """
    if not 1 <= keep <= block * block:
        raise FedveilError(
            f"keep={keep} is out of range: a {block}×{block} block has {block * block} "
            f"coefficients, so give 1 to {block * block}"
        )

    def along_diagonals(place: int) -> tuple[int, int]:
        row, column = divmod(place, block)
        diagonal = row + column
        return diagonal, row if diagonal % 2 else column

    mask = torch.zeros(block * block, dtype=torch.bool)
    mask[sorted(range(block * block), key=along_diagonals)[:keep]] = True
    return mask.reshape(block, block)


class BlockDCT(Transformation):
    """Remove DCT coefficients from every block of an image.

    Each block A becomes ``Tᵀ·(mask ∘ (T·A·Tᵀ))·T``. The map is linear, an orthogonal projection
    where the sides are multiples of the block, and differentiable. What it removes no attack can
    bring back; what it keeps it does not hide: an attacker who knows the mask searches the kept
    coefficients only, and finds them faster than they find a whole image.

    Args:
        keep: Keep the first so many coefficients in zigzag order, 1 to block².
        skip: Drop the first so many of what is kept in zigzag order, the lowest frequencies; with
            nothing else given, all others are kept. Pixels then lie around 0.
        mask: Or the coefficients to keep: [block, block], non-zero where kept; row is vertical
            frequency.
        cutoff: Or keep those of a frequency below this share of the Nyquist frequency, above 0;
            the coefficient (i, j) has the share ``sqrt(i² + j²) / block``.
        block: Side M of a block in pixels. An image whose sides are no multiples is padded by
            reflection and cropped again.
        chroma_keep: Treat RGB images in YCbCr and keep so many zigzag coefficients of the two
            chroma channels. (With one mask for all channels the colour space makes no difference:
            the transformation commutes with it.)

    Shape: float [..., H, W] to the same shape, dtype and device; with ``chroma_keep``
        [..., 3, H, W].

    Raises:
        FedveilError: Not exactly one of keep, mask and cutoff; keep or skip out of range; a mask of
            another shape, or one that keeps nothing; on a call: images of integers, NaN, or too
            small to pad.

    Example:
        >>> BlockDCT(keep=21)(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
    """

    metadata = Metadata(
        attack=SEARCHED,
        broken_by=KNOWN_FORWARD,
        strengths=("keep=3", "keep=6", "keep=10", "keep=21"),
    )

    def __init__(
        self,
        *,
        keep: int | None = None,
        skip: int = 0,
        mask: Tensor | None = None,
        cutoff: float | None = None,
        block: int = 8,
        chroma_keep: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= block <= _LARGEST_BLOCK:
            raise FedveilError(
                f"block={block} is out of range: give a side of 1 to {_LARGEST_BLOCK} pixels"
            )
        given = sum(choice is not None for choice in (keep, mask, cutoff))
        if skip and not given:
            keep, given = block * block, 1
        if given != 1:
            raise FedveilError("BlockDCT needs exactly one of keep, mask and cutoff")
        self.block = block
        skipped = _skipped(skip, block)
        self.mask = _some(_mask(keep, mask, cutoff, block) & ~skipped)
        self.chroma_mask = (
            None if chroma_keep is None else _some(zigzag_mask(chroma_keep, block) & ~skipped)
        )
        self._factors: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        kept = f"kept={int(self.mask.sum())}/{self.block**2}, block={self.block}"
        chroma = self.chroma_mask
        return kept if chroma is None else f"{kept}, chroma_kept={int(chroma.sum())}"

    @property
    def strength(self) -> float:
        """Share of a block's coefficients that is dropped; of the luma where chroma differs."""
        return 1 - int(self.mask.sum()) / self.block**2

    def forward(self, images: Tensor) -> Tensor:
        """Return the images without the coefficients that the mask drops."""
        _check(images)
        padded, size = self._pad(images)
        if self.chroma_mask is None:
            result = self._project(padded, self.mask)
        else:
            result = self._project_ycbcr(padded, self.chroma_mask)
        return result if size is None else result[..., : size[0], : size[1]]

    def coefficients(self, images: Tensor) -> Tensor:
        """Return all DCT coefficients, [..., H, W] to [..., H/M, W/M, M, M], before any mask.

        Sides that are no multiple of M are padded first, so a block may reach past the image.
        """
        _check(images)
        padded, _ = self._pad(images)
        height, width = (side // self.block for side in padded.shape[-2:])
        blocks = padded.reshape(*images.shape[:-2], height, self.block, width, self.block)
        matrix = dct_matrix(self.block).to(images)
        found: Tensor = matrix @ blocks.transpose(-3, -2) @ matrix.T
        return found

    def from_coefficients(self, coefficients: Tensor) -> Tensor:
        """Return the images [..., H, W] of coefficients [..., H/M, W/M, M, M]."""
        matrix = dct_matrix(self.block).to(coefficients)
        blocks = (matrix.T @ coefficients @ matrix).transpose(-3, -2)
        return blocks.flatten(-4, -3).flatten(-2)

    def _project(self, images: Tensor, mask: Tensor) -> Tensor:
        if images.requires_grad or images.numel() <= _CHUNK:
            return self._project_once(images, mask)
        height, width = images.shape[-2:]
        flat = images.reshape(-1, height, width)
        result = torch.empty_like(flat)
        several = max(1, _CHUNK // (height * width))
        for start in range(0, len(flat), several):
            part = flat[start : start + several]
            result[start : start + several] = self._project_once(part, mask)
        return result.reshape(images.shape)

    def _project_once(self, images: Tensor, mask: Tensor) -> Tensor:
        # Only the frequencies that some kept coefficient has are computed, and no block is ever
        # copied into place: columns are transformed in rows as they lie, rows in strips.
        across, down, gate = self._factors_for(images, mask)
        height, width = images.shape[-2:]
        group, kept = across.shape
        rows = (images.reshape(-1, group) @ across).reshape(-1, self.block, gate.shape[1])
        # Expanded, since matmul would copy the strips to make one product of all.
        strips = down.expand(len(rows), -1, -1)
        found = torch.bmm(strips, rows)
        _check_numbers(found)
        rows = torch.bmm(strips.mT, found * gate).reshape(-1, kept)
        return (rows @ across.T).reshape(*images.shape[:-2], height, width)

    def _project_ycbcr(self, images: Tensor, chroma_mask: Tensor) -> Tensor:
        if images.ndim < 3 or images.shape[-3] != 3:
            raise FedveilError(
                f"chroma_keep needs RGB images [..., 3, H, W], not {tuple(images.shape)}; "
                "leave it out for others"
            )
        colours = images.new_tensor(_YCBCR, dtype=torch.float64)
        planes = torch.einsum("ij,...jhw->...ihw", colours.to(images), images)
        luma = self._project(planes[..., :1, :, :].contiguous(), self.mask)
        chroma = self._project(planes[..., 1:, :, :].contiguous(), chroma_mask)
        back = torch.linalg.inv(colours).to(images)
        return torch.einsum("ij,...jhw->...ihw", back, torch.cat([luma, chroma], dim=-3))

    def _factors_for(self, images: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        count = images.shape[-1] // self.block
        side_by_side = max(
            n
            for n in range(1, count + 1)
            if count % n == 0 and n * self.block <= max(_GROUP, self.block)
        )
        key = (images.dtype, images.device, count, mask is self.mask)
        if key not in self._factors:
            matrix = dct_matrix(self.block)
            rows, columns = mask.any(dim=1), mask.any(dim=0)
            repeated = torch.kron(torch.eye(side_by_side, dtype=matrix.dtype), matrix[columns])
            gate = mask[rows][:, columns].double().repeat(1, count)
            self._factors[key] = (
                repeated.T.contiguous().to(images),
                matrix[rows].to(images),
                gate.to(images),
            )
        return self._factors[key]

    def _pad(self, images: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        height, width = images.shape[-2:]
        down, right = -height % self.block, -width % self.block
        if not down and not right:
            return images, None
        if down >= height or right >= width:
            raise FedveilError(
                f"images of {height}×{width} cannot be padded by reflection to blocks of "
                f"{self.block}×{self.block}; use a smaller block or larger images"
            )
        flat = images.reshape(-1, 1, height, width)
        padded = F.pad(flat, (0, right, 0, down), mode="reflect")
        return padded.reshape(*images.shape[:-2], *padded.shape[-2:]), (height, width)


def _mask(keep: int | None, mask: Tensor | None, cutoff: float | None, block: int) -> Tensor:
    if keep is not None:
        return zigzag_mask(keep, block)
    if mask is not None:
        if mask.shape != (block, block):
            raise FedveilError(
                f"the mask has shape {tuple(mask.shape)}; a block of {block}×{block} needs "
                f"({block}, {block})"
            )
        chosen = mask != 0
    else:
        assert cutoff is not None
        side = torch.arange(block, dtype=torch.float64) / block
        chosen = torch.hypot(side[:, None], side[None, :]) < cutoff
    return chosen.cpu()


def _skipped(skip: int, block: int) -> Tensor:
    if not 0 <= skip < block * block:
        raise FedveilError(
            f"skip={skip} is out of range: a {block}×{block} block has {block * block} "
            f"coefficients, so give 0 to {block * block - 1}"
        )
    return zigzag_mask(skip, block) if skip else torch.zeros(block, block, dtype=torch.bool)


def _some(chosen: Tensor) -> Tensor:
    if not chosen.any():
        raise FedveilError("no coefficient would be kept; keep at least one")
    return chosen


def _check(images: Tensor) -> None:
    if not images.is_floating_point():
        raise FedveilError(
            f"images of dtype {images.dtype} cannot be transformed; convert them to floats first, "
            "for example images.float() / 255"
        )
    if images.ndim < 2:
        raise FedveilError(f"images need a height and a width, not shape {tuple(images.shape)}")


def _check_numbers(coefficients: Tensor) -> None:
    # One bad pixel spoils every coefficient of its block, so the few that are computed tell.
    try:
        bad = bool(torch.isnan(coefficients.detach().sum()))
    except RuntimeError:  # inside torch.func.vmap no value can be read
        return
    if bad:
        raise FedveilError(
            "the images hold NaN or infinite pixels; find and mend them before training on them"
        )
