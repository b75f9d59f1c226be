"""Folders of image files, a sub-folder a class."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from fedveil.data.decode import Encoded, Split, decode
from fedveil.data.parquet import parquet
from fedveil.data.source import TEST_NAMES, Decoded, Source, fingerprint
from fedveil.errors import FedveilError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}) | {
    ".ppm",
    ".pgm",
}

_Files = Mapping[str, Sequence[Path]]


def folder(path: Path) -> Source:
    """Return the dataset in ``path``: parquet files, or image files in a sub-folder a class.

    Raises:
        FedveilError: There are neither, or image files stand outside the classes' sub-folders.
    """
    path = path.resolve()
    # Listed here and not by a library: the cache is keyed by the files, and is asked first.
    if tables := [file for file in path.rglob("*.parquet") if not _hidden(file, path)]:
        return parquet(path, tables)
    train = path / "train"
    test = next((path / name for name in TEST_NAMES if (path / name).is_dir()), None)
    parts = [train, *([test] if test else [])] if train.is_dir() else [path]
    splits = [_classes_of(part) for part in parts]
    files = [file for split in splits for found in split.values() for file in found]
    return Source(("images", str(path), fingerprint(files)), partial(_read, splits, path))


def _classes_of(path: Path) -> _Files:
    """Return the image files of each class, both in order of name."""
    found = {
        child.name: sorted(f for f in child.rglob("*") if _is_image(f) and not _hidden(f, path))
        for child in sorted(path.iterdir())
        if child.is_dir() and not child.name.startswith(".")
    }
    classes = {name: files for name, files in found.items() if files}
    if not classes:
        loose = any(_is_image(child) for child in path.iterdir())
        problem = "has images but no sub-folder a class" if loose else "holds 0 images"
        raise FedveilError(
            f"the folder {path} {problem}. Put the images of each class into a sub-folder named "
            "after it, or give a folder of parquet files."
        )
    return classes


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _read(splits: Sequence[_Files], root: Path) -> Decoded:
    classes = tuple(splits[0])
    for name in (name for split in splits[1:] for name in split if name not in classes):
        raise FedveilError(
            f"the class {name!r} of {root} has test images but no training images; the training "
            f"classes are {', '.join(classes)}. Add some, or remove the folder."
        )
    images = decode([_split(split, classes, root) for split in splits])
    return Decoded(images[0], images[1] if len(images) > 1 else None, classes)


def _split(files: _Files, classes: Sequence[str], root: Path) -> Split:
    images = [
        Encoded(file, str(file), classes.index(name)) for name in files for file in files[name]
    ]
    return Split(str(root), images, len(images))
