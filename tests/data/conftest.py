import os
from pathlib import Path

import pytest
from made_tables import random_pngs, write_parquet

_REAL = os.environ.get("FEDVEIL_DATA")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keep each module's cache, and the user's own, apart."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FEDVEIL_CACHE", str(folder))
        patch.delenv("FEDVEIL_DATA", raising=False)
        yield folder


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    folder = tmp_path / "fresh-cache"
    monkeypatch.setenv("FEDVEIL_CACHE", str(folder))
    return folder


@pytest.fixture
def parquet_folder(tmp_path):
    """A small valid dataset: 3 classes, 12 training and 6 test images, grey 6x5."""
    folder = tmp_path / "small"
    names = ["ant", "bee", "cat"]
    for split, count in (("train", 12), ("test", 6)):
        labels = [i % 3 for i in range(count)]
        images = random_pngs(count, (5, 6), seed=count)
        write_parquet(folder / f"{split}-00000-of-00001.parquet", images, labels, names=names)
    return folder


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """FEDVEIL_DATA as the user set it, or a small stand-in with the same schemas."""
    if _REAL:
        return Path(_REAL)
    root = tmp_path_factory.mktemp("data")
    digits = [str(i) for i in range(10)]
    fine = [f"fine {i}" for i in range(100)]
    for split, count in (("train", 120), ("test", 40)):
        grey = random_pngs(count, (28, 28), seed=count)
        colour = random_pngs(count, (32, 32, 3), seed=count)
        file = f"{split}-00000-of-00001.parquet"
        ten = [i % 10 for i in range(count)]
        write_parquet(root / "mnist" / file, grey, ten, names=digits)
        write_parquet(root / "cifar10" / file, colour, ten, image="img", names=digits)
        write_parquet(
            root / "cifar100" / file,
            colour,
            [i % 100 for i in range(count)],
            image="img",
            label="fine_label",
            names=fine,
        )
    return root
