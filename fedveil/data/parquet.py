"""Folders of parquet files."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedveil.data.source import TEST_NAMES, Decoded, Source, fingerprint, first_line
from fedveil.data.tables import BATCH, Table, read_tables
from fedveil.errors import FedveilError


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
            for batch in table.iter_batches(BATCH, columns=[column]):
                yield batch.column(0).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(file, error) from error

    try:
        table = ParquetFile(file)
        features = datasets.Features.from_arrow_schema(table.schema_arrow)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(file, error) from error
    return Table(str(file), features, batches)


def _damaged(file: Path, error: Exception) -> FedveilError:
    return FedveilError(
        f"cannot read the parquet file {file}: {first_line(error)}. Download it again."
    )
