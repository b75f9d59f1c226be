"""Folders of parquet files."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedveil.data.source import (
    TEST_NAMES,
    TRAIN_NAMES,
    Decoded,
    Source,
    fingerprint,
    first_line,
)
from fedveil.data.tables import BATCH, Table, has_image_column, read_tables
from fedveil.errors import FedveilError

_MOST_ROWS = 20_000_000
_LARGEST_BATCH = 2**30


def parquet(folder: Path, files: Sequence[Path]) -> Source:
    """Return the dataset in the parquet ``files`` of ``folder``.

    A file belongs to the split its name begins with, or else its own folder's name, or else one
    that its name holds: ``train-0.parquet``, ``test/part.parquet``, ``birds_val.parquet``. Files
    that name no split are training images.

    Raises:
        FedveilError: When read: a file is damaged, or lacks an image or a label column.
    """
    files = sorted(files)
    return Source(("parquet", fingerprint(files)), partial(_read, folder, files))


def _read(folder: Path, files: Sequence[Path]) -> Decoded:
    splits: dict[str, list[Table]] = defaultdict(list)
    for file in files:
        splits[_split_of(file, folder)].append(_open(file))
    return read_tables(splits, str(folder))


def _split_of(file: Path, folder: Path) -> str:
    parent = file.parent.name if file.parent != folder else ""
    words = file.stem.replace("_", "-").replace(".", "-").lower().split("-")
    for candidate in (words[0], parent.lower(), *words[1:]):
        if candidate in TRAIN_NAMES:
            return "train"
        if candidate in TEST_NAMES:
            return candidate
    return "train"


def holds_images(file: Path) -> bool:
    """Return whether a table has a column of images, or cannot be read, which is then said."""
    try:
        return has_image_column(_open(file))
    except FedveilError:
        return True


def _open(file: Path) -> Table:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    def batches(column: str) -> Iterator[list[Any]]:
        try:
            for batch in table.iter_batches(_rows_at_once(table), columns=[column]):
                yield batch.column(0).to_pylist()
        except (pa.ArrowException, OSError) as error:
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
    return Table(str(file), features, batches, file.parent)


def _features(schema: Any) -> dict[str, Any]:
    """Return the feature of each column; a column of a type that datasets lacks has none."""
    import datasets
    import pyarrow as pa

    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    declared = described.get("info", {}).get("features", {})
    alike = {pa.binary_view(): pa.binary(), pa.string_view(): pa.string()}
    features: dict[str, Any] = {}
    for column in schema:
        try:
            if column.name in declared:
                one = datasets.Features.from_dict({column.name: declared[column.name]})
                features[column.name] = one[column.name]
            else:
                kind = alike.get(column.type, column.type)
                plain = pa.schema([pa.field(column.name, kind)])
                features[column.name] = datasets.Features.from_arrow_schema(plain)[column.name]
        except (ValueError, TypeError, NotImplementedError):
            features[column.name] = None
    return features


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
