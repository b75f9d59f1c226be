"""Somebody who can write into a run's directory, but has not the operator's key."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from fedveil.runs.lock import lock
from fedveil.runs.secrets import CHECKPOINT, MODEL
from fedveil.sealing import KEY_FILE, OperatorKey, Seal
from tests.commands import forked
from tests.federation.test_train import FAST, start, wait_for_round
from tests.runs.test_secrets import fedveil, surroundings

WEIGHTS = {"w": torch.arange(6.0)}
KEY = NoiseKey(bytes(range(32)))


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    return OperatorKey.make(tmp_path_factory.mktemp("operator") / "key")


@pytest.fixture
def sealed(tmp_path, operator, monkeypatch):
    """A run under the operator's key, with a model."""
    monkeypatch.setenv(KEY_FILE, str(operator.path))
    return _run(tmp_path / "run")


def _run(path, **settings):
    run = RunDirectory.create(path, TrainConfig.check(settings), noise_key=KEY)
    run.write_model(WEIGHTS)
    return run


def test_planted_files_in_the_clear_are_not_believed(sealed, operator, tmp_path):
    for name in ("noise.key.enc", "model.safetensors.enc"):
        (sealed.path / name).unlink()
    save_file({"w": torch.zeros(6)}, sealed.path / MODEL)
    KEY.save(sealed.path / "noise.key")
    for command in (
        ("deliver", sealed.path, "--out", tmp_path / "w"),
        ("train", "--resume", sealed.path),
        ("audit", "theft", "--run", sealed.path, "--out", tmp_path / "theft"),
    ):
        told = fedveil(operator.path, *command, status=2)
        assert "not encrypted" in told.replace("\n", " "), told
    assert not (tmp_path / "w").exists()
    out = tmp_path / "again"
    told = fedveil(
        *(operator.path, "train", "--out", out, "--noise-key", sealed.path / "noise.key"), status=2
    )
    assert "nothing in the clear is believed" in told.replace("\n", " ")


def test_a_planted_file_beside_an_encrypted_one_is_named(sealed, operator, tmp_path):
    save_file({"w": torch.zeros(6)}, sealed.path / MODEL)
    told = fedveil(operator.path, "deliver", sealed.path, "--out", tmp_path / "w", status=2)
    assert "lies in the clear in a run that is encrypted" in told.replace("\n", " ")


def test_sealing_is_the_one_door_and_says_what_it_takes_in(tmp_path, operator):
    run = _run(tmp_path / "run")
    told = fedveil(operator.path, "key", "seal", run.path)
    assert "model.safetensors, noise.key taken in" in told.replace("\n", " ")
    fedveil(operator.path, "deliver", run.path, "--out", tmp_path / "w")
    assert torch.equal(load_file(tmp_path / "w")["w"], WEIGHTS["w"])


@pytest.mark.parametrize(
    "change",
    [{"strategy": "fedavg"}, {"cap": 0.99}, {"model": "planted:net"}, {"rounds": 51}],
    ids=str,
)
def test_an_edited_configuration_opens_nothing_and_imports_nothing(
    sealed, operator, tmp_path, change, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.py").write_text("open('was-here', 'w').close()")
    file = sealed.path / "config.json"
    described = json.loads(file.read_text())
    described["configuration"] |= change
    file.write_text(json.dumps(described))
    for command in (
        ("train", "--resume", sealed.path),
        ("deliver", sealed.path, "--out", tmp_path / "w"),
    ):
        told = fedveil(operator.path, *command, status=2)
        assert "does not fit" in told, told
    assert not (tmp_path / "was-here").exists()


def test_a_run_goes_on_to_more_rounds_under_its_key(sealed):
    sealed.extend(60)
    again = RunDirectory.open(sealed.path)
    assert again.config.rounds == 60
    assert again.noise_key() == KEY


def test_a_file_of_another_run_opens_not_though_both_have_one_noise_key(sealed, operator, tmp_path):
    other = _run(tmp_path / "other")
    shutil.copy(other.path / "model.safetensors.enc", sealed.path / "model.safetensors.enc")
    told = fedveil(operator.path, "deliver", sealed.path, "--out", tmp_path / "w", status=2)
    assert "another run" in told


def test_a_run_of_before_there_were_identities_still_opens(sealed, operator):
    file = sealed.path / "config.json"
    described = json.loads(file.read_text())
    del described["run"]
    file.write_text(json.dumps(described))
    form = b"FVSEAL1\n"
    key = Seal(operator.secret, form=form, purpose="run key").close(KEY.secret, place=b"noise.key")
    (sealed.path / "noise.key.enc").write_bytes(key)
    old = RunDirectory.open(sealed.path)
    old.write_model(WEIGHTS)
    assert torch.equal(old.model()["w"], WEIGHTS["w"])
    plain = Seal(KEY.secret, form=form, purpose="run files")
    content = (sealed.path / "model.safetensors.enc").read_bytes()
    assert plain.open(content, place=MODEL.encode())
    assert old.secrets.path(CHECKPOINT).name == "checkpoint.safetensors.enc"


def test_a_runs_own_directory_is_not_searched_for_models(tmp_path, monkeypatch):
    run = _run(tmp_path / "run")
    (run.path / "planted_here.py").write_text("open('was-here', 'w').close()\ndef net(*_): ...")
    words = ("train", "--out", "x", "--model", "planted_here:net")
    done = forked(*words, cwd=run.path, env=surroundings(None))
    assert done.returncode == 2
    assert "could not be imported" in done.stderr
    assert not (run.path / "was-here").exists()


def test_of_two_that_train_one_run_the_second_says_who_is_first(tmp_path):
    run = tmp_path / "run"
    first = start("--out", run, *FAST, "--rounds", 200)
    try:
        wait_for_round(run / "rounds.jsonl", 1)
        second = forked("train", "--resume", run)
        assert second.returncode == 2
        assert f"is in use by process {first.pid} on" in second.stderr.replace("\n", " ")
        assert first.running
    finally:
        first.kill()
    with RunDirectory(run).locked():  # a killed process locks nothing
        pass


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("fedveil.runs.lock._PATIENCE", 0.2)
    path = tmp_path / "x.lock"
    script = "from fedveil.runs.lock import lock; import sys; from pathlib import Path\n"
    script += "with lock(Path(sys.argv[1]), named='x'): print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(FedveilError, match=f"x is in use by process {holder.pid}"),
        lock(path, named="x"),
    ):
        pass
    holder.kill()
    holder.wait()
    with lock(path, named="x"):
        pass
