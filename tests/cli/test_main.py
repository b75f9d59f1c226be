"""The commands as a user runs them: real processes, good input, bad input, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fedveil.attacks.inversion import ATTACKS
from fedveil.models import build_model
from tests.commands import forked, started

AUDIT = ["audit", "leakage", "--dataset", "digits", "--images", "1", "--out", "out"]
FACTORIES = """
import pathlib

from torch import nn


def two_layers(shape, classes):
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 16), nn.Sigmoid(), nn.Linear(16, classes)
    )


def slow_to_attack(shape, classes):
    from fedveil.models import LeNet

    pathlib.Path("built").touch()
    return LeNet(shape, classes)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, pixels):
        return self.fc(pixels.flatten(1))


class Failing(Own):
    def forward(self, pixels):
        raise RuntimeError("broken on purpose")


class FailingInTraining(Own):
    def forward(self, pixels):
        if self.training:
            raise RuntimeError("broken in training")
        return super().forward(pixels)


class Rounding(Own):
    def forward(self, pixels):
        return super().forward(pixels.round())


class Detaching(Own):
    def forward(self, pixels):
        return super().forward(pixels).detach()


class Dropping(Own):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, pixels):
        return super().forward(self.drop(pixels))


def failing(shape, classes):
    return Failing()


def failing_in_training(shape, classes):
    return FailingInTraining()


def rounding(shape, classes):
    return Rounding()


def detaching(shape, classes):
    return Detaching()


def dropping(shape, classes):
    return Dropping().eval()


