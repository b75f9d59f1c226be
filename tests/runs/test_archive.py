"""The archive of what clients were sent, against the messages that really left."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.runs.archive import Archive, Entry
from tests.federation.test_secrecy import arrays, train
from tests.federation.test_train import FAST, fedveil

KEY = NoiseKey(b"thirty-two bytes of a secret key")


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def entry(number=1):
    weights = {"a": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)}
    other = {**weights, "a": -weights["a"]}
    return Entry(number, (weights, other), {4: 0, 7: 1, 9: 1})


@pytest.mark.parametrize("strategy", ["fedavg", "noise-delta", "noise-pair"])
def test_it_holds_bit_for_bit_what_every_message_carried(tmp_path, strategy):
    _, directory, grid, delivered = train(
        tmp_path / "run",
        strategy=strategy,
        model="tests.audit.small_models:batch_norms",
        noise="output.*",
        sigma_step=10.0,
        cap=0.3,
        epochs=1,
        rounds=3,
    )
    archive = Archive.open(directory.path, directory.noise_key())
    assert archive.rounds == tuple(record.round for record, _, _ in delivered)
    messages = [m for m in grid.sent if m.metadata.message_type == "train"]
    sent = {
        (int(m.content["config"]["server-round"]), m.metadata.dst_node_id - 2): arrays(m)
        for m in messages
    }
    assert len(sent) == len(messages) == 3 * 6
    assert strategy == "fedavg" or any(record.sigma for record, _, _ in delivered)
    for client in range(6):
        received = list(archive.received(client))
        assert [r.round for r in received] == [1, 2, 3]
        for r in received:
            assert same(r.weights, sent[r.round, client])


def test_nothing_of_it_can_be_read_without_the_key(tmp_path):
    archive = Archive.create(tmp_path, KEY)
    archive.write(entry())
    content = (tmp_path / "archive/000001.enc").read_bytes()
    assert entry().copies[0]["a"].numpy().tobytes() not in content
    assert b"assignment" not in content
    assert KEY.secret not in content
    assert (tmp_path / "archive/000001.enc").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "archive").stat().st_mode & 0o777 == 0o700
    archive.write(entry())
    assert content[16:] != (tmp_path / "archive/000001.enc").read_bytes()[16:]  # a nonce once
    with pytest.raises(FedveilError, match="another key"):
        Archive.open(tmp_path, NoiseKey.generate()).read(1)


def test_tensors_that_copies_share_are_stored_once(tmp_path):
    shared = torch.randn(10_000)
    copies = tuple({"large": shared.clone(), "own": torch.full((1,), float(i))} for i in range(8))
    Archive.create(tmp_path, KEY).write(Entry(1, copies, dict.fromkeys(range(8), 0)))
    assert (tmp_path / "archive/000001.enc").stat().st_size < 1.2 * 4 * len(shared)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_changed_byte_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("archive")
    archive = Archive.create(folder, KEY)
    archive.write(entry())
    path = folder / "archive/000001.enc"
    content = bytearray(path.read_bytes())
    cut = data.draw(st.booleans())
    place = data.draw(st.integers(0, len(content) - 1))
    if cut:
        content = content[:place]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(FedveilError, match=re.escape(str(path))):
        archive.read(1)


def test_a_file_cannot_stand_in_for_that_of_another_round(tmp_path):
    archive = Archive.create(tmp_path, KEY)
    archive.write(entry(1))
    (tmp_path / "archive/000001.enc").rename(tmp_path / "archive/000002.enc")
    assert archive.rounds == (2,)
    with pytest.raises(FedveilError, match="another round"):
        archive.read(2)
    with pytest.raises(FedveilError, match="cannot be read"):
        archive.read(1)


def test_it_can_be_left_out(tmp_path):
    fedveil("--out", tmp_path / "run", *FAST, "--rounds", 1, "--no-archive")
    assert not (tmp_path / "run/archive").exists()
    assert not json.loads((tmp_path / "run/config.json").read_text())["configuration"]["archive"]
    with pytest.raises(FedveilError, match="no archive"):
        Archive.open(tmp_path / "run", KEY)


def test_an_archive_that_cannot_be_written_stops_the_run_in_a_sentence(tmp_path):
    fedveil("--out", tmp_path / "run", *FAST, "--rounds", 1)
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/checkpoint.safetensors").unlink()
    for path in (tmp_path / "run/archive").iterdir():
        path.unlink()
    (tmp_path / "run/archive").rmdir()
    Path(tmp_path / "run/archive").write_text("in the way")
    done = fedveil("--resume", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert "archive could not be made" in done.stderr
