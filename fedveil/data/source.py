"""Where a dataset comes from, whatever its kind."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fedveil.data.images import Images

# Split names as Hugging Face datasets knows them, of those held out the best first.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "evaluation", "eval", "validation", "valid", "val", "dev")
_FILLERS = frozenset({"set", "split", "data", "dataset", "images", "imgs"})


@dataclass(frozen=True)
class LeftOut:
    """A file that lies in a dataset's folder and is not read.

    Attributes:
        path: Where it is.
        reason: Why it is not read, in words.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Decoded:
    """What a source holds.

    Attributes:
        train: The training split.
        test: The test split, if the source has one of its own.
        classes: Name of each class.
        remarks: What was decided in reading it, in words.
        left_out: Files that turned out not to be read.
        files: Image files that a table names, wherever they are.
    """

    train: Images
    test: Images | None
    classes: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Source:
    """A dataset not yet read.

    Attributes:
        identity: What changes whenever the content does; anything JSON can hold.
        read: Reads and decodes it, however long that takes.
        root: Its folder, if it is one.
        left_out: Files in it that are not read.
    """

    identity: tuple[object, ...]
    read: Callable[[], Decoded]
    root: Path | None = None
    left_out: tuple[LeftOut, ...] = ()


def split_named(name: str) -> str | None:
    """Return the split that the name of a folder stands for: ``train``, one of TEST_NAMES or None.

    Case, digits and words like "set" or "images" do not count: ``Train``, ``test_set``,
    ``ValidationImages``, ``1-testing``.
    """
    words = [word for word in _words(name) if word not in _FILLERS]
    return _split(words[0]) if len(words) == 1 else None


def split_in(path: Path) -> str | None:
    """Return the split that a table belongs to by its path within the dataset, or None.

    It is what its name begins with, or a folder it lies in, or a later word of its name:
    ``train-0.parquet``, ``test/part.parquet``, ``birds_val.parquet``.
    """
    first, *others = _words(path.stem) or [""]
    folders = (split_named(part) for part in reversed(path.parts[:-1]))
    found = (_split(first), *folders, *map(_split, others))
    return next((name for name in found if name), None)


def _words(name: str) -> list[str]:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W\d_]+", apart.lower())


def _split(word: str) -> str | None:
    for filler in ("", *_FILLERS):
        plain = word.removesuffix(filler)
        if plain in TRAIN_NAMES:
            return "train"
        if plain in TEST_NAMES:
            return plain
    return None


def fingerprint(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of change of ``files``: cheap, and enough to tell."""
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def first_line(error: Exception) -> str:
    """Return the first line of what a library said."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
