"""Folders of parquet files."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedveil.data.source import TEST_NAMES, Decoded, Source, fingerprint, first_line
from fedveil.data.tables import BATCH, Table, read_tables
from fedveil.errors import FedveilError

_MOST_ROWS = 20_000_000
_LARGEST_BATCH = 2**30


def parquet(folder: Path, files: Sequence[Path]) -> Source:
    """Return the dataset in the parquet ``files`` of ``folder``.

    A file belongs to the split its name begins with, or else its own folder's name: ``train-0.
    parquet``, ``test/part.parquet``. Files that name no split are training images.

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
    known = {"train", *TEST_NAMES}
    parent = file.parent.name if file.parent != folder else ""
    for candidate in (file.stem.replace("_", "-").replace(".", "-").split("-")[0], parent):
        if candidate.lower() in known:
            return candidate.lower()
    return "train"


def _open(file: Path) -> Table:
    import datasets
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
        features = datasets.Features.from_arrow_schema(table.schema_arrow)
    except Exception as error:  # on damaged descriptions of features, datasets raises what it likes
        raise _damaged(file, error) from error
    if table.metadata.num_rows > _MOST_ROWS:
        raise FedveilError(
            f"the parquet file {file} speaks of {table.metadata.num_rows:,} rows; at most "
            f"{_MOST_ROWS:,} are read. Split it, or download it again."
        )
    return Table(str(file), features, batches)


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
