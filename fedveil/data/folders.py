"""Folders of image files, a sub-folder a class."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from fedveil.data.decode import Encoded, Split, decode
from fedveil.data.files import list_files
from fedveil.data.parquet import is_complete, parquet
from fedveil.data.source import TEST_NAMES, Decoded, LeftOut, Source, fingerprint, split_named
from fedveil.errors import FedveilError

FolderLayout = Literal["splits", "classes"]
"""What the sub-folders of a folder are."""

_Files = Mapping[str, Sequence[Path]]


def folder(path: Path, layout: FolderLayout | None = None) -> Source:
    """Return the dataset in ``path``: parquet files, or image files in a sub-folder a class.

    Args:
        path: The folder. Sub-folders whose names say so are splits, with a sub-folder a class in
            each. Tables without images or labels are left out where there are classes.
        layout: What sub-folders are whose names may mean splits or classes.

    Raises:
        FedveilError: There are neither, image files stand outside the classes' sub-folders, or
            sub-folders may be splits as well as classes.
    """
    # Listed here and not by a library: the cache is keyed by the files, and is asked first.
    listing = list_files(path)
    below = any(len(_parts(image, listing.root)) > 1 for image in listing.images)
    if listing.tables and (not below or any(map(is_complete, listing.tables))):
        return parquet(listing)
    splits, left_out = _splits(_grouped(listing.images, listing.root), listing.root, layout)
    left_out += listing.left_out
    left_out += [LeftOut(table, "a table without images or labels") for table in listing.tables]
    read = partial(_read, splits, listing.root)
    files = [[name, fingerprint(found)] for split in splits for name, found in split.items()]
    identity = ("images", str(listing.root), [len(split) for split in splits], files)
    return Source(identity, read, listing.root, tuple(left_out))


@dataclass
class _Group:
    """The images below one folder.

    Attributes:
        loose: In the folder itself.
        below: In its sub-folders, by the name of each.
    """

    loose: list[Path] = field(default_factory=list)
    below: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def images(self) -> list[Path]:
        return self.loose + [image for found in self.below.values() for image in found]


def _parts(image: Path, root: Path) -> tuple[str, ...]:
    return image.relative_to(root).parts


def _grouped(images: Iterable[Path], root: Path) -> _Group:
    group = _Group()
    for image in images:
        name, *rest = _parts(image, root)
        if rest:
            group.below.setdefault(name, []).append(image)
        else:
            group.loose.append(image)
    return group


def _splits(
    images: _Group, root: Path, layout: FolderLayout | None
) -> tuple[list[_Files], list[LeftOut]]:
    """Return the image files of each class of each split, and what is left out."""
    inside = {name: _grouped(found, root / name) for name, found in images.below.items()}
    trains = [name for name in inside if split_named(name) == "train"]
    tests = sorted(
        (name for name in inside if split_named(name) in TEST_NAMES),
        key=lambda name: TEST_NAMES.index(split_named(name) or ""),
    )
    left_out = [LeftOut(image, "in no class's sub-folder") for image in images.loose]
    if (layout or _layout(inside, trains, tests, root)) == "classes":
        if not images.below:
            raise _no_classes(root, loose=bool(images.loose))
        return [images.below], left_out
    if len(trains) != 1:
        raise FedveilError(
            f"{len(trains)} sub-folders of {root} are called like training images; of splits, one "
            "must be"
        )
    chosen = [trains[0], *tests[:1]]
    for name in (name for name in inside if name not in chosen):
        reason = f"not in {' or '.join(chosen)}"
        left_out += [LeftOut(image, reason) for image in inside[name].images]
    for name in chosen:
        if not inside[name].below:
            raise _no_classes(root / name, loose=True)
        left_out += [LeftOut(image, "in no class's sub-folder") for image in inside[name].loose]
    return [inside[name].below for name in chosen], left_out


def _layout(
    inside: Mapping[str, _Group], trains: Sequence[str], tests: Sequence[str], root: Path
) -> FolderLayout:
    """Return what sub-folders are by their names.

    Raises:
        FedveilError: It cannot be told.
    """
    named = [*trains, *tests]
    others = [name for name in inside if name not in named]
    if not named:
        _check_no_splits_below(inside, root)
        return "classes"
    if len(trains) == 1 and not others and all(inside[name].below for name in named):
        return "splits"
    if not trains and len(tests) == 1 and len(others) > 1 and not inside[tests[0]].below:
        return "classes"  # one among several that happens to have the name
    raise FedveilError(
        f"the sub-folders {', '.join(named)} of {root} may be splits or classes. Say which: "
        f"{root}@splits, with a sub-folder a class in each and one of them called train, or "
        f"{root}@classes."
    )


def _check_no_splits_below(inside: Mapping[str, _Group], root: Path) -> None:
    for name, group in inside.items():
        found = {below: split_named(below) for below in group.below}
        if "train" in found.values() and set(found.values()) & set(TEST_NAMES):
            raise FedveilError(
                f"{root / name} has the sub-folders {', '.join(sorted(found))}. If they are "
                f"splits, put them above the classes, like {root / 'train' / name}; if not, say so "
                f"by {root}@classes."
            )


def _no_classes(path: Path, *, loose: bool) -> FedveilError:
    problem = "has images but no sub-folder a class" if loose else "holds 0 images"
    return FedveilError(
        f"the folder {path} {problem}. Put the images of each class into a sub-folder named "
        "after it, or give a folder of parquet files."
    )


def _read(splits: Sequence[_Files], root: Path) -> Decoded:
    classes = tuple(splits[0])
    for name in (name for split in splits[1:] for name in split if name not in classes):
        raise FedveilError(
            f"the class {name!r} of {root} has test images but no training images; the training "
            f"classes are {', '.join(classes)}. Add some, or remove the folder."
        )
    images, remarks = decode([_split(split, classes, root) for split in splits])
    return Decoded(images[0], images[1] if len(images) > 1 else None, classes, remarks)


def _split(files: _Files, classes: Sequence[str], root: Path) -> Split:
    images = [
        Encoded(file, str(file), classes.index(name)) for name in files for file in files[name]
    ]
    return Split(str(root), images, len(images))