def other_size(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, with their models and with some things that are in the way."""
    monkeypatch.chdir(tmp_path)
    Path("factories.py").write_text(FACTORIES)
    Path("file.txt").write_text("mine")
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("mine")
    Path("empty").mkdir()
    return tmp_path


def run(*options):
    return forked(*options, timeout=300)


def succeeds(*options):
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def refuses(*options, words):
    """Run a command that must fail with one sentence and leave the folder as it was."""
    before = _listing()
    done = run(*options)
    told = " ".join(done.stderr.split())
    assert done.returncode == 2, told
    assert "Traceback" not in done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    for word in words:
        assert word in told
    assert len(done.stderr.strip().splitlines()) == 1
    assert _listing() == before


def _listing():
    return {
        path: path.read_bytes() if path.is_file() else b""
        for path in Path().rglob("*")
        if "__pycache__" not in path.parts
    }


def _images(path, *, shape=(8, 8, 3), classes=2, each=8):
    noise = np.random.default_rng(0)
    for number in range(classes):
        (path / f"class{number}").mkdir(parents=True)
        for index in range(each):
            pixels = noise.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"class{number}" / f"{index}.png")


def test_version():
    assert succeeds("--version").strip() == f"fedveil {version('fedveil')}"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            [],
            ["audit", "demo", "deploy", "frontier", "report", "reproduce", "train", "transform"],
        ),
        (["deploy"], ["init", "register", "sign", "status"]),
        (["demo"], ["--out"]),
        (["audit", "leakage"], ["--checkpoint", "--defense"]),
        (["reproduce", "dct"], ["--accuracy-dataset", "--keep", "eight"]),
        (["reproduce", "noise"], ["--rounds"]),
    ],
)
def test_help(command, words):
    told = succeeds(*command, "--help")
    for word in words:
        assert word in told


def test_help_names_every_attack():
    told = set(re.findall(r"[\w-]+", succeeds("audit", "leakage", "--help")))
    assert set(ATTACKS) <= told


def test_an_audit_of_own_images_and_own_trained_model(folder):
    _images(folder / "images")
    sys.path.insert(0, str(folder))
    try:
        trained = build_model("factories:two_layers", (3, 8, 8), 2, seed=7)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("factories")
    save_file(trained.state_dict(), "own.safetensors")
    told = succeeds(
        *["audit", "leakage", "--dataset", "images", "--model", "factories:two_layers"],
        *["--checkpoint", "own.safetensors", "--clients", 2, "--victim", 1, "--images", 2],
        *["--defense", "none", "--defense", "dct:keep=6", "--out", "new/out"],
    )
    assert "dct:keep=6" in told
    names = {path.name for path in Path("new/out").iterdir()}
    assert names == {"leakage.json", "reconstructions.npz", "reconstructions.png"}
    content = json.loads(Path("new/out/leakage.json").read_text())
    assert content["settings"]["model"] == "factories:two_layers"
    assert [row["adaptive"] for row in content["rows"]] == [False, False, True]
    assert content["rows"][0]["exact"] == 1


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("factories:failing", ["fails on images", "broken on purpose", "another model"]),
        ("factories:failing_in_training", ["fails on images", "broken in training"]),
        ("factories:other_size", ["fails on images", "(1, 8, 8)", "of the size it takes"]),
        ("factories:rounding", ["not differentiable", "remove", "rounding"]),
        ("factories:detaching", ["not differentiable", "detach()"]),
        ("factories:dropping", ["layer drop (Dropout)", "set its p to 0"]),
        ("resnet-bn", ["layer stem_norm (BatchNorm2d)", "--model resnet-gn"]),
    ],
)
def test_a_model_that_cannot_be_attacked(folder, model, words):
    refuses(*AUDIT, "--model", model, words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--images", "0"], ["--images 0", "at least 1"]),
        (["--images", "5000"], ["--images 5000 is too many", "ask for fewer"]),
        (["--attack", "dlgg"], ["attack 'dlgg'", "did you mean 'dlg'"]),
        (["--attack", "rgap", "--model", "cnn"], ["rgap does not apply", "--attack lm"]),
        (["--attack", "ig:stepps=3"], ["no option 'stepps'", "its options: steps"]),
        (["--attack", "fc"], ["first layer body.0 (Conv2d)", "--attack ig"]),
        (["--batch", "2"], ["--images 1 is no multiple of the 2 images", "give 2"]),
        (["--update", "fedavg", "--learning-rate", "0"], ["--learning-rate 0.0", "above 0"]),
        (["--update", "fedavg", "--epochs", "2", "--attack", "dlg"], ["--attack ig"]),
        (["--defense", "dtc:keep=3"], ["defence 'dtc'", "did you mean 'dct'"]),
        (["--defense", "dct:keep=0"], ["keep=0", "1 to 64"]),
        (["--defense", "dct:keep=65"], ["keep=65", "1 to 64"]),
        (["--dataset", "file.txt"], ["file.txt", "is a file", "give the folder"]),
        (["--dataset", "empty"], ["holds 0 images"]),
        (["--out", "file.txt"], ["--out file.txt", "is a file", "name a directory"]),
        (["--out", "file.txt/below"], ["is a file", "name a directory"]),
        (["--out", "thesis"], ["--out thesis is not empty", "name a new directory"]),
    ],
)
def test_an_audit_that_cannot_be(folder, options, words):
    refuses(*AUDIT, *options, words=words)


def test_an_audit_of_batches_and_local_training(folder):
    run = [*AUDIT[:4], "--images", "4", "--batch", "2", "--workers", "1"]
    active = ["--model", "imprint-cnn", "--attack", "fc"]
    assert "exact" in succeeds(*run, *active, "--out", "active")
    row = json.loads(Path("active/leakage.json").read_text())["rows"][0]
    assert (row["images"], row["exact"]) == (4, 1)
    local = ["--update", "fedavg", "--epochs", "2", "--batch-size", "1"]
    succeeds(*run, *local, "--attack", "ig:steps=20,restarts=2", "--out", "local")
    content = json.loads(Path("local/leakage.json").read_text())
    assert content["settings"]["epochs"] == 2
    assert content["settings"]["learning_rate"] == 0.05
    assert content["rows"][0]["attack"] == "ig:steps=20,restarts=2"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other.safetensors", ["does not fit the model", "it lacks body.0.weight", "give"]),
        ("wider.pt", ["does not fit the model", "fc.weight has shape (11, 48)", "(10, 48)"]),
        ("junk.safetensors", ["damaged or no file of tensors", "give a .safetensors"]),
        ("missing.pt", ["cannot be read", "give the path"]),
    ],
)
def test_a_checkpoint_of_something_else(folder, name, words):
    if name == "other.safetensors":
        save_file({"weight": torch.zeros(2)}, name)
    if name == "wider.pt":
        torch.save(build_model("lenet", (1, 8, 8), 11, seed=0).state_dict(), name)
    if name.startswith("junk"):
        Path(name).write_text("junk")
    refuses(*AUDIT, "--checkpoint", name, words=[name, *words])


def test_ctrl_c_during_an_audit_writes_nothing(folder):
    options = ["--dataset", "photos", "--model", "factories:slow_to_attack", "--attack", "dlg"]
    process = started(*AUDIT, *options, "--images", "50")
    deadline = time.monotonic() + 60
    while not Path("built").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # into the federation or the attack
    process.signal(signal.SIGINT)
    done = process.ended(30)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "Interrupted; nothing was written." in done.stderr
    assert not Path("out").exists()


def test_a_transformed_copy_of_a_folder(folder):
    _images(folder / "images", shape=(20, 12, 3), each=2)
    told = succeeds("transform", "images", "copies", "--keep", 1)
    assert "4 images written" in told
    before = sorted(p.relative_to("images") for p in Path("images").rglob("*.png"))
    assert sorted(p.relative_to("copies") for p in Path("copies").rglob("*.png")) == before
    block = np.asarray(Image.open("copies/class0/0.png"))[:8, :8]
    assert (block == block[0, 0]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["file.txt", "copies", "--keep", 3], ["file.txt is not a folder"]),
        (["empty", "copies", "--keep", 3], ["empty holds no images"]),
        (["thesis", "empty", "--keep", 3], ["empty exists already", "name another"]),
        (["thesis", "copies"], ["give either --keep N or --cutoff"]),
        (["thesis", "copies", "--keep", 65], ["keep=65", "1 to 64"]),
        (["thesis", "copies", "--keep", 3], ["chapter.png is no readable image", "mend it"]),
    ],
)
def test_a_transformation_that_cannot_be(folder, options, words):
    if options == ["thesis", "copies", "--keep", 3]:
        Path("thesis/chapter.png").write_text("no image")
    refuses("transform", *options, words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["dct", "--out", "file.txt"], ["file.txt is a file", "name a directory"]),
        (["dct", "--out", "out", "--keep", 65], ["keep=65", "1 to 64"]),
        (["dct", "--out", "out", "--dataset", "digitz"], ["digitz", "digits"]),
        (["noise", "--out", "file.txt", "--dataset", "digits"], ["file.txt is a file"]),
    ],
)
def test_a_study_that_cannot_be(folder, options, words):
    datasets = (
        ["--dataset", "digits", "--accuracy-dataset", "digits"] if options[0] == "dct" else []
    )
    refuses("reproduce", options[0], *datasets, *options[1:], words=words)


def test_a_study_of_the_transformation_from_the_command_line(folder):
    options = ["--dataset", "digits", "--accuracy-dataset", "digits", "--images", 1, "--seeds", 1]
    options += ["--keep", 64, "--figure-images", 1, "--figure-keep", 3, "--rounds", 1]
    process = started("reproduce", "dct", "--out", "study", *options)
    deadline = time.monotonic() + 300
    first = Path("study/leakage/figure3-dlg-none/leakage.json")
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.signal(signal.SIGINT)
    done = process.ended(120)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "goes on where it stopped" in done.stderr
    assert not Path("study/dct.json").exists()
    written = first.stat().st_mtime_ns
    assert "knows T" in succeeds("reproduce", "dct", "--out", "study", *options)
    assert first.stat().st_mtime_ns == written
    files = {path.name for path in Path("study").iterdir() if path.is_file()}
    assert files == {"dct.json", "dct.png", "dct.md", "figure3.png"}


def test_a_demo_where_a_file_is(folder):
    refuses("demo", "--out", "file.txt", words=["file.txt", "Not a directory"])


def test_a_shell_completes_commands_and_options():
    asked = {"_FEDVEIL_COMPLETE": "complete_bash", "COMP_WORDS": "fedveil train --clie"}
    done = subprocess.run(
        [Path(sys.executable).with_name("fedveil")],
        env={**os.environ, **asked, "COMP_CWORD": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["--clients"]
