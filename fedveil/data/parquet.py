"""Folders of parquet files."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedveil.data.files import Listing
from fedveil.data.source import (
    Decoded,
    LeftOut,
    Source,
    fingerprint,
    first_line,
    split_in,
)
from fedveil.data.tables import BATCH, Table, has_images_and_labels, read_tables
from fedveil.errors import FedveilError

_MOST_ROWS = 20_000_000
_LARGEST_BATCH = 2**30


def parquet(listing: Listing) -> Source:
    """Return the dataset in the parquet files of a folder.

    A file belongs to the split its name begins with, or else a folder it lies in, or else one that
    its name holds: ``train-0.parquet``, ``test/part.parquet``, ``birds_val.parquet``. Files that
    name no split are training images.

    Raises:
        FedveilError: When read: a file is damaged, or none has images and labels.
    """
    beside = [LeftOut(image, "beside tables of images") for image in listing.images]
    identity = ("parquet", str(listing.root), fingerprint(listing.tables))
    read = partial(_read, listing.root, tuple(listing.tables))
    return Source(identity, read, listing.root, tuple(beside + listing.left_out))


def is_complete(file: Path) -> bool:
    """Return whether a table has images and labels, or cannot be read, which is then said."""
    try:
        return has_images_and_labels(_open(file))
    except FedveilError:
        return True


def _read(root: Path, files: Sequence[Path]) -> Decoded:
    tables = {file: _open(file) for file in files}
    whole = {file: table for file, table in tables.items() if has_images_and_labels(table)}
    # Where none is, let the first one tell what it lacks.
    used = whole or tables
    splits: dict[str, list[Table]] = defaultdict(list)
    unnamed = []
    for file, table in used.items():
        split = split_in(file.relative_to(root))
        splits[split or "train"].append(table)
        unnamed += [] if split else [str(file.relative_to(root))]
    reason = "a table without images or labels"
    left_out = [LeftOut(file, reason) for file in files if file not in used]
    some = ", ".join(unnamed[:3]) + (", ..." if len(unnamed) > 3 else "")
    guessed = f"{some}: no split in the name, so these are training images"
    mixed = bool(unnamed) and len(unnamed) < len(used)
    return read_tables(splits, str(root), left_out=left_out, remarks=[guessed] if mixed else [])


def _open(file: Path) -> Table:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    def batches(column: str) -> Iterator[list[Any]]:
        try:
            for batch in table.iter_batches(_rows_at_once(table), columns=[column]):
                # By name: a column may come with others whose names begin like its own.
                yield batch.column(max(0, batch.schema.get_field_index(column))).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(file, error) from error

    try:
        table = ParquetFile(file)
        features = _features(table.schema_arrow)
    except Exception as error:  # on damaged descriptions of features, datasets raises what it likes
        raise _damaged(file, error) from error
    if table.metadata.num_rows > _MOST_ROWS:
        raise FedveilError(
            f"the parquet file {file} speaks of {table.metadata.num_rows:,} rows; at most "
            f"{_MOST_ROWS:,} are read. Split it, or download it again."
        )
    return Table(str(file), features, batches, file.parent, file)


def _features(schema: Any) -> dict[str, Any]:
    """Return the feature of each column; a column of a type that datasets lacks has none."""
    import datasets

    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    declared = described.get("info", {}).get("features", {})
    features: dict[str, Any] = {}
    for column in schema:
        try:
            if column.name in declared:
                one = datasets.Features.from_dict({column.name: declared[column.name]})
                features[column.name] = one[column.name]
            else:
                features[column.name] = datasets.features.features.generate_from_arrow_type(
                    _plain(column.type)
                )
        # datasets raises any of these for a type that it lacks. Beside images and labels such a
        # column is of no matter; where one of these is missing, the error lists every column.
        except (ValueError, TypeError, NotImplementedError, KeyError):
            features[column.name] = None
    return features


def _plain(kind: Any) -> Any:
    """Return an arrow type without what changes only how its values are stored."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(one.name, _plain(one.type)) for one in kind])
    if kind == pa.binary_view():
        return pa.binary()
    return pa.string() if kind == pa.string_view() else kind


def _rows_at_once(table: Any) -> int:
    """Return how many rows to unpack together.

    A column stores a value that repeats once, so that a small file may unpack to a thousand times
    the size it declares; no value is larger than its declared row group.
    """
    # Not by column: pyarrow ends the process on a damaged description of one.
    groups: list[int] = [
        table.metadata.row_group(group).total_byte_size
        for group in range(table.metadata.num_row_groups)
    ]
    return max(1, min(BATCH, _LARGEST_BATCH // max([1, *groups])))


def _damaged(file: Path, error: Exception) -> FedveilError:
    return FedveilError(
        f"cannot read the parquet file {file}: {first_line(error)}. Download it again."
    )
