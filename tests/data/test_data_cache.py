import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.data import cache as store
from fedveil.data import load_dataset


@pytest.fixture(scope="module")
def entry(cache):
    tensors = {"a": torch.arange(40).reshape(5, 8), "b": torch.full((3, 7), 9, dtype=torch.uint8)}
    store.write("entry", tensors, ["one", "zwei"])
    return cache / "entry.safetensors", tensors


def assert_intact(found, tensors):
    assert found is not None
    assert found[1] == ["one", "zwei"]
    assert found[0].keys() == tensors.keys()
    assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)


def test_round_trip(entry):
    assert_intact(store.read("entry"), entry[1])
    assert store.read("another") is None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_never_served(entry, data):
    path, tensors = entry
    whole = path.read_bytes()
    content = bytearray(whole)
    if data.draw(st.booleans(), label="truncate"):
        del content[data.draw(st.integers(0, len(content) - 1), label="length") :]
    else:
        position = data.draw(st.integers(0, len(content) - 1), label="position")
        content[position] ^= data.draw(st.integers(1, 255), label="bits")
    copy = path.with_name("damaged.safetensors")
    copy.write_bytes(content)
    found = store.read("damaged")
    if found is not None:  # white space in the header may change without changing what it says
        assert_intact(found, tensors)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:-1] + b"\xff"])
def test_a_damaged_entry_is_rebuilt_silently(parquet_folder, fresh_cache, capfd, damage):
    before = load_dataset(str(parquet_folder)).train.raw.clone()
    (file,) = fresh_cache.glob("images-*.safetensors")
    whole = file.read_bytes()
    # A new file, as a crash leaves one: writing into a mapped one would change it under its reader.
    file.unlink()
    file.write_bytes(damage(whole))
    assert torch.equal(load_dataset(str(parquet_folder)).train.raw, before)
    assert store.read(file.stem) is not None
    assert capfd.readouterr() == ("", "")
    assert [child.name for child in fresh_cache.iterdir()] == [file.name]


def test_an_unwritable_cache_stops_nothing(parquet_folder, tmp_path, monkeypatch, capfd):
    expected = load_dataset(str(parquet_folder))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDVEIL_CACHE", str(tmp_path / "file" / "cache"))
    found = load_dataset(str(parquet_folder))
    assert torch.equal(found.train.raw, expected.train.raw)
    assert torch.equal(found.test.labels, expected.test.labels)
    assert capfd.readouterr() == ("", "")


def test_processes_may_load_at_once(data_root, fresh_cache):
    code = (
        "import os, time, zlib\nfrom fedveil.data import load_dataset\n"
        f"os.environ['FEDVEIL_DATA'] = {str(data_root)!r}\n"
        "data = load_dataset('cifar100')\n"
        "print(zlib.crc32(data.train.raw.numpy().tobytes() + data.test.raw.numpy().tobytes()))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert len(list(fresh_cache.iterdir())) == 1
