"""A dictionary of patches that the server makes of its own unlabelled images."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.errors import FedveilError
from fedveil.features.protocol import FeatureMap, Options
from fedveil.types import Shape

_CONTRAST = 10 / 255**2  # Coates & Ng's 10 for pixels up to 255
_WHITENING = 0.1
_MOST_PATCHES = 100_000
_CLUSTERED_PATCHES = 60_000
_ITERATIONS = 10
_BLOCK = 10_000
_SAMPLED_IMAGES = 200
_SIDES = 2  # a rectifier each for what is above and what is below


@dataclass(frozen=True)
class DictionaryOptions:
    """How a dictionary is made and used.

    Attributes:
        filters: F, how many filters; with ``mirrored`` each stands for itself and its mirror image.
        patch: Side of a patch in pixels.
        stride: Pixels from one patch to the next.
        threshold: α of the rectifier max(0, z − α).
        pool: Cells of the grid that is averaged over, a side.
        mirrored: Whether an image and its mirror image have the same features.
        made_of: ``means`` of k-means clusters of patches, ``noise`` whitened as the patches are
            (which tells of the images no more than their second moments), or single ``patches``.
    """

    filters: int
    patch: int = 6
    stride: int = 1
    threshold: float = 0.25
    pool: int = 2
    mirrored: bool = False
    made_of: Literal["means", "noise", "patches"] = "means"

    @property
    def dimension(self) -> int:
        """D of the map: both signs of every filter in every cell."""
        return _SIDES * self.filters * self.pool**2

    def check(self, shape: Shape) -> None:
        """Refuse options out of range for images of (C, H, W).

        Raises:
            FedveilError: Names the option, its value, and what is allowed.
        """
        side = min(shape[1:])
        for name, value, most in (
            ("filters", self.filters, 100_000),
            ("patch", self.patch, side),
            ("stride", self.stride, side),
            ("pool", self.pool, _places(side, self) if self.patch <= side else 1),
        ):
            if not 1 <= value <= most:
                raise FedveilError(
                    f"a dictionary's {name} is {value}; allowed for images of {shape} (C, H, W): "
                    f"1 to {most}"
                )


class Dictionary(FeatureMap):
    """Rectified, pooled products of an image's patches with filters.

    Every patch is normalised in brightness and contrast and whitened, multiplied with F filters,
    rectified on both sides with a threshold, and averaged over a grid of cells: a convolution as
    one matrix product.

    Source: Coates and Ng, "The Importance of Encoding Versus Training with Sparse Coding and Vector
    Quantization", ICML 2011, sections 3 and 4 (soft threshold).

    Args:
        shape: (C, H, W) of one image.
        options: As it was made.
        filters: Float32 [F, C·P·P], with the whitening multiplied in.
        offset: Float32 [F], the filters' products with the mean patch.

    Raises:
        FedveilError: Options or tensors do not fit.
    """

    name = "dictionary"
    filters: Tensor
    offset: Tensor

    def __init__(
        self, shape: Shape, options: DictionaryOptions, filters: Tensor, offset: Tensor
    ) -> None:
        options.check(shape)
        super().__init__(shape, options.dimension)
        values = shape[0] * options.patch**2
        if filters.shape != (options.filters, values) or offset.shape != (options.filters,):
            raise FedveilError(
                f"a dictionary's tensors are {tuple(filters.shape)} and {tuple(offset.shape)}; "
                f"allowed: ({options.filters}, {values}) and ({options.filters},)"
            )
        self.settings = options
        self.register_buffer("filters", filters.float().contiguous())
        self.register_buffer("offset", offset.float().contiguous())

    @classmethod
    def rebuild(cls, shape: Shape, options: Options, tensors: Mapping[str, Tensor]) -> "Dictionary":
        """Return the dictionary that was sent.

        Raises:
            FedveilError: Options or tensors do not fit.
        """
        try:
            return cls(shape, DictionaryOptions(**options), tensors["filters"], tensors["offset"])
        except (TypeError, KeyError) as error:
            raise FedveilError(f"the dictionary that came cannot be read: {error}") from None

    @property
    def options(self) -> Options:
        """As ``DictionaryOptions``."""
        return asdict(self.settings)

    def sent(self) -> dict[str, Tensor]:
        """Return filters and offsets."""
        return {"filters": self.filters, "offset": self.offset}

    def remade(self, images: Tensor, *, seed: int) -> "Dictionary":
        """Return a dictionary of other images with the same options."""
        return learn_dictionary(images, self.settings, seed=seed)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float32 [N, D]."""
        how = self.settings
        patches = _patches(pixels, how.patch, how.stride)
        rows, columns = (_places(length, how) for length in pixels.shape[2:])
        cells = _cells(rows, columns, how.pool)
        pooled = self._pooled(patches, self.filters, cells)
        if how.mirrored:
            mirror = _mirror(self.filters, self.shape[0], how.patch)
            # The mean patch of images and their mirror images is its own mirror image.
            other = self._pooled(patches, mirror, cells)
            pooled = (pooled + other[:, :, _mirrored_cells(how.pool)]).div_(2)
        return pooled.flatten(1)

    def _pooled(self, patches: Tensor, filters: Tensor, cells: Tensor) -> Tensor:
        """Return the means of both rectified sides in every cell, float [N, sides, cells, F]."""
        images, places, values = patches.shape
        flat = torch.addmm(-self.offset, patches.reshape(-1, values), filters.T)
        products = flat.view(images, places, -1)
        # What is above less what is below the thresholds; then what is above alone.
        both = F.softshrink(products, self.settings.threshold)
        difference = cells @ both
        above = cells @ F.relu(both, inplace=not both.requires_grad)
        return torch.stack([above, above - difference], 1)


