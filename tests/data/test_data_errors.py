import os
import subprocess
import sys

import numpy as np
import pytest
from made_tables import random_pngs, write_parquet
from PIL import Image

from fedveil.data import load_dataset
from fedveil.errors import FedveilError


def grey(path, shape=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros(shape, np.uint8)).save(path)


@pytest.fixture
def message():
    def load(name, **options):
        with pytest.raises(FedveilError) as caught:
            load_dataset(str(name), **options)
        return str(caught.value)

    return load


@pytest.mark.parametrize(("name", "near"), [("minst", "mnist"), ("Cifar-10", "cifar10")])
def test_unknown_name_suggests_the_nearest(message, name, near):
    text = message(name)
    assert repr(name) in text
    assert f"Did you mean {near}" in text


def test_unknown_name_lists_what_is_known(message):
    text = message("qqqqqq")
    assert "Did you mean" not in text
    assert all(name in text for name in ("digits", "photos", "mnist", "cifar10", "cifar100"))


def test_empty_name(message):
    assert "unknown dataset ''" in message("")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_missing_path(message, name):
    assert f"{name!r} does not exist" in message(name)


def test_file_instead_of_folder(message, tmp_path):
    file = tmp_path / "x.parquet"
    file.write_bytes(b"")
    assert f"{str(file)!r} is a file" in message(file)


def test_negative_seed(message):
    assert "seed is -1" in message("digits", seed=-1)


@pytest.mark.parametrize(
    "fold", ["digits@0/5", "digits@6/5", "digits@1/1", "digits@1+1/5", "digits@1+2/2"]
)
def test_a_fold_that_is_none(message, fold):
    text = message(fold)
    assert fold in text
    assert "k from 1 to n" in text


def test_fedveil_data_without_the_dataset(message, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDVEIL_DATA", str(tmp_path))
    text = message("mnist")
    assert str(tmp_path / "mnist") in text
    assert "unset FEDVEIL_DATA" in text


def test_fedveil_data_with_an_empty_folder(message, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDVEIL_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    assert f"{tmp_path / 'mnist'} holds 0 images" in message("mnist")


@pytest.mark.parametrize(
    "setting", [("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", "1")]
)
def test_an_unreachable_hub_is_not_waited_for(setting, tmp_path):
    # A process of its own: the client reads its settings once, when first imported.
    # Attempts are repeated after sleeps, of minutes in all if nothing bounds them; the clock would
    # measure how busy the machine is.
    code = (
        "import sys, time\nfrom fedveil.data import load_dataset\nfrom fedveil.errors import *\n"
        "slept = []\ntime.sleep = slept.append\n"
        "try: load_dataset('user/some-name')\n"
        "except FedveilError as e: print(e); print('slept', sum(slept)); sys.exit(2)"
    )
    folders = {"HF_HOME": str(tmp_path), "FEDVEIL_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **folders, setting[0]: setting[1]},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "'user/some-name'" in done.stdout
    assert "Hugging Face hub" in done.stdout
    assert float(done.stdout.split("slept ")[1]) < 10


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 99])
def test_corrupt_parquet_is_named(message, parquet_folder, damage):
    file = next(parquet_folder.glob("train-*"))
    file.write_bytes(damage(file.read_bytes()))
    assert f"cannot read the parquet file {file}" in message(parquet_folder)


def test_parquet_damaged_inside_is_an_error(message, tmp_path):
    file = tmp_path / "train.parquet"
    write_parquet(file, random_pngs(50, (20, 20)), [0, 1] * 25, names=["a", "b"])
    content = bytearray(file.read_bytes())
    content[2000:6000] = bytes(4000)
    file.write_bytes(content)
    assert str(file) in message(tmp_path)


def test_corrupt_image_in_parquet_is_named(message, tmp_path):
    images = random_pngs(4, (4, 4))
    images[2] = images[2][:40]
    write_parquet(tmp_path / "train.parquet", images, [0, 1, 0, 1])
    text = message(tmp_path)
    assert f"{tmp_path / 'train.parquet'}, row 2" in text
    assert "cannot decode" in text


def test_missing_image_in_parquet_is_named(message, tmp_path):
    table = [*random_pngs(3, (4, 4)), None]
    write_parquet(tmp_path / "train.parquet", table, [0, 1, 0, 1])
    assert "3.png" in message(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_corrupt_image_file_is_named(message, tmp_path, content):
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        grey(tmp_path / name, (40, 40))
    bad = tmp_path / "b/bad.png"
    whole = random_pngs(1, (40, 40))[0]
    bad.write_bytes(whole[: len(whole) // 2] if content is None else content)
    text = message(tmp_path)
    assert f"cannot decode the image {bad}" in text
    assert "0x" not in text


def test_one_class_only(message, tmp_path):
    grey(tmp_path / "folder/lonely/0.png")
    grey(tmp_path / "folder/lonely/1.png")
    text = message(tmp_path / "folder")
    assert "one class only" in text
    assert "'lonely'" in text
    write_parquet(tmp_path / "table/0.parquet", random_pngs(3, (4, 4)), [1] * 3, names=["x", "y"])
    assert "'y'" in message(tmp_path / "table")


def test_nothing_to_set_apart(message, tmp_path):
    grey(tmp_path / "a/0.png")
    grey(tmp_path / "b/0.png")
    assert "one image only" in message(tmp_path)


def test_unequal_sizes_name_both(message, tmp_path):
    grey(tmp_path / "a/0.png", (4, 6))
    grey(tmp_path / "b/1.png", (5, 6))
    text = message(tmp_path)
    assert f"{tmp_path / 'a/0.png'} is 6x4" in text
    assert f"{tmp_path / 'b/1.png'} is 6x5" in text


def test_test_images_must_be_of_the_training_size(message, tmp_path):
    grey(tmp_path / "train/a/0.png", (4, 4))
    grey(tmp_path / "train/b/0.png", (4, 4))
    grey(tmp_path / "test/a/9.png", (8, 8))
    assert str(tmp_path / "test/a/9.png") in message(tmp_path)


def test_zero_images(message, tmp_path):
    assert f"{tmp_path} holds 0 images" in message(tmp_path)
    write_parquet(tmp_path / "train.parquet", [], [], names=["a", "b"])
    assert f"{tmp_path / 'train.parquet'} holds 0 images" in message(tmp_path)


def test_images_without_classes(message, tmp_path):
    grey(tmp_path / "0.png")
    assert "no sub-folder a class" in message(tmp_path)


def test_test_class_without_training_images(message, tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "test/typo/0.png"):
        grey(tmp_path / name)
    assert "'typo'" in message(tmp_path)


def test_no_label_column(message, tmp_path):
    write_parquet(tmp_path / "train.parquet", random_pngs(2, (4, 4)), None, label=None)
    text = message(tmp_path)
    assert "no label column" in text
    assert "image" in text


def test_no_image_column(message, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"label": [0, 1], "text": ["a", "b"]}), tmp_path / "train.parquet")
    text = message(tmp_path)
    assert "no image column" in text
    assert "label, text" in text


def test_no_training_split(message, tmp_path):
    write_parquet(tmp_path / "test.parquet", random_pngs(2, (4, 4)), [0, 1])
    assert "its splits are test" in message(tmp_path)


@pytest.mark.parametrize("label", [-1, 5, None])
def test_label_that_stands_for_no_class(message, tmp_path, label):
    labels = [0, 1, label]
    write_parquet(tmp_path / "train.parquet", random_pngs(3, (4, 4)), labels, names=["a", "b"])
    text = message(tmp_path)
    assert repr(label) in text
    assert "image 2" in text
