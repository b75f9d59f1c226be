"""From encoded images (PNG, JPEG and their like) to uint8 tensors."""

import mmap
import os
import struct
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from fedveil.data.images import Images
from fedveil.errors import FedveilError

# A bar that flashes by is noise.
_PATIENCE_SECONDS = 1.0
_GREY = frozenset({"1", "L", "LA", "La"})
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    OverflowError,
    RuntimeError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises on files that are no image, or a damaged one."""

_MOST_PIXELS = 2**24
_WIDE = frozenset({"PNG", "PPM"})  # formats whose widest pixels Pillow holds as 16 of 32 bits
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
_BLACK = 1 / 16  # of the range: where 12 bits end that are stored as 16
_DARK = 1 / 2
_NAMED = 3

_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Encoded:
    """An image as it is stored.

    Attributes:
        content: The bytes of an image file, or where that file is.
        origin: What to call it in an error message.
        label: Index of its class.
    """

    content: bytes | Path
    origin: str
    label: int


@dataclass(frozen=True)
class Split:
    """Encoded images, how many there are, and what to call them in an error message."""

    origin: str
    images: Iterable[Encoded]
    count: int


class Remarks:
    """What is said of images besides their pixels, over all that were read."""

    def __init__(self) -> None:
        self._frames: list[str] = []
        self._transparent: list[str] = []
        self._wide: list[str] = []
        self._brightest = 0.0

    def note(self, origin: str, picture: "Picture") -> None:
        """Take account of one image.

        Args:
            origin: What to call it.
            picture: The image.
        """
        if picture.frames:
            self._frames.append(origin)
        if picture.transparent:
            self._transparent.append(origin)
        if picture.brightest is not None:
            self._wide.append(origin)
            self._brightest = max(self._brightest, picture.brightest)

    def told(self) -> tuple[str, ...]:
        """Return a sentence for each thing that was found.

        Raises:
            FedveilError: Images of 16 bits or of floating point use so little of their range that
                all of them would be black.
        """
        wide = f"{_some(self._wide)} hold 16 bits or floating-point numbers"
        if self._wide and self._brightest < _BLACK:
            raise FedveilError(
                f"{wide}, and their brightest pixel is {self._brightest:.2%} of what these can "
                "hold, so that all would be black: their range is another. Stretch them to the "
                "whole of it, or store them with 8 bits."
            )
        dark = bool(self._wide) and self._brightest < _DARK
        found = (
            (bool(self._frames), f"{_some(self._frames)} hold several frames: the first is read"),
            (
                bool(self._transparent),
                f"{_some(self._transparent)} hold transparent pixels: what lies beneath is read",
            ),
            (dark, f"{wide}: their brightest pixel is {self._brightest:.0%} of the range"),
        )
        return tuple(sentence for told, sentence in found if told)


def _some(origins: Sequence[str]) -> str:
    first = ", ".join(origins[:_NAMED])
    return f"{len(origins):,} images ({first}{', ...' if len(origins) > _NAMED else ''})"


def decode(splits: Sequence[Split]) -> tuple[list[Images], tuple[str, ...]]:
    """Decode ``splits``, one ``Images`` each; all get the same number of channels.

    Each is read by ``read_image``; grey images stay grey unless a colour image stands among them.

    Args:
        splits: What to decode.

    Returns:
        ``Images`` of uint8 [N, C, H, W], C being 1 or 3, in the order of ``splits``; and what is to
        be said of them, in words.

    Raises:
        FedveilError: There are no images, one cannot be decoded, two differ in size, or all would
            be black.
    """
    first: tuple[str, tuple[int, ...]] | None = None
    remarks = Remarks()
    pixels: list[list[NDArray[np.uint8]]] = [[] for _ in splits]
    labels: list[list[int]] = [[] for _ in splits]
    for index, image in _with_progress(splits):
        array = _array(image, remarks)
        if first is None:
            first = (image.origin, array.shape[:2])
            _check_memory(array, sum(split.count for split in splits))
        if array.shape[:2] != first[1]:
            raise FedveilError(
                f"images differ in size: {first[0]} is {_size(first[1])} and {image.origin} is "
                f"{_size(array.shape)} (width x height). All must have one size: resize them first."
            )
        pixels[index].append(array)
        labels[index].append(image.label)
    colour = any(array.ndim == 3 for split in pixels for array in split)
    for split, arrays in zip(splits, pixels, strict=True):
        if not arrays:
            raise FedveilError(f"{split.origin} holds 0 images; at least one is needed.")
    told = remarks.told()
    return [_stack(p, y, colour=colour) for p, y in zip(pixels, labels, strict=True)], told


def check_size(image: Image.Image, *, most: int) -> None:
    """Refuse an image before it is decoded: a file of some kilobytes can hold gigabytes.

    Args:
        image: Opened and not yet loaded.
        most: Pixels it may have.

    Raises:
        ValueError: It has more.
    """
    if image.width * image.height > most:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, more than {most:,} in all; make it "
            "smaller"
        )


def _check_memory(array: NDArray[np.uint8], count: int) -> None:
    # Once as decoded, once stacked.
    if 2 * count * array.size > _MEMORY:
        raise FedveilError(
            f"{count:,} images of {_size(array.shape)} (width x height) take "
            f"{count * array.size / 2**30:,.0f} GiB as pixels, more than this machine's memory of "
            f"{_MEMORY / 2**30:,.0f} GiB allows. Make them smaller, or take fewer."
        )


@dataclass(frozen=True)
class Picture:
    """An image as training sees it.

    Attributes:
        pixels: uint8 [H, W] of a grey image, [H, W, 3] of any other.
        frames: Whether it is the first of several frames or pages.
        transparent: Whether pixels of it were transparent, which is dropped.
        brightest: Of 16 bits or floating point, its largest value in units of the type's range;
            else None.
    """

    pixels: NDArray[np.uint8]
    frames: bool
    transparent: bool
    brightest: float | None


def read_image(content: bytes | Path, *, most: int = _MOST_PIXELS) -> Picture:
    """Return an image as training sees it.

    Grey images stay grey, with or without transparency; palettes and all others become RGB.
    Transparency is dropped, so that what lies beneath is seen. 16 bits become 8 by their type's
    range, and floating-point numbers from 0 to 1. A camera's orientation tag is obeyed, a colour
    profile is not. Of several frames or pages it is the first.

    Args:
        content: The bytes of an image file, or where that file is.
        most: Pixels it may have.

    Raises:
        OSError: It cannot be read; and the others of ``DAMAGE``, where it is no image, is damaged,
            too large, or of a kind whose pixels have no known range.
    """
    # From memory: a damaged length makes Pillow ask a file for gigabytes at once.
    whole = content if isinstance(content, bytes) else content.read_bytes()
    with warnings.catch_warnings():
        # Of Pillow, about sizes and palettes that are dealt with here.
        warnings.simplefilter("ignore")
        with open_image(BytesIO(whole)) as image:
            check_size(image, most=most)
            # Before its pixels are loaded, which turns some kinds; Pillow forgets the format then.
            kind, frames = image.format, bool(getattr(image, "is_animated", False))
            ImageOps.exif_transpose(image, in_place=True)
            pixels, brightest = _to_uint8(image, kind)
            return Picture(pixels, frames and kind != "MPO", _is_transparent(image), brightest)


def open_image(content: IO[bytes] | mmap.mmap) -> ImageFile.ImageFile:
    """Open an image of a format that is read; no others, some of which run programs.

    Raises:
        OSError: It is none.
    """
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    return Image.open(content, formats=formats)  # type: ignore[arg-type]


def _array(encoded: Encoded, remarks: Remarks) -> NDArray[np.uint8]:
    try:
        picture = read_image(encoded.content)
    except DAMAGE as error:
        raise FedveilError(
            f"cannot decode the image {encoded.origin}: {reason(error)}. Replace it or remove it."
        ) from error
    remarks.note(encoded.origin, picture)
    return picture.pixels


def _to_uint8(image: Image.Image, kind: str | None) -> tuple[NDArray[np.uint8], float | None]:
    """Return the pixels, and the largest in units of the range where that is not of 8 bits."""
    if image.mode in _GREY:
        return _as(image, "L"), None
    if image.mode == "I" and kind not in _WIDE:
        raise ValueError(
            "its pixels are whole numbers of no known range (32 bits, or with a sign); store it "
            "with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits to 8 instead of scaling them.
        return _scaled(np.asarray(image, dtype=np.float64).clip(0, 65535) / 65535)
    if image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                "its floating-point pixels do not lie between 0 and 1, so their range is not "
                "known; divide them by it, or store it with 8 or 16 bits"
            )
        return _scaled(values)
    return _as(image, "RGB"), None


def _scaled(values: NDArray[np.float64]) -> tuple[NDArray[np.uint8], float]:
    return np.rint(values * 255).astype(np.uint8), float(values.max())


def _is_transparent(image: Image.Image) -> bool:
    if "transparency" in image.info:
        return True
    if "A" not in image.getbands():
        return False
    return image.getchannel("A").getextrema()[0] != 255


def _as(image: Image.Image, mode: str) -> NDArray[np.uint8]:
    # Converting to the mode it has would copy the image all the same.
    return np.asarray(image if image.mode == mode else image.convert(mode))


def _stack(arrays: list[NDArray[np.uint8]], labels: list[int], *, colour: bool) -> Images:
    if colour:
        arrays = [a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in arrays]
    stacked = np.stack(arrays)
    planes = stacked.transpose(0, 3, 1, 2) if colour else stacked[:, None]
    raw = torch.from_numpy(np.ascontiguousarray(planes))
    return Images(raw, torch.tensor(labels, dtype=torch.int64))


def _with_progress(splits: Sequence[Split]) -> Iterator[tuple[int, Encoded]]:
    images = ((index, image) for index, split in enumerate(splits) for image in split.images)
    if not sys.stderr.isatty():
        yield from images
        return
    from fedveil.progress import ProgressBars

    started, total = time.monotonic(), sum(split.count for split in splits)
    with ExitStack() as stack:
        bars: ProgressBars | None = None
        for done, item in enumerate(images, start=1):
            if bars is None and time.monotonic() - started > _PATIENCE_SECONDS:
                bars = stack.enter_context(ProgressBars(transient=True))
            yield item
            if bars is not None:
                bars("Decoding images", done, total)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def reason(error: BaseException) -> str:
    """Return the first line of what a library said, without the address of a Python object."""
    text: Any = str(error).splitlines()
    if not text or "BytesIO object" in text[0]:
        return "it is not an image, or of an unknown format"
    return str(text[0]).rstrip(".")