def learn_dictionary(images: Tensor, options: DictionaryOptions, *, seed: int) -> Dictionary:
    """Make a dictionary of unlabelled images.

    Args:
        images: uint8 or float in [0, 1], [N, C, H, W], at least one.
        options: What to make.
        seed: Same seed and images, same dictionary, to rounding.

    Raises:
        FedveilError: Options out of range.
    """
    channels, height, width = images.shape[1:]
    shape = (channels, height, width)
    options.check(shape)
    generator = torch.Generator().manual_seed(seed)
    patches = _sampled(images, options, generator)
    if options.mirrored:
        patches = torch.cat([patches, _mirror(patches, channels, options.patch)])
    mean, whitening = _whitening(patches)
    whitened = (patches - mean) @ whitening
    chosen = whitened[_drawn(len(whitened), _CLUSTERED_PATCHES, generator)]
    filters = F.normalize(_MAKERS[options.made_of](chosen, options.filters, generator), dim=1)
    folded = filters @ whitening
    return Dictionary(shape, options, folded, folded @ mean)


def default_options(
    shape: Shape, filters: int, *, mirrored: bool, **others: Any
) -> DictionaryOptions:
    """Return options that suit images of a size: patches of 6 pixels, smaller on small images."""
    side = min(shape[1:])
    patch = max(1, min(6, side // 2))
    stride = 2 if side >= _LARGE else 1
    return DictionaryOptions(
        filters=filters, patch=patch, stride=stride, mirrored=mirrored, **others
    )


_LARGE = 48  # pixels a side from which every other patch does


def _places(side: int, options: DictionaryOptions) -> int:
    return (side - options.patch) // options.stride + 1


def _patches(pixels: Tensor, patch: int, stride: int) -> Tensor:
    """Return patches of even brightness and contrast, float [N, places, C·P·P]."""
    cut = F.unfold(pixels, patch, stride=stride).transpose(1, 2)
    cut = cut - cut.mean(-1, keepdim=True)
    return cut / (cut.square().mean(-1, keepdim=True) + _CONTRAST).sqrt()


def _cells(rows: int, columns: int, pool: int) -> Tensor:
    """Return what averages places over cells, float32 [pool·pool, rows·columns].

    Cells that cannot be equally large overlap, so that the grid is its own mirror image.
    """
    down, across = (_parts(length, pool) for length in (rows, columns))
    return torch.einsum("ar,bc->abrc", down, across).reshape(pool**2, rows * columns)


def _mirrored_cells(pool: int) -> Tensor:
    return torch.arange(pool**2).view(pool, pool).flip(1).flatten()


def _parts(length: int, pool: int) -> Tensor:
    size = math.ceil(length / pool)
    found = torch.zeros(pool, length)
    for part in range(pool):
        start = part * (length - size) // max(pool - 1, 1)
        found[part, start : start + size] = 1 / size
    return found


def _mirror(filters: Tensor, channels: int, patch: int) -> Tensor:
    return filters.view(-1, channels, patch, patch).flip(3).reshape(filters.shape)


def _drawn(count: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:most]


def _sampled(images: Tensor, options: DictionaryOptions, generator: torch.Generator) -> Tensor:
    """Return patches of all images alike, float64 [M, C·P·P]."""
    each = max(1, _MOST_PATCHES // len(images))
    found = []
    for block in torch.split(images, _SAMPLED_IMAGES):
        floats = block if block.is_floating_point() else block.float().div(255)
        patches = _patches(floats, options.patch, 1)
        scores = torch.rand(patches.shape[:2], generator=generator)
        places = scores.topk(min(each, patches.shape[1]), dim=1).indices
        found.append(patches.gather(1, places[..., None].expand(-1, -1, patches.shape[2])))
    return torch.cat([block.flatten(0, 1) for block in found]).double()


def _whitening(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean patch and the matrix that decorrelates patches (ZCA), symmetric."""
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
    scales = (values.clamp(min=0) + _WHITENING).rsqrt()
    return mean, (vectors * scales) @ vectors.T


def _means(patches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the directions of k-means clusters on the sphere.

    Source: Coates and Ng, "Learning Feature Representations with K-Means", 2012, section 2.1.
    """
    single = patches.float()
    centres = F.normalize(_some(single, count, generator), dim=1)
    for _ in range(_ITERATIONS):
        sums = torch.zeros_like(centres)
        for block in torch.split(single, _BLOCK):
            products = block @ centres.T
            nearest = products.argmax(1)
            sums.index_add_(0, nearest, block * products.gather(1, nearest[:, None]))
        lengths = sums.norm(dim=1, keepdim=True)
        empty = lengths.squeeze(1) == 0
        sums[empty] = _some(single, int(empty.sum()), generator)
        centres = F.normalize(sums, dim=1)
    return centres.double()


def _some(patches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if count <= len(patches):
        return patches[_drawn(len(patches), count, generator)]
    return patches[torch.randint(len(patches), (count,), generator=generator)]


def _noise(patches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, patches.shape[1], generator=generator, dtype=torch.float64)


_MAKERS = {"means": _means, "noise": _noise, "patches": _some}
