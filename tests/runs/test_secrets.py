"""Runs under the operator's key: every byte they leave is read, and every mistake tried."""

import base64
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.federation.engines.deployed import environment
from fedveil.runs.archive import Archive
from fedveil.runs.directory import RunDirectory
from fedveil.sealing import (
    KEY_FILE,
    DamagedError,
    OperatorKey,
    OtherKeyError,
    Seal,
    UnknownFormatError,
)
from tests.commands import started

FEDVEIL = str(Path(sys.executable).with_name("fedveil"))
TRAIN = [
    *("train", "--dataset", "digits", "--clients", "6", "--fraction", "0.5", "--epochs", "2"),
    *("--clip", "5", "--rounds", "6", "--learning-rate", "0.1", "--strategy", "noise-delta"),
    *("--model", "tests.audit.small_models:two_layers"),
    *("--noise", "output", "--sigma-limit", "1e6", "--workers", "1"),
]
SECRETS = ("noise.key", "checkpoint.safetensors", "model.safetensors")
WINDOW = 16  # bytes of a tensor that chance does not repeat


def surroundings(key_file):
    others = {name: value for name, value in os.environ.items() if name != KEY_FILE}
    return others | ({KEY_FILE: str(key_file)} if key_file else {})


def start(key_file, *options):
    return subprocess.Popen(
        [FEDVEIL, *map(str, options)],
        env=surroundings(key_file),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def fedveil(key_file, *options, status=0):
    """Run a command in this process, which saves the seconds a new one takes to load torch."""
    environment = {KEY_FILE: str(key_file) if key_file else None}
    done = CliRunner().invoke(app, list(map(str, options)), env=environment)
    told = done.output + (str(done.exception) if isinstance(done.exception, FedveilError) else "")
    ended = 2 if isinstance(done.exception, FedveilError) else done.exit_code
    assert ended == status, (told, done.exception)
    return told


def spellings(secret):
    """Every way a key may be written by accident."""
    text = secret.hex()
    return (
        secret,
        text.encode(),
        text.upper().encode(),
        base64.b64encode(secret)[:40],
        repr(secret)[2:-1].encode(),
    )


def values(weights):
    """A stretch out of the middle of every tensor's values that are not all alike."""
    for value in weights.values():
        stored = value.contiguous().numpy().tobytes()
        middle = stored[len(stored) // 2 // WINDOW * WINDOW :][:WINDOW]
        if len(set(middle)) > 4:
            yield middle


def files(folder):
    """Every file but the locks, which say who held them last."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: path.read_bytes() for path in paths if path.suffix != ".lock"}


def found(needles, folder):
    """Return the names of the files that hold any of the needles."""
    needles = tuple(needles)
    assert needles
    return {path.name for path, text in files(folder).items() if any(n in text for n in needles)}


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    return OperatorKey.make(tmp_path_factory.mktemp("operator") / "key")


@pytest.fixture(scope="module")
def command_lines():
    return set()


@pytest.fixture(scope="module")
def sealed(operator, command_lines, tmp_path_factory):
    """A complete run under a key, and what it printed."""
    run = tmp_path_factory.mktemp("sealed") / "run"
    process = start(operator.path, *TRAIN, "--out", run)
    while process.poll() is None:
        command_lines |= set(_command_lines())
        time.sleep(0.1)
    out, told = process.communicate()
    assert process.returncode == 0, told
    return run, out + told


def _command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:  # it has ended
            continue


@pytest.fixture(scope="module")
def plain(sealed, operator, tmp_path_factory):
    """The same run in the clear: what the search below must find."""
    run = tmp_path_factory.mktemp("plain") / "run"
    key = tmp_path_factory.mktemp("key") / "noise.key"
    secret_key(sealed[0], operator).save(key)
    fedveil(None, *TRAIN, "--out", run, "--noise-key", key)
    return run


def opened(run, operator):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_FILE, str(operator.path))
        directory = RunDirectory.open(run)
        return directory.noise_key(), directory.checkpoint(), directory.model()


def secret_key(run, operator):
    return opened(run, operator)[0]


def test_no_byte_of_a_sealed_run_tells_its_keys_or_its_model(sealed, plain, operator):
    run, told = sealed
    key, checkpoint, w = opened(run, operator)
    keys = (*spellings(key.secret), *spellings(operator.secret))
    models = [*values(w), *values(checkpoint.weights), *values(checkpoint.state.base)]
    assert len(models) > 6
    assert found(keys, run) == set()
    assert found(models, run) == set()
    assert not any(needle in told.encode() for needle in keys)
    assert {path.name for path in run.iterdir()} >= {f"{name}.enc" for name in SECRETS}
    assert not {path.name for path in run.iterdir()} & set(SECRETS)
    assert all((run / f"{name}.enc").stat().st_mode & 0o777 == 0o600 for name in SECRETS)
    # The search finds what is there to be found.
    assert found(keys, plain) == {"noise.key"}
    assert found(models, plain) == {"checkpoint.safetensors", "model.safetensors"}


def test_no_command_line_carries_a_key(sealed, command_lines, operator):
    assert any(b"--noise\0output" in line for line in command_lines)
    keys = (*spellings(secret_key(sealed[0], operator).secret), *spellings(operator.secret))
    assert not any(needle in line for line in command_lines for needle in keys)


def test_encryption_changes_no_bit_of_the_model(sealed, plain, operator, tmp_path):
    fedveil(operator.path, "deliver", sealed[0], "--out", tmp_path / "w.safetensors")
    delivered, wanted = (load_file(tmp_path / "w.safetensors"), load_file(plain / SECRETS[2]))
    assert delivered.keys() == wanted.keys()
    assert all(torch.equal(delivered[name], wanted[name]) for name in wanted)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_killed_sealed_run_goes_on_with_its_key_and_with_no_other(sealed, operator, tmp_path):
    run, _ = sealed
    again = ("--noise-key", run / "noise.key.enc")
    killed = started(*(*TRAIN, "--out", tmp_path / "run", *again), env=surroundings(operator.path))
    while not (tmp_path / "run/checkpoint.safetensors.enc").exists():
        assert killed.running
        time.sleep(0.005)
    killed.kill()
    resume = ("train", "--resume", tmp_path / "run")
    before = files(tmp_path / "run")
    other = OperatorKey.make(tmp_path / "other")
    assert "set FEDVEIL_KEY_FILE to the path of the key" in fedveil(None, *resume, status=2)
    told = fedveil(other.path, *resume, status=2)
    assert f"noise.key.enc is encrypted under another key than {KEY_FILE} {other.path}" in told
    assert not any(needle in told.encode() for needle in spellings(other.secret))
    assert {
        path: text for path, text in files(tmp_path / "run").items() if ".part" not in path.name
    } == {path: text for path, text in before.items() if ".part" not in path.name}
    fedveil(operator.path, *resume)
    resumed, whole = (opened(path, operator)[2] for path in (tmp_path / "run", run))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_audits_read_a_sealed_run_with_its_key_alone(sealed, operator, tmp_path):
    run, _ = sealed
    trace = ("audit", "trace", run / "model.safetensors.enc", "--run", run)
    theft = ("audit", "theft", "--run", run, "--out", tmp_path / "theft", "--workers", "1")
    small = ("--labels", "0", "--colluders", "1", "--thieves", "1")
    assert "The file is w itself" in fedveil(operator.path, *trace)
    fedveil(operator.path, *theft, *small)
    assert json.loads((tmp_path / "theft/theft.json").read_text())["rows"]
    key, checkpoint, w = opened(run, operator)
    keys = (*spellings(key.secret), *spellings(operator.secret))
    assert found([*keys, *values(w), *values(checkpoint.weights)], tmp_path) == set()
    for command in (trace, (*theft, *small), ("deliver", run, "--out", tmp_path / "w")):
        assert "is encrypted; set FEDVEIL_KEY_FILE" in fedveil(None, *command, status=2)


def test_the_report_needs_no_key_and_shows_none(sealed, operator, tmp_path):
    fedveil(None, "report", sealed[0], "--out", tmp_path / "report.html")
    key, _, w = opened(sealed[0], operator)
    keys = (*spellings(key.secret), *spellings(operator.secret))
    assert found([*keys, *values(w)], tmp_path) == set()


def _open_to_others(path):
    OperatorKey.make(path).path.chmod(0o640)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: None, "cannot be read: No such file or directory; make a key with"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (_open_to_others, "has mode 0640, open to other users of this machine; chmod 600 "),
        (lambda path: path.write_text("ab" * 31), "holds no key: 64 hexadecimal digits"),
        (lambda path: path.write_text("ab" * 33), "holds no key: 64 hexadecimal digits"),
        (lambda path: path.write_text("xy" * 32), "holds no key: 64 hexadecimal digits"),
        (lambda path: path.write_bytes(bytes(range(200, 232))), "holds no key"),
        (lambda path: path.write_text(""), "holds no key"),
    ],
)
def test_a_key_file_that_will_not_do_stops_the_run_before_it_starts(tmp_path, spoil, words):
    path = tmp_path / "key"
    spoil(path)
    if path.is_file() and words.startswith("holds"):
        path.chmod(0o600)
    content = path.read_bytes() if path.is_file() else b""
    told = fedveil(path, *TRAIN, "--out", tmp_path / "run", status=2)
    assert f"{KEY_FILE} {path} {words}" in told
    assert not content or content.strip() not in told.encode()
    assert not (tmp_path / "run").exists()


def test_an_empty_variable_is_not_taken_for_none(monkeypatch):
    monkeypatch.setenv(KEY_FILE, "")
    with pytest.raises(FedveilError, match="is set and empty; give it the path of a key file"):
        OperatorKey.from_environment()


def test_flowers_processes_find_a_key_that_was_named_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(KEY_FILE, "key")
    assert environment(tmp_path)[KEY_FILE] == str(tmp_path / "key")
    monkeypatch.delenv(KEY_FILE)
    assert KEY_FILE not in environment(tmp_path)


def copy_of(run, place):
    subprocess.run(["cp", "-r", run, place], check=True)
    return place


def test_a_run_in_the_clear_is_encrypted_or_left_never_mixed(plain, operator, tmp_path):
    run = copy_of(plain, tmp_path / "run")
    (run / "summary.json").unlink()
    told = fedveil(operator.path, "train", "--resume", run, status=2)
    assert f"encrypt them with fedveil key seal {run}" in told
    assert not list(run.glob("*.enc"))
    w = load_file(run / "model.safetensors")
    # Cut short after the key, before the last of the plain files was removed.
    fedveil(operator.path, "key", "seal", run)
    (run / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    fedveil(operator.path, "key", "seal", run)
    assert found(values(w), run) == set()
    fedveil(operator.path, "train", "--resume", run)
    assert all(torch.equal(opened(run, operator)[2][name], w[name]) for name in w)


def test_rotation_writes_one_file_and_shuts_the_old_key_out(sealed, operator, tmp_path):
    run, new = copy_of(sealed[0], tmp_path / "run"), OperatorKey.make(tmp_path / "new")
    before = files(run)
    rotate = ("key", "rotate", run, "--from", operator.path)
    fedveil(new.path, *rotate)
    changed = {path.name for path, text in files(run).items() if before[path] != text}
    assert changed == {"noise.key.enc"}
    assert opened(run, new)[0] == secret_key(sealed[0], operator)
    deliver = ("deliver", run, "--out", tmp_path / "w")
    assert "under another key" in fedveil(operator.path, *deliver, status=2)
    fedveil(new.path, *rotate)  # again, as after a rotation of many runs was cut short
    third = OperatorKey.make(tmp_path / "third")
    assert f"than --from {operator.path}" in fedveil(third.path, *rotate, status=2)


def test_key_commands_say_what_is_missing(plain, operator, tmp_path):
    assert "FEDVEIL_KEY_FILE is not set" in fedveil(None, "key", "seal", plain, status=2)
    rotate = ("key", "rotate", plain, "--from", operator.path)
    assert "is not encrypted" in fedveil(operator.path, *rotate, status=2)
    told = fedveil(None, "key", "make", operator.path, status=2)
    assert "exists, and what is encrypted under it would be lost" in told
    made = fedveil(None, "key", "make", tmp_path / "made")
    assert made.strip() == f"export {KEY_FILE}={tmp_path / 'made'}"
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o600


def test_no_file_of_a_sealed_run_can_stand_in_for_another(sealed, operator, tmp_path):
    run = copy_of(sealed[0], tmp_path / "run")
    (run / "model.safetensors.enc").write_bytes((run / "checkpoint.safetensors.enc").read_bytes())
    with pytest.raises(FedveilError, match="does not decrypt"):
        opened(run, operator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_FILE, str(operator.path))
        RunDirectory(run).secrets.keep(NoiseKey.generate(), operator)
    with pytest.raises(FedveilError, match="belongs to another run"):
        opened(run, operator)


def test_a_sealed_content_opens_whole_under_its_own_key_and_place_or_not_at_all():
    seal, other = (Seal(bytes([i]) * 32, form=b"FVTEST1\n", purpose="test") for i in (1, 2))
    closed = seal.close(b"content", place=b"here")
    assert seal.open(closed, place=b"here") == b"content"
    with pytest.raises(OtherKeyError):
        other.open(closed, place=b"here")
    with pytest.raises(DamagedError):
        seal.open(closed, place=b"there")
    generator = random.Random(0)
    for _ in range(2_000):
        damaged = bytearray(closed)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        cut = bytes(damaged[: generator.choice([len(damaged), generator.randrange(len(damaged))])])
        with pytest.raises((UnknownFormatError, OtherKeyError, DamagedError)):
            seal.open(cut, place=b"here")


def test_neither_repr_nor_error_shows_a_key(operator):
    assert operator.secret.hex() not in repr(operator)
    assert repr(operator.secret) not in repr(operator)
    seal = Seal(operator.secret, form=b"FVTEST1\n", purpose="test")
    assert operator.secret.hex() not in repr(seal)
    archive = Archive(Path("nowhere"), NoiseKey(operator.secret))
    with pytest.raises(FedveilError) as caught:
        archive.read(1)
    assert repr(operator.secret) not in str(caught.value)
