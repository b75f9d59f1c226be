"""Originals and reconstructions of a leakage audit as pictures inside the page."""

import base64
import io
import lzma
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.errors import FedveilError
from fedveil.report.artifacts import LeakageAudit, LeakageRow

IMAGES = 6
"""Images shown of an audit, the same for each of its rows."""

ROWS = 8
"""Rows shown of an audit."""

_LARGEST_ARRAY = 256 * 2**20
_SIDE = 256
# What zipfile, its decompressors and numpy raise on files that are none of theirs.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    TypeError,
    OverflowError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
)

_Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class ImagePair:
    """An original beside what an attack made of it.

    Attributes:
        number: Which image of the audit, from 1.
        original, reconstruction: PNG as data URIs.
        decibels: Their distance, as text: PSNR.
        width, height: In pixels, as shown.
    """

    number: int
    original: str
    reconstruction: str
    decibels: str
    width: int
    height: int


@dataclass(frozen=True)
class Strip:
    """What one attack made of the images under one defence.

    Attributes:
        row: The attack and its scores.
        pairs: At most ``IMAGES``.
    """

    row: LeakageRow
    pairs: tuple[ImagePair, ...]


def gallery(audit: LeakageAudit) -> tuple[Strip, ...]:
    """Return the pictures of an audit; none where it left no ``reconstructions.npz``.

    Shown are the images with the most detail, by the spread of their pixels: sky and shadow show
    little. The scores beside them are of all images.

    Raises:
        FedveilError: The file is damaged or of another audit.
    """
    if audit.arrays is None:
        return ()
    try:
        with zipfile.ZipFile(audit.arrays) as archive:
            originals = _pixels(archive, "originals")
            spread = originals.std(axis=(1, 2, 3))
            shown = sorted(np.argsort(-spread, kind="stable")[:IMAGES].tolist())
            uris = {index: _uri(originals[index]) for index in shown}
            return tuple(
                _strip(row, originals, _pixels(archive, _key(row)), uris)
                for row in audit.rows[:ROWS]
            )
    except _DAMAGE as error:
        raise FedveilError(
            f"{audit.arrays} is damaged or of another audit ({error}); make the audit anew, or "
            "move the file away to have the page without pictures"
        ) from None


def _key(row: LeakageRow) -> str:
    return f"images/{row.attack}/{row.defense}/{'adaptive' if row.adaptive else 'naive'}"


def _pixels(archive: zipfile.ZipFile, key: str) -> _Pixels:
    """Return float32 [N, C, H, W] in [0, 1]; sizes are checked before anything is unpacked."""
    entry = archive.getinfo(f"{key}.npy")
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = header(stream)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind != "f" or fortran or len(shape) != 4 or shape[1] not in (1, 3):
            raise ValueError(f"{key} is no stack of grey or colour images")
        if min(shape) < 1 or size > _LARGEST_ARRAY or entry.file_size > _LARGEST_ARRAY + 2**16:
            raise ValueError(f"{key} is empty or larger than {_LARGEST_ARRAY >> 20} MiB")
        content = stream.read(size)
    if len(content) != size:
        raise ValueError(f"{key} is cut short")
    array = np.frombuffer(content, dtype=dtype).reshape(shape)
    return np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)


def _strip(row: LeakageRow, originals: _Pixels, made: _Pixels, uris: Mapping[int, str]) -> Strip:
    if made.shape != originals.shape:
        raise ValueError(f"{_key(row)} has another shape than the originals")
    pairs = (_pair(index, originals[index], made[index], uri) for index, uri in uris.items())
    return Strip(row, tuple(pairs))


def _pair(index: int, original: _Pixels, made: _Pixels, uri: str) -> ImagePair:
    error = float(np.mean((original.astype(np.float64) - made) ** 2))
    decibels = f"{-10 * math.log10(error):.0f} dB" if error > 0 else "equal"
    _, height, width = original.shape
    return ImagePair(index + 1, uri, _uri(made), decibels, width, height)


def _uri(image: _Pixels) -> str:
    from PIL import Image

    raw = np.rint(image * 255).astype(np.uint8)
    pixels: Any = raw[0] if len(raw) == 1 else raw.transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
