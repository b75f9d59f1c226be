"""A small slice of the fuzzing in every test run, and whether the fuzzer itself would notice."""

import math
import os
import resource
import time
import zipfile
from contextlib import suppress

import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from torch import nn

from fedveil.data import load_dataset, parse_partition
from fedveil.defenses import parse_defense
from fedveil.errors import FedveilError
from fedveil.runs.config import TrainConfig
from fedveil.runs.state_files import load_checkpoint
from tests.fuzz import running
from tests.fuzz.mutations import flip
from tests.fuzz.running import run_target
from tests.fuzz.targets import Target, targets

TARGETS = targets()


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "bombs"])
def test_a_slice_of_every_target(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDVEIL_CACHE", str(tmp_path / "cache"))
    count = 25
    tally = run_target(TARGETS[name], seed=2026, count=count, failures=tmp_path / "failures")
    told = "\n".join(path.read_text()[-500:] for path in (tmp_path / "failures").glob("*.txt"))
    assert tally.failed == 0, told
    assert tally.accepted + tally.refused == count
    assert tally.refused > 0


def _raise(content, folder):
    raise KeyError("an error no user should see")


def _hang(content, folder):
    while True:
        pass


def _sleep(content, folder):
    time.sleep(3600)


def _crash(content, folder):
    os.abort()


def _grow(content, folder):
    return bytes(4 * 2**30)


def _mumble(content, folder):
    raise FedveilError(" ")


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (_raise, "an error no user should see"),
        (_hang, "no end after"),
        (_sleep, "no end after"),
        (_crash, "the process ended with"),
        (_grow, "MemoryError"),
        (_mumble, "a message of 1 characters"),
    ],
)
def test_a_bad_parser_is_noticed_and_its_input_kept(tmp_path, monkeypatch, parse, words):
    monkeypatch.setattr(running, "SECONDS", 0.3)
    monkeypatch.setattr(running, "WAIT", 2.0)
    target = Target("bad", 2, lambda: [b"seed"], flip, parse)
    tally = run_target(target, seed=0, count=2, failures=tmp_path)
    assert tally.failed == 2
    assert tally.accepted == tally.refused == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".txt"}
    assert all(words in path.read_text() for path in tmp_path.glob("*.txt"))
    made = [content for _, content in running.inputs(target, [b"seed"], 0, range(2))]
    assert [(tmp_path / f"bad-{n}.bin").read_bytes() for n in range(2)] == made


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted(TrainConfig.model_fields)) | st.text(max_size=10)
SPECIFICATIONS = st.text(max_size=40) | st.builds(
    "{}:{}={},{}={}".format,
    st.sampled_from(["dct", "none", "shards", "dirichlet"]),
    *([st.sampled_from(["keep", "cutoff", "block"]), st.integers() | st.floats()] * 2),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, ANYTHING, max_size=5))
@example({"fraction": 1e306, "clients": 1_000})  # their product is infinite
@example({"fraction": math.nan})
@example({"clients": 10**400})
def test_any_settings(content):
    with suppress(FedveilError):
        TrainConfig.check(content)


@pytest.mark.parametrize("read", [parse_defense, parse_partition])
@settings(max_examples=100, deadline=None)
@given(text=SPECIFICATIONS)
def test_any_specification(read, text):
    with suppress(FedveilError):
        read(text)


def test_a_small_file_of_a_huge_image_is_refused_unopened(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("1", (5_000, 5_000)).save(tmp_path / name / "0.png")
    with pytest.raises(FedveilError, match="5000 x 5000 pixels, more than"):
        load_dataset(str(tmp_path))


def test_more_images_than_memory_holds_are_refused_at_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("fedveil.data.decode._MEMORY", 10_000)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(30):
            Image.new("L", (20, 20)).save(tmp_path / name / f"{number}.png")
    with pytest.raises(FedveilError, match=r"60 images of 20x20 .* more than this machine's"):
        load_dataset(str(tmp_path))


def test_a_compressed_checkpoint_is_refused_unpacked(tmp_path):
    model = nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    load_checkpoint(model, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(FedveilError, match="damaged or no file of tensors"):
        load_checkpoint(model, tmp_path / "packed.pt")


def test_values_that_repeat_are_unpacked_a_few_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("fedveil.data.parquet._LARGEST_BATCH", 2**26)
    value = pa.array([bytes(2**22)])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 500), value)
    table = pa.table({"image": column, "label": pa.array([0, 1] * 250)})
    parquet.write_table(table, tmp_path / "train.parquet", dictionary_pagesize_limit=2**28)
    assert (tmp_path / "train.parquet").stat().st_size < 2**21
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FedveilError, match="cannot decode the image"):
        load_dataset(str(tmp_path))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20  # KiB; all rows together are 2 GiB, and as Python objects again
