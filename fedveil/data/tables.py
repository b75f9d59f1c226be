"""Tables of images and labels, whatever they are read from."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fedveil.data.decode import Encoded, Split, decode
from fedveil.data.source import TEST_NAMES, Decoded
from fedveil.errors import FedveilError

BATCH = 1024
# Preferred among several label columns: CIFAR-100 has a fine and a coarse one.
_LABEL_NAMES = ("label", "fine_label", "labels", "class", "target")


_IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "pixels")


@dataclass(frozen=True)
class Table:
    """Rows of images and labels.

    Attributes:
        origin: What to call it in an error message.
        features: The Hugging Face feature of each column.
        batches: Runs through the values of one column.
        folder: What paths in it are relative to; None where there are none.
    """

    origin: str
    features: Mapping[str, Any]
    batches: Callable[[str], Iterable[list[Any]]]
    folder: Path | None = None


def read_tables(splits: Mapping[str, Sequence[Table]], origin: str) -> Decoded:
    """Decode a dataset.

    Args:
        splits: The tables of each split.
        origin: What to call the dataset in an error message.

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
    label = _label_column(chosen[0][0])
    values = [list(chain.from_iterable(_values(table, label) for table in s)) for s in chosen]
    _check_kinds(chosen, values)
    classes = _classes(chosen[0][0].features[label], chain.from_iterable(values))
    images = decode(
        [
            Split(tables[0].origin, _encoded(tables, _indices(found, classes, origin)), len(found))
            for tables, found in zip(chosen, values, strict=True)
        ]
    )
    return Decoded(images[0], images[1] if test else None, tuple(classes.values()))


def _check_kinds(splits: Sequence[Sequence[Table]], values: Sequence[Sequence[Any]]) -> None:
    """Refuse labels that are text in one place and numbers in another.

    Raises:
        FedveilError: Names the tables of each.
    """
    present = {isinstance(v, str) for found in values for v in found if v is not None}
    if len(present) < 2:
        return
    origins: dict[str, list[str]] = {"text": [], "numbers": []}
    for table in chain.from_iterable(splits):
        feature = table.features[_label_column(table)]
        text = "string" in str(getattr(feature, "dtype", ""))
        origins["text" if text else "numbers"].append(table.origin)
    told = "; ".join(f"{kind} in {', '.join(found)}" for kind, found in origins.items() if found)
    raise FedveilError(f"labels are of two types: {told}. Make them all text, or all numbers.")


def has_image_column(table: Table) -> bool:
    """Return whether a column of a table may hold images."""
    return bool(_image_columns(table))


def _values(table: Table, column: str) -> list[Any]:
    if column not in table.features:
        raise FedveilError(
            f"{table.origin} has no column {column!r}, which holds the labels elsewhere in the "
            f"dataset; its columns are {_names(table.features)}."
        )
    return list(chain.from_iterable(table.batches(column)))


def _encoded(tables: Sequence[Table], labels: Sequence[int]) -> Iterator[Encoded]:
    remaining = iter(labels)
    for table in tables:
        rows = chain.from_iterable(table.batches(_image_column(table)))
        for number, row in enumerate(rows):
            origin = f"{table.origin}, row {number}"
            yield Encoded(_content(row, origin, table.folder), origin, next(remaining))


def _content(row: Any, origin: str, folder: Path | None) -> bytes | Path:
    if isinstance(row, bytes):
        return row
    if row and row.get("bytes") is not None:
        return bytes(row["bytes"])
    if row and row.get("path"):
        path = Path(row["path"])
        return path if folder is None else folder / path
    raise FedveilError(f"{origin} holds no image. Remove the row.")


def _image_column(table: Table) -> str:
    found = _image_columns(table)
    if not found:
        raise FedveilError(
            f"{table.origin} has no image column: its columns are {_names(table.features)}. One "
            "must hold images as Hugging Face datasets do, {bytes, path}."
        )
    named = [name for name in _IMAGE_NAMES if name in found]
    if len(found) > 1 and not named:
        raise FedveilError(
            f"{table.origin} has {len(found)} columns of images: {', '.join(found)}. Call the one "
            "to learn from image, or remove the others."
        )
    return (named or found)[0]


def _image_columns(table: Table) -> list[str]:
    """Return the columns that hold images, of the surest kind that there is."""
    for kind in (_is_image, _is_struct_of_bytes, _is_binary):
        if found := [name for name, feature in table.features.items() if kind(feature)]:
            return found
    return []


def _is_binary(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")) in ("binary", "large_binary")


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image)


def _is_struct_of_bytes(feature: Any) -> bool:
    return isinstance(feature, dict) and "bytes" in feature


def _label_column(table: Table) -> str:
    import datasets

    declared = [n for n, f in table.features.items() if isinstance(f, datasets.ClassLabel)]
    plain = [n for n, f in table.features.items() if _is_plain_label(f) and n in _LABEL_NAMES]
    candidates = declared or plain
    if not candidates:
        raise FedveilError(
            f"{table.origin} has no label column: its columns are {_names(table.features)}. One "
            "must be of type ClassLabel, or hold whole numbers or text under one of the names "
            f"{', '.join(_LABEL_NAMES)}. Rename the column."
        )
    return next((name for name in _LABEL_NAMES if name in candidates), candidates[0])


def _is_plain_label(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Value) and feature.dtype.startswith(
        ("int", "uint", "string", "large_string", "bool")
    )


def _classes(feature: Any, values: Iterable[Any]) -> dict[Any, str]:
    """Return the name of the class that each value of a label column stands for, in order."""
    if declared := getattr(feature, "names", None):
        return dict(enumerate(declared))
    present = {value for value in values if value is not None}
    # A negative number is the custom for "unlabelled".
    return {v: str(v) for v in sorted(present) if isinstance(v, str) or v >= 0}


def _indices(values: Sequence[Any], classes: Mapping[Any, str], origin: str) -> list[int]:
    index = {value: number for number, value in enumerate(classes)}
    for row, value in enumerate(values):
        if value not in index:
            raise FedveilError(
                f"{origin}, image {row}: the label {value!r} stands for no class. Remove images "
                "without a label, or label them."
            )
    return [index[value] for value in values]


def _names(items: Mapping[str, Any]) -> str:
    return ", ".join(sorted(items)) or "none"
