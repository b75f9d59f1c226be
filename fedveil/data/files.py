"""Which files of a folder are images, by what they hold; every other one is named."""

import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fedveil.data.decode import open_image
from fedveil.data.source import LeftOut
from fedveil.errors import FedveilError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp"}) | {
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".avif")
}
"""Of files that are images or are said to be damaged; others are looked into."""

_TABLES = frozenset({".parquet", ".parq", ".pq"})
_OTHER_FORMATS = frozenset({".heic", ".heif", ".dcm", ".nii", ".svg", ".psd", ".tga", ".ico"}) | {
    *(".raw", ".cr2", ".nef", ".dng", ".eps", ".exr", ".hdr", ".npy")
}
_NAMED = 5


@dataclass
class Listing:
    """The files below a folder, each sort in order of its paths.

    Attributes:
        root: The folder, without links.
        images: Image files.
        tables: Parquet files.
        left_out: What else was found and why it is not read.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def list_files(folder: Path) -> Listing:
    """Return what lies below a folder, every file once.

    A file whose suffix is an image's counts as one, so that a damaged one is not passed over; one
    of another suffix, or of none, counts if it holds an image. Links are followed, after all that
    is no link; what is reached a second time is left out, and so a loop ends.

    Args:
        folder: Where to look.

    Raises:
        FedveilError: A folder cannot be read.
    """
    listing = Listing(folder.resolve())
    seen: set[Path] = set()
    for path in _files(listing):
        if path.is_symlink():
            real = _real(path)
            if real in seen:
                listing.left_out.append(LeftOut(path, f"a link to {real}, which is read already"))
                continue
            seen.add(real)
        else:
            seen.add(path)
        _sort(path, listing)
    for found in (listing.images, listing.tables):
        found.sort()
    listing.left_out.sort(key=lambda one: (_interest(one.path), one.path))
    return listing


def told(left_out: Iterable[str], *, most: int = _NAMED) -> str:
    """Return how many files were left out and the first few of them, in one sentence."""
    every = tuple(left_out)
    more = f"; and {len(every) - most} more" if len(every) > most else ""
    files = "file" if len(every) == 1 else "files"
    return f"{len(every)} {files} left out: {'; '.join(every[:most])}{more}"


def in_words(left_out: Iterable[LeftOut], root: Path | None) -> tuple[str, ...]:
    """Return "path: reason" of each, the path within ``root`` where it is."""
    return tuple(f"{_within(one.path, root)}: {one.reason}" for one in left_out)


def _real(path: Path) -> Path:
    # Of os.path, which does not raise where links go in a circle.
    return Path(os.path.realpath(path))


def _within(path: Path, root: Path | None) -> Path:
    return path.relative_to(root) if root and path.is_relative_to(root) else path


def _interest(path: Path) -> int:
    """Return 0 of what was most likely meant to be read, 2 of what least likely was."""
    if path.name.startswith("."):
        return 2
    return 0 if path.suffix.lower() in SUFFIXES | _TABLES | _OTHER_FORMATS else 1


def _files(listing: Listing) -> Iterator[Path]:
    """Yield the files below a folder, links last; put folders that are passed over into it."""
    folders, links = deque([listing.root]), deque[Path]()
    linked_files: list[Path] = []
    seen: set[Path] = set()
    while folders or links:
        place = folders.popleft() if folders else links.popleft()
        real = _real(place)
        if real in seen:
            reason = f"a link to {real}, a folder that is read already"
            listing.left_out.append(LeftOut(place, reason))
            continue
        seen.add(real)
        entries = _entries(place)
        if not entries and place != listing.root:
            listing.left_out.append(LeftOut(place, "an empty folder"))
        for path, is_folder in entries:
            if path.name.startswith("."):
                listing.left_out.append(LeftOut(path, "hidden"))
            elif is_folder:
                (links if path.is_symlink() else folders).append(path)
            elif path.is_symlink():
                linked_files.append(path)
            else:
                yield path
    yield from linked_files


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    try:
        with os.scandir(folder) as entries:
            found = [(Path(entry.path), _is_folder(entry)) for entry in entries]
    except OSError as error:
        raise FedveilError(
            f"the folder {folder} cannot be read: {error.strerror}; mend its permissions, or move "
            "it away"
        ) from None
    return sorted(found)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _sort(path: Path, listing: Listing) -> None:
    suffix = path.suffix.lower()
    if reason := _unreadable(path):
        listing.left_out.append(LeftOut(path, reason))
    elif suffix in _TABLES:
        listing.tables.append(path)
    elif suffix in SUFFIXES:
        listing.images.append(path)
    elif reason := _no_image(path):
        listing.left_out.append(LeftOut(path, reason))
    else:
        listing.images.append(path)


def _unreadable(path: Path) -> str | None:
    try:
        if path.is_symlink() and not path.exists():
            return f"a link to {path.readlink()}, which does not exist"
        return None if path.is_file() else "no regular file"
    except (OSError, RuntimeError) as error:
        return f"cannot be read: {getattr(error, 'strerror', error)}"


def _no_image(path: Path) -> str | None:
    """Return why a file whose name promises no image is none; None if it holds one."""
    if path.suffix.lower() in _OTHER_FORMATS:
        return "of a format that is not read; convert it"
    try:
        # Mapped, since a file of any size may lie there, and some formats have their head at the
        # end.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held,
            open_image(held),
        ):
            return None
    except PermissionError as error:
        return f"cannot be read: {error.strerror}"
    except Image.DecompressionBombError:
        return None  # to be refused by its size
    except Exception:  # whatever Pillow makes of a file that is none
        return "no image"
