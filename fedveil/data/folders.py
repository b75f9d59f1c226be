"""Folders of image files, a sub-folder a class."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from fedveil.data.decode import Encoded, Split, decode
from fedveil.data.files import hidden, list_images
from fedveil.data.parquet import holds_images, parquet
from fedveil.data.source import TEST_NAMES, TRAIN_NAMES, Decoded, Source, fingerprint
from fedveil.errors import FedveilError

_Files = Mapping[str, Sequence[Path]]


def folder(path: Path) -> Source:
    """Return the dataset in ``path``: parquet files, or image files in a sub-folder a class.

    Tables that hold no images, metadata for instance, are left out where there are classes.

    Raises:
        FedveilError: There are neither, image files stand outside the classes' sub-folders, or
            sub-folders may be splits as well as classes.
    """
    path = path.resolve()
    # Listed here and not by a library: the cache is keyed by the files, and is asked first.
    tables = sorted(file for file in path.rglob("*.parquet") if not hidden(file, path))
    if tables and (not _has_classes(path) or any(map(holds_images, tables))):
        return parquet(path, tables)
    train, test, left_out = _parts(path)
    found = [_classes_of(part) for part in (train, test) if part is not None]
    splits = [files for files, _ in found]
    left_out += [reason for _, reasons in found for reason in reasons]
    left_out += [f"{table}: a table without images" for table in tables]
    files = [file for split in splits for members in split.values() for file in members]
    read = partial(_read, splits, path)
    return Source(("images", str(path), fingerprint(files)), read, tuple(left_out))


def _has_classes(path: Path) -> bool:
    return any(list_images(child).images for child in _children(path))


def _children(path: Path) -> list[Path]:
    found = (child for child in path.iterdir() if not child.name.startswith("."))
    return sorted(child for child in found if child.is_dir())


def _parts(path: Path) -> tuple[Path, Path | None, list[str]]:
    """Return the folders of training and of test images, and what is left out.

    Raises:
        FedveilError: It cannot be told whether sub-folders are splits or classes.
    """
    children = _children(path)
    trains = [child for child in children if child.name.lower() in TRAIN_NAMES]
    tests = sorted(
        (child for child in children if child.name.lower() in TEST_NAMES),
        key=lambda child: TEST_NAMES.index(child.name.lower()),
    )
    if not trains and not tests:
        return path, None, []
    others = [c for c in children if c not in (*trains, *tests) and list_images(c).images]
    if len(trains) == 1 and not others and all(_has_classes(part) for part in (*trains, *tests)):
        left_out = [f"{part}: {tests[0].name} is the test split" for part in tests[1:]]
        return trains[0], tests[0] if tests else None, left_out
    if len(tests) == 1 and not trains and len(others) > 1 and not _has_classes(tests[0]):
        return path, None, []  # one class among several that happens to have the name
    names = ", ".join(child.name for child in (*trains, *tests))
    raise FedveilError(
        f"the sub-folders {names} of {path} may be splits or classes. If splits, let one be called "
        "train, with a sub-folder a class in each, and nothing beside them; if classes, put them "
        f"into {path / 'train'}, or give them other names."
    )


def _classes_of(path: Path) -> tuple[_Files, list[str]]:
    """Return the image files of each class, both in order of name, and what is left out."""
    listings = {child.name: list_images(child) for child in _children(path)}
    classes = {name: listing.images for name, listing in listings.items() if listing.images}
    if not classes:
        loose = bool(list_images(path).images)
        problem = "has images but no sub-folder a class" if loose else "holds 0 images"
        raise FedveilError(
            f"the folder {path} {problem}. Put the images of each class into a sub-folder named "
            "after it, or give a folder of parquet files."
        )
    inside = {path / name for name in listings}
    outside = [
        f"{image}: in no class's sub-folder"
        for image in list_images(path).images
        if not inside & set(image.parents)
    ]
    return classes, outside + [reason for one in listings.values() for reason in one.left_out]


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
