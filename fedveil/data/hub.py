"""Datasets of the Hugging Face hub."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from fedveil.data import cache
from fedveil.data.source import Decoded, Source, first_line
from fedveil.data.tables import BATCH, Table, read_tables
from fedveil.errors import FedveilError

_SECONDS = 5.0


def hub(name: str) -> Source:
    """Return the dataset ``name`` of the Hugging Face hub, at its newest revision.

    Without the hub, the revision it had when last asked is used.

    Raises:
        FedveilError: The hub has no such dataset, or does not answer and never did.
    """
    revision = _revision(name)
    return Source(("hub", name, revision), partial(_read, name, revision))


def _revision(name: str) -> str | None:
    """Return the newest revision of a hub dataset; None leaves the choice to ``datasets``."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    key = f"hub-{cache.digest(name)}"
    try:
        revision = HfApi().dataset_info(name, timeout=_SECONDS).sha
    except RepositoryNotFoundError as error:
        raise FedveilError(
            f"{name!r} is neither a folder here nor a dataset you may read on the Hugging Face "
            "hub. Check the name at https://huggingface.co/datasets, or the path; for a private or "
            "gated dataset run `hf auth login`."
        ) from error
    except Exception as error:  # each release of the client has its own set of network errors
        if last := cache.recall(key):
            return last
        if isinstance(error, OfflineModeIsEnabled):
            return None
        raise _unreachable(name, error) from error
    if revision:
        cache.remember(key, revision)
    return revision


def _unreachable(name: str, error: Exception) -> FedveilError:
    return FedveilError(
        f"cannot read {name!r} from the Hugging Face hub: {first_line(error)}. Check the network "
        "(or the path, if you meant a folder), or download the dataset and pass its folder; for "
        "mnist, cifar10 and cifar100 set FEDVEIL_DATA to the folder that holds them. `digits` and "
        "`photos` need neither."
    )


def _read(name: str, revision: str | None) -> Decoded:
    import datasets

    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # whatever the network, the disk or the dataset's own layout causes
        raise _unreachable(name, error) from error
    return read_tables({str(split): [_table(name, loaded[split])] for split in loaded}, name)


def _table(name: str, data: Any) -> Table:
    def batches(column: str) -> Iterator[list[Any]]:
        for batch in data.select_columns([column]).with_format("arrow").iter(BATCH):
            yield batch.column(0).to_pylist()

    return Table(f"{name} ({data.split})", data.features, batches)
