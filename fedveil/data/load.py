"""``load_dataset``: one name in, one dataset out."""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fedveil.data import cache
from fedveil.data.embedded import digits, photos
from fedveil.data.files import in_words, told
from fedveil.data.folders import FolderLayout, folder
from fedveil.data.hub import hub
from fedveil.data.images import Dataset, Images
from fedveil.data.source import Decoded, LeftOut, Source, fingerprint
from fedveil.errors import FedveilError

_TEST_SHARE = 0.2
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LAYOUT = re.compile(r"(?P<name>.+)@(?P<layout>splits|classes)")
_FOLD = re.compile(r"(?P<name>.+)@(?P<numbers>\d{1,9}(?:\+\d{1,9})*)/(?P<folds>\d{1,9})")


def load_dataset(name: str, *, seed: int = 0) -> Dataset:
    """Load a dataset of images, decoded once and cached from then on.

    Args:
        name: One of

            * ``digits`` (1,797 grey 8x8 images) or ``photos`` (1,600 colour 32x32 patches of two
              photographs): built in;
            * ``mnist``, ``cifar10`` or ``cifar100``: read from ``$FEDVEIL_DATA/<name>`` if that
              variable is set, else from the Hugging Face hub;
            * ``user/name``: any image dataset of the hub;
            * the path of a folder of parquet files, or of image files in a sub-folder a class, with
              or without ``train`` and ``test`` folders above.

            A path that exists wins over a hub name. Training images are the split called ``train``
            or ``training``, test images the one called ``test``, ``testing``, ``evaluation``,
            ``eval``, ``validation``, ``valid``, ``val`` or ``dev``, in this order and in any case.
            Where the names of sub-folders may mean splits or classes, ``PATH@splits`` or
            ``PATH@classes`` says which.

            Any of them with ``@k/n`` behind it is one fold of a cross-validation: every n-th
            training image from the k-th on (k in 1 … n, n at least 2) stands in for the test split,
            which is left out. For choosing settings without a look at the test images. Several
            folds are joined by ``+``, as in ``mnist@4+5/12``: where the order of the images has a
            period, a single fold may be harder or easier than the whole.
        seed: Draws the test images (one in five, of every class) where the source sets none apart;
            otherwise without effect. At least 0.

    Returns:
        The dataset: ``raw`` is uint8 [N, C, H, W], C being 1 if all images are grey and else 3;
        ``labels`` is int64 [N], indices into ``classes``. Unnormalised. Where the cache in
        ``FEDVEIL_CACHE`` (default ``~/.cache/fedveil``) holds it, the tensors are mapped from
        there, and processes share the memory. Every file of a folder that is not read is in
        ``left_out``.

    Raises:
        FedveilError: The name or the fold is unknown, the folder or the hub cannot be read, an
            image is damaged or differs in size, labels are missing, or there are fewer than two
            classes.
    """
    if seed < 0:
        raise FedveilError(f"the seed is {seed}; it must be at least 0.")
    source, folds = _parse_folds(name)
    found = _find(source)
    decoded = _read(found)
    train, test = decoded.train, decoded.test
    if folds:
        if test is None:
            train, _ = _split(train, seed)
        train, test = folds.divide(train)
    if len(_present(train.labels)) < 2:
        raise FedveilError(
            f"the dataset {name!r} has training images of one class only "
            f"({decoded.classes[int(train.labels[0])]!r}); at least two are needed to learn from."
        )
    if test is None:
        train, test = _split(train, seed)
    return Dataset(
        name, train, test, decoded.classes, in_words(decoded.left_out, found.root), decoded.remarks
    )


def absolute_name(name: str) -> str:
    """Return a dataset's name that means the same from any folder; paths become absolute."""
    source, _ = _parse_folds(name)
    place, _ = _parse_layout(source)
    if place in _SOURCES or not place or not _path(place).is_dir():
        return name
    return str(_path(place).resolve()) + name.removeprefix(place)


