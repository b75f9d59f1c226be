"""From encoded images (PNG, JPEG and their like) to uint8 tensors."""

import os
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

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
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises on files that are no image, or a damaged one."""

_MOST_PIXELS = 2**24
_WIDE = frozenset({"PNG", "PPM"})  # formats whose widest pixels Pillow holds as 16 of 32 bits

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


def decode(splits: Sequence[Split]) -> list[Images]:
    """Decode ``splits``, one ``Images`` each; all get the same number of channels.

    Grey images stay grey unless a colour image stands among them; palettes become RGB,
    transparency is dropped, 16 bits become 8, and a camera's orientation tag is obeyed.

    Args:
        splits: What to decode.

    Returns:
        ``Images`` of uint8 [N, C, H, W], C being 1 or 3, in the order of ``splits``.

    Raises:
        FedveilError: There are no images, one cannot be decoded, or two differ in size.
    """
    first: tuple[str, tuple[int, ...]] | None = None
    pixels: list[list[NDArray[np.uint8]]] = [[] for _ in splits]
    labels: list[list[int]] = [[] for _ in splits]
    for index, image in _with_progress(splits):
        array = _array(image)
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
    return [_stack(p, y, colour=colour) for p, y in zip(pixels, labels, strict=True)]


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


def read_image(content: bytes | Path, *, most: int = _MOST_PIXELS) -> NDArray[np.uint8]:
    """Return the pixels of an image as training sees them.

    Grey images stay grey, with or without transparency; palettes and all others become RGB,
    transparency is dropped, 16 bits become 8, and a camera's orientation tag is obeyed. Of several
    frames it is the first.

    Args:
        content: The bytes of an image file, or where that file is.
        most: Pixels it may have.

    Returns:
        uint8 [H, W] of a grey image, [H, W, 3] of any other.

    Raises:
        OSError: It cannot be read; and the others of ``DAMAGE``, where it is no image, is damaged,
            too large, or of a kind whose pixels have no known range.
    """
    # From memory: a damaged length makes Pillow ask a file for gigabytes at once.
    whole = content if isinstance(content, bytes) else content.read_bytes()
    with Image.open(BytesIO(whole)) as image:
        check_size(image, most=most)
        # Not the format of what is turned, which Pillow forgets.
        kind = image.format
        ImageOps.exif_transpose(image, in_place=True)
        return _to_uint8(image, kind)


def _array(encoded: Encoded) -> NDArray[np.uint8]:
    try:
        return read_image(encoded.content)
    except DAMAGE as error:
        raise FedveilError(
            f"cannot decode the image {encoded.origin}: {reason(error)}. Replace it or remove it."
        ) from error


def _to_uint8(image: Image.Image, kind: str | None) -> NDArray[np.uint8]:
    if image.mode in _GREY:
        return _as(image, "L")
    if image.mode == "I" and kind not in _WIDE:
        raise ValueError(
            "its pixels are whole numbers of 32 bits, which have no known range; store it with 8 "
            "or 16 bits"
        )
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits to 8 instead of scaling them.
        wide = np.asarray(image, dtype=np.float64).clip(0, 65535)
        return np.rint(wide / 257).astype(np.uint8)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; store it with 8 or 16 bits")
    return _as(image, "RGB")


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
    from rich.console import Console
    from rich.progress import Progress

    started = time.monotonic()
    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("Decoding images", total=sum(split.count for split in splits))
    shown = False
    try:
        for item in images:
            if not shown and time.monotonic() - started > _PATIENCE_SECONDS:
                progress.start()
                shown = True
            yield item
            progress.advance(task)
    finally:
        progress.stop()


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def reason(error: BaseException) -> str:
    """Return the first line of what a library said, without the address of a Python object."""
    text: Any = str(error).splitlines()
    if not text or "BytesIO object" in text[0]:
        return "it is not an image, or of an unknown format"
    return str(text[0]).rstrip(".")
