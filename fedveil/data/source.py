"""Where a dataset comes from, whatever its kind."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fedveil.data.images import Images

# What a held-out split is called on the hub and in folders, the best first.
TEST_NAMES = ("test", "testing", "validation", "valid", "val")
TRAIN_NAMES = ("train", "training")


@dataclass(frozen=True)
class Decoded:
    """What a source holds.

    Attributes:
        train: The training split.
        test: The test split, if the source has one of its own.
        classes: Name of each class.
    """

    train: Images
    test: Images | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A dataset not yet read.

    Attributes:
        identity: What changes whenever the content does; anything JSON can hold.
        read: Reads and decodes it, however long that takes.
        left_out: What lies there and is not read, in words.
    """

    identity: tuple[object, ...]
    read: Callable[[], Decoded]
    left_out: tuple[str, ...] = ()


def fingerprint(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of change of ``files``: cheap, and enough to tell."""
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def first_line(error: Exception) -> str:
    """Return the first line of what a library said."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
