"""Which files of a folder are images, by what they hold; every other one is named."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from fedveil.errors import FedveilError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp"}) | {
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
}
"""Of files that are images or are said to be damaged; others are looked into."""

_HEAD = 4096


@dataclass(frozen=True)
class Listing:
    """The files below a folder.

    Attributes:
        images: Image files, in order of their paths.
        left_out: What else was found and why it is no image, in words; hidden files do not count.
    """

    images: tuple[Path, ...]
    left_out: tuple[str, ...]


def list_images(folder: Path) -> Listing:
    """Return the image files below a folder; links are followed, a loop of them once.

    A file whose suffix is an image's counts as one, so that a damaged one is not passed over; one
    of another suffix, or of none, counts if it holds an image. Hidden files, among them the ``._``
    files of macOS, are passed over.

    Args:
        folder: Where to look.

    Raises:
        FedveilError: A folder cannot be read.
    """
    images, left_out = [], []
    for path in _files(folder):
        if not path.exists():
            left_out.append(f"{path}: a link to {path.readlink()}, which does not exist")
        elif not path.is_file():
            left_out.append(f"{path}: no regular file")
        elif path.suffix.lower() in SUFFIXES or _holds_image(path):
            images.append(path)
        elif path.suffix.lower() != ".parquet":
            left_out.append(f"{path}: no image")
    return Listing(tuple(images), tuple(left_out))


def hidden(path: Path, root: Path) -> bool:
    """Return whether a name between ``root`` and ``path`` begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def told(left_out: tuple[str, ...], *, most: int = 5) -> str:
    """Return how many files were left out and the first few of them, in one sentence."""
    first = "; ".join(left_out[:most])
    more = f"; and {len(left_out) - most} more" if len(left_out) > most else ""
    return f"{len(left_out)} left out: {first}{more}"


def _files(folder: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise FedveilError(
            f"the folder {error.filename} cannot be read: {error.strerror}; mend its permissions"
        ) from None

    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link led back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(place) / name


def _holds_image(path: Path) -> bool:
    try:
        with path.open("rb") as file, Image.open(BytesIO(file.read(_HEAD))):
            return True
    except Exception:  # whatever Pillow makes of a file that is none
        return False
