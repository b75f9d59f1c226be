"""Tables of images and labels, whatever they are read from."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fedveil.data.decode import Encoded, Split, decode
from fedveil.data.source import TEST_NAMES, Decoded, LeftOut
from fedveil.errors import FedveilError

BATCH = 1024
# Preferred among several columns: CIFAR-100 has a fine and a coarse label, and others a mask.
_LABEL_NAMES = ("label", "fine_label", "labels", "class", "target")
_IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "pixels")


@dataclass(frozen=True)
class Table:
    """Rows of images and labels.

    Attributes:
        origin: What to call it in an error message.
        features: The Hugging Face feature of each column; None of a type that it does not know.
        batches: Runs through the values of one column.
        folder: What paths in it are relative to; None where there are none.
        file: The file it is, if it is one.
    """

    origin: str
    features: Mapping[str, Any]
    batches: Callable[[str], Iterable[list[Any]]]
    folder: Path | None = None
    file: Path | None = None


def read_tables(
    splits: Mapping[str, Sequence[Table]],
    origin: str,
    *,
    left_out: Sequence[LeftOut] = (),
    remarks: Sequence[str] = (),
) -> Decoded:
    """Decode a dataset.

    Args:
        splits: The tables of each split.
        origin: What to call the dataset in an error message.
        left_out: Files that were left out before.
        remarks: What was decided before.

    Returns:
        The dataset; its columns of images and labels are found by the type of their feature.

    Raises:
        FedveilError: A split, a column, a label or an image is missing or damaged.
    """
    if "train" not in splits:
        raise FedveilError(
            f"{origin} has no training images: its splits are {_names(splits)}; one must be "
            "`train`. Rename a file or a folder accordingly."
        )
    test = next((name for name in TEST_NAMES if name in splits), None)
    chosen = [list(splits["train"])] + ([list(splits[test])] if test else [])
    column, noted = _label_column(chosen[0][0]), list(remarks)
    values = [list(chain.from_iterable(_values(table, column) for table in s)) for s in chosen]
    _check_kinds(list(chain.from_iterable(chosen)), values, column)
    classes = _classes(chosen[0], column, values)
    files: list[Path] = []
    images, said = decode(
        [
            Split(
                tables[0].origin,
                _encoded(tables, column, _indices(found, classes, origin), files),
                len(found),
            )
            for tables, found in zip(chosen, values, strict=True)
        ]
    )
    for name in (name for name in splits if name not in ("train", test)):
        noted.append(f"the split {name} is left out: {test or 'another'} is the test split")
        reason = f"the split {name}, besides {test}"
        left_out = [*left_out, *(LeftOut(t.file, reason) for t in splits[name] if t.file)]
    noted += _choices(chain.from_iterable(chosen), column)
    return Decoded(
        images[0],
        images[1] if test else None,
        tuple(str(name) for name in classes),
        (*dict.fromkeys(noted), *said),
        tuple(left_out),
        tuple(dict.fromkeys(files)),
    )


def has_images_and_labels(table: Table) -> bool:
    """Return whether columns of a table may hold images and their labels."""
    return bool(_image_columns(table)) and bool(_label_columns(table))


def _choices(tables: Iterable[Table], label: str) -> Iterator[str]:
    """Say which of several columns was read."""
    for table in tables:
        for what, found, taken in (
            ("images", list(_image_columns(table)), _image_column(table)),
            ("labels", _label_columns(table), label),
        ):
            if len(found) > 1:
                yield f"of the columns {', '.join(sorted(found))}, {what} are read from {taken}"


def _values(table: Table, column: str) -> list[Any]:
    """Return the labels of a table: the name of the class where it has one, else the value."""
    if column not in table.features:
        raise FedveilError(
            f"{table.origin} has no column {column!r}, which holds the labels elsewhere in the "
            f"dataset; its columns are {_names(table.features)}."
        )
    names: Sequence[str] | None = getattr(table.features[column], "names", None)
    found = chain.from_iterable(table.batches(column))
    return [_label(value, names) for value in found]


@dataclass(frozen=True)
class _Nameless:
    """A number that none of the declared names belongs to."""

    value: int

    def __repr__(self) -> str:
        return repr(self.value)


def _label(value: Any, names: Sequence[str] | None) -> Any:
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else _Nameless(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _check_kinds(tables: Sequence[Table], values: Sequence[Sequence[Any]], column: str) -> None:
    """Refuse labels that are text in one place and numbers in another.

    Raises:
        FedveilError: Names the tables of each.
    """
    kinds = {_kind(value) for found in values for value in found if _is_known(value)}
    if len(kinds - {None}) < 2:
        return
    origins: dict[str, list[str]] = {}
    for table in tables:
        for kind in {_kind(value) for value in _values(table, column) if _is_known(value)}:
            origins.setdefault(str(kind), []).append(table.origin)
    told = "; ".join(f"{kind} in {', '.join(found)}" for kind, found in origins.items())
    raise FedveilError(
        f"the labels in column {column!r} are of several types: {told}. Make them all text, or "
        "all numbers, and describe them alike."
    )


def _kind(value: Any) -> str | None:
    kinds = {str: "text", bool: "true or false", int: "numbers", float: "numbers"}
    return kinds.get(type(value))


def _is_known(value: Any) -> bool:
    # A negative number is the custom for "unlabelled".
    return isinstance(value, str) or (isinstance(value, int | float) and value >= 0)


def _classes(
    tables: Sequence[Table], column: str, values: Sequence[Sequence[Any]]
) -> dict[Any, int]:
    """Return the number of each label, in the order of declared names, or else sorted."""
    declared = [getattr(table.features[column], "names", None) or () for table in tables]
    names = list(dict.fromkeys(chain.from_iterable(declared)))
    present = {v for v in chain.from_iterable(values) if _is_known(v) and not _is_fraction(v)}
    return {value: number for number, value in enumerate(names or sorted(present))}


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float) and not value.is_integer()


def _indices(values: Sequence[Any], classes: Mapping[Any, int], origin: str) -> list[int]:
    for row, value in enumerate(values):
        if value not in classes:
            shown = None if isinstance(value, float) and math.isnan(value) else value
            raise FedveilError(
                f"{origin}, image {row}: the label {shown!r} stands for no class. Remove images "
                "without a label, or label them."
            )
    return [classes[value] for value in values]


def _encoded(
    tables: Sequence[Table], column: str, labels: Sequence[int], files: list[Path]
) -> Iterator[Encoded]:
    """Yield the images; note in ``files`` which of them lie outside the tables.

    Raises:
        FedveilError: A table has more labels than images, or fewer.
    """
    start = 0
    for table in tables:
        end = start + sum(map(len, table.batches(column)))
        own, number = labels[start:end], 0
        for row in chain.from_iterable(table.batches(_image_column(table))):
            origin = f"{table.origin}, row {number}"
            if number == len(own):
                raise _uneven(table, len(own), "more")
            content = _content(row, origin, table.folder)
            if isinstance(content, Path):
                files.append(content)
            yield Encoded(content, origin, own[number])
            number += 1
        if number < len(own):
            raise _uneven(table, len(own), str(number))
        start = end


def _uneven(table: Table, labels: int, images: str) -> FedveilError:
    # It would put labels to the wrong images, those of the next table too.
    return FedveilError(
        f"{table.origin} has {labels} labels and {images} images: it is damaged. Download it again."
    )


def _content(row: Any, origin: str, folder: Path | None) -> bytes | Path:
    stored, path = (row.get("bytes"), row.get("path")) if isinstance(row, dict) else (row, None)
    if isinstance(stored, bytes):
        return stored
    path = stored if isinstance(stored, str) else path
    if not isinstance(path, str) or not path:
        raise FedveilError(f"{origin} holds no image. Remove the row.")
    return Path(path) if folder is None else folder / path


def _image_column(table: Table) -> str:
    found = _image_columns(table)
    if not found:
        raise FedveilError(
            f"{table.origin} has no image column: its columns are {_names(table.features)}. One "
            "must hold images as Hugging Face datasets do, {bytes, path}."
        )
    if named := _named(_IMAGE_NAMES, found):
        return named
    surest = [name for name, rank in found.items() if rank == min(found.values())]
    if len(surest) > 1:
        raise FedveilError(
            f"{table.origin} has {len(surest)} columns of images: {', '.join(surest)}. Call the "
            "one to learn from image, or remove the others."
        )
    return surest[0]


def _named(names: Sequence[str], found: Iterable[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(list(found))}
    return next((lower[name] for name in names if name in lower), None)


def _image_columns(table: Table) -> dict[str, int]:
    """Return the columns that may hold images, each with its rank, 0 being the surest."""
    ranks = ((name, _rank(feature)) for name, feature in table.features.items())
    return {name: rank for name, rank in ranks if rank is not None}


def _rank(feature: Any) -> int | None:
    import datasets

    if isinstance(feature, datasets.Image):
        return 0
    if isinstance(feature, dict):
        return 1 if "bytes" in feature else None
    is_value = isinstance(feature, datasets.Value)
    return 2 if is_value and feature.dtype in ("binary", "large_binary") else None


def _label_column(table: Table) -> str:
    candidates = _label_columns(table)
    if not candidates:
        raise FedveilError(
            f"{table.origin} has no label column: its columns are {_names(table.features)}. One "
            "must be of type ClassLabel, or hold numbers or text under one of the names "
            f"{', '.join(_LABEL_NAMES)}. Rename the column."
        )
    return _named(_LABEL_NAMES, candidates) or candidates[0]


def _label_columns(table: Table) -> list[str]:
    import datasets

    declared = [n for n, f in table.features.items() if isinstance(f, datasets.ClassLabel)]
    plain = [
        name
        for name, feature in table.features.items()
        if name.lower() in _LABEL_NAMES and _is_plain_label(feature)
    ]
    return declared or plain


def _is_plain_label(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Value) and feature.dtype.startswith(
        ("int", "uint", "float", "string", "large_string", "bool")
    )


def _names(items: Mapping[str, Any]) -> str:
    return ", ".join(sorted(items)) or "none"