def load_own_images(
    path: str,
    *,
    classes: Sequence[str],
    shape: tuple[int, int, int],
    tell: Callable[[str], None] = lambda sentence: None,
) -> Images:
    """Load every image of one party's own folder, labelled as the federation numbers the classes.

    Args:
        path: Folder of parquet files, or of image files in a sub-folder a class; where it has
            ``train`` and ``test`` parts, both are taken. ``@splits`` and ``@classes`` may follow.
        classes: Names of the federation's classes, in the order of their labels. The folder need
            not hold all of them, not even two.
        shape: (C, H, W) every image must have; grey images stand in for colour ones.
        tell: Told what is left out, and what was decided.

    Raises:
        FedveilError: The folder cannot be read, has a class that the federation has not, or its
            images have another shape.
    """
    found = _find_folder(path)
    decoded = _read(found)
    for sentence in remarks_on(in_words(decoded.left_out, found.root), decoded.remarks):
        tell(f"{path}: {sentence}")
    parts = [decoded.train] if decoded.test is None else [decoded.train, decoded.test]
    raw = torch.cat([part.raw for part in parts])
    labels = torch.cat([part.labels for part in parts])
    if unknown := sorted(set(decoded.classes) - set(classes)):
        raise FedveilError(
            f"the folder {path!r} has images of {unknown[0]!r}, which is no class of this "
            f"federation ({', '.join(classes)}); rename or remove that class"
        )
    if raw.shape[1] == 1:
        raw = raw.expand(-1, shape[0], -1, -1)
    if tuple(raw.shape[1:]) != shape:
        raise FedveilError(
            f"the images of {path!r} are {_size(tuple(raw.shape[1:]))}, those of the federation "
            f"{_size(shape)}; convert them"
        )
    numbers = torch.tensor([list(classes).index(name) for name in decoded.classes])
    return Images(raw, numbers[labels])


def remarks_on(left_out: Sequence[str], remarks: Sequence[str]) -> tuple[str, ...]:
    """Return the sentences in which a reader of images says what it left out and decided."""
    return ((told(left_out),) if left_out else ()) + tuple(remarks)


def _find_folder(path: str) -> Source:
    place, layout = _parse_layout(path)
    if not _path(place).is_dir():
        raise FedveilError(f"the data folder {path!r} of this node does not exist")
    return folder(_path(place), layout)


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


@dataclass(frozen=True)
class _Folds:
    numbers: tuple[int, ...]
    folds: int

    def divide(self, images: Images) -> tuple[Images, Images]:
        """Return the other folds and these."""
        place = torch.arange(len(images)) % self.folds + 1
        held_out = torch.isin(place, torch.tensor(self.numbers))
        return images[~held_out], images[held_out]


def _parse_folds(name: str) -> tuple[str, _Folds | None]:
    match = _FOLD.fullmatch(name)
    if not match or _path(name).exists():
        return name, None
    folds = _Folds(tuple(map(int, match["numbers"].split("+"))), int(match["folds"]))
    distinct = set(folds.numbers)
    within = min(distinct) >= 1 and max(distinct) <= folds.folds
    sound = within and len(distinct) == len(folds.numbers) < folds.folds
    if not sound:
        raise FedveilError(
            f"the dataset {name!r} asks for fold {match['numbers']} of {folds.folds}; give "
            "NAME@k/n with n at least 2 and k from 1 to n, or several of them, NAME@k+k/n, but not "
            "all"
        )
    return match["name"], folds


def _parse_layout(name: str) -> tuple[str, FolderLayout | None]:
    match = _LAYOUT.fullmatch(name)
    if not match or _path(name).exists():
        return name, None
    return match["name"], cast("FolderLayout", match["layout"])


def _published(name: str, hub_name: str) -> Source:
    """Return a well-known dataset, from ``FEDVEIL_DATA`` if set and else from the hub."""
    root = os.environ.get("FEDVEIL_DATA")
    if not root:
        return hub(hub_name)
    path = Path(root).expanduser() / name
    if not path.is_dir():
        raise FedveilError(
            f"FEDVEIL_DATA is {root!r}, but {str(path)!r} is not a folder. Put {name}'s "
            "train-*.parquet and test-*.parquet there, or unset FEDVEIL_DATA to use the Hugging "
            "Face hub."
        )
    return folder(path)


_SOURCES: Mapping[str, Callable[[], Source]] = {
    "digits": digits,
    "photos": photos,
    "mnist": partial(_published, "mnist", "ylecun/mnist"),
    "cifar10": partial(_published, "cifar10", "uoft-cs/cifar10"),
    "cifar100": partial(_published, "cifar100", "uoft-cs/cifar100"),
}


def _find(name: str) -> Source:
    if known := _SOURCES.get(name):
        return known()
    place, layout = _parse_layout(name)
    path = _path(place)
    if name and path.is_dir():
        return folder(path, layout)
    if layout:
        raise FedveilError(f"{place!r} is no folder here; @{layout} may follow the path of one.")
    if path.is_file():
        raise FedveilError(f"the dataset {name!r} is a file; give the folder it stands in.")
    if _HUB_NAME.fullmatch(name):
        return hub(name)
    if "/" in name or name.startswith(("~", ".")):
        raise FedveilError(
            f"the dataset folder {name!r} does not exist. Check the path; a dataset of the Hugging "
            "Face hub is named user/name."
        )
    raise _unknown(name)


def _path(name: str) -> Path:
    """Return the path a name may stand for.

    Raises:
        FedveilError: It could not be one on any machine.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, or the home of nobody
        raise FedveilError(f"the dataset {name[:100]!r} is no path: {error}") from None
    return path


def _unknown(name: str) -> FedveilError:
    near = difflib.get_close_matches(name.lower(), _SOURCES, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return FedveilError(
        f"unknown dataset {name!r}.{hint} Use one of {', '.join(_SOURCES)}, a Hugging Face name "
        "like user/name, or the path of a folder of parquet files or of images by class."
    )


def _read(source: Source) -> Decoded:
    """Return a dataset, with everything that is left out."""
    decoded = _cached(source)
    used = set(decoded.files)
    left_out = [one for one in source.left_out if one.path not in used]
    return replace(decoded, left_out=(*left_out, *decoded.left_out))


def _cached(source: Source) -> Decoded:
    key = f"images-{cache.digest(*source.identity)}"
    if (known := _recalled(key)) is not None:
        return known
    decoded = source.read()
    cache.write(key, _pack(decoded), _notes(decoded))
    # Read back, so that this process too holds shared pages instead of its own copy.
    return _recalled(key) or decoded


def _recalled(key: str) -> Decoded | None:
    """Return what the cache holds, unless a file that a table names has changed since."""
    entry = cache.read(key)
    if entry is None:
        return None
    noted = json.loads(entry[1][0])
    decoded = _unpack(entry[0], noted)
    return decoded if noted["files"] == _state(decoded.files) else None


def _state(files: Iterable[Path]) -> list[list[object]] | None:
    try:
        return [list(state) for state in fingerprint(files)]
    except OSError:
        return None


def _notes(decoded: Decoded) -> list[str]:
    noted = {
        "classes": decoded.classes,
        "remarks": decoded.remarks,
        "left_out": [(str(one.path), one.reason) for one in decoded.left_out],
        "files": _state(decoded.files),
    }
    return [json.dumps(noted)]


def _pack(decoded: Decoded) -> dict[str, Tensor]:
    splits = {"train": decoded.train, "test": decoded.test}
    return {
        f"{split}.{part}": tensor
        for split, images in splits.items()
        if images is not None
        for part, tensor in (("raw", images.raw), ("labels", images.labels))
    }


def _unpack(tensors: Mapping[str, Tensor], noted: Mapping[str, Any]) -> Decoded:
    train, test = (
        Images(tensors[f"{split}.raw"], tensors[f"{split}.labels"])
        if f"{split}.raw" in tensors
        else None
        for split in ("train", "test")
    )
    assert train is not None
    return Decoded(
        train,
        test,
        tuple(noted["classes"]),
        tuple(noted["remarks"]),
        tuple(LeftOut(Path(path), reason) for path, reason in noted["left_out"]),
        tuple(Path(path) for path, *_ in noted["files"] or ()),
    )


def _present(labels: Tensor) -> list[int]:
    return labels.bincount().nonzero().flatten().tolist()


def _split(images: Images, seed: int) -> tuple[Images, Images]:
    """Set one in five of every class apart; a class of one image stays in training."""
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(images), dtype=torch.bool)
    for label in _present(images.labels):
        members = (images.labels == label).nonzero().squeeze(1)
        count = max(round(_TEST_SHARE * len(members)), 1) if len(members) > 1 else 0
        drawn = torch.randperm(len(members), generator=generator)[:count]
        held_out[members[drawn]] = True
    if not held_out.any():
        raise FedveilError(
            "every class has one image only, so none can be set apart for testing. Add images, or "
            "a test split."
        )
    return images[~held_out], images[held_out]
