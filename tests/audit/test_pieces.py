"""A leakage audit that was cut short goes on from what is done, and from nothing else's."""

import json
import signal
import time

import numpy as np
import pytest

from fedveil.audit.leakage import audit_leakage
from fedveil.audit.settings import LeakageSettings
from fedveil.data import load_dataset
from fedveil.errors import FedveilError
from fedveil.files import UNFINISHED
from fedveil.models import build_model
from tests.commands import forked, started

SETTINGS = LeakageSettings(
    clients=5, images=2, attacks=("lm", "dlg:steps=3"), defenses=("none", "dct:keep=3")
)
OPTIONS = ["--dataset", "digits", "--model", "lenet", "--clients", "5", "--images", "2"]
OPTIONS += ["--attack", "lm", "--attack", "dlg:steps=3", "--defense", "none"]
OPTIONS += ["--defense", "dct:keep=3"]


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("digits", seed=0)


def audit(dataset, out, settings=SETTINGS, *, cut_short_at=None):
    """Audit; return the report and the steps that were taken."""
    steps = []

    def progress(step, done, images, loss):
        if step == cut_short_at:
            raise KeyboardInterrupt
        steps.append(step)

    model = build_model("lenet", dataset.shape, len(dataset.classes), seed=0).train()
    report = audit_leakage(dataset, model, settings, model_name="lenet", out=out, progress=progress)
    return report, set(steps)


def found(out):
    """Return the results without what was timed."""
    content = json.loads((out / "leakage.json").read_text())
    rows = [
        {name: value for name, value in row.items() if "seconds" not in name}
        for row in content["rows"]
    ]
    return rows, content["membership"], content["settings"]


def test_it_goes_on_to_what_it_would_have_come_to(dataset, tmp_path):
    _, every = audit(dataset, tmp_path / "whole")
    assert len(every) == 6
    with pytest.raises(KeyboardInterrupt):
        audit(dataset, tmp_path / "cut", cut_short_at="dlg:steps=3 on dct:keep=3")
    assert not (tmp_path / "cut/leakage.json").exists()
    _, again = audit(dataset, tmp_path / "cut")
    # All of the first attack was done, and the second where there is no defence.
    assert again == {step for step in every if step.startswith("dlg") and "keep" in step}
    assert found(tmp_path / "cut") == found(tmp_path / "whole")
    assert found(tmp_path / "cut")[2]["model"] == "lenet"
    assert not (tmp_path / "cut" / UNFINISHED).exists()
    ours, others = (np.load(tmp_path / x / "reconstructions.npz") for x in ("cut", "whole"))
    assert ours.files == others.files
    assert all(np.array_equal(ours[name], others[name]) for name in ours.files)


def test_other_options_are_refused_and_the_same_go_on(dataset, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        audit(dataset, tmp_path / "out", cut_short_at="dlg:steps=3 on none")
    done = forked("audit", "leakage", *OPTIONS, "--seed", 1, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "holds an audit that was cut short and had seed 0, not 1" in done.stderr
    assert "Traceback" not in done.stderr
    done = forked("audit", "leakage", *OPTIONS, "--workers", 1, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "lm on none" not in done.stderr
    done = forked("audit", "leakage", *OPTIONS, "--out", tmp_path / "out")
    assert "is not empty" in done.stderr


def test_what_is_done_under_one_observation_is_not_taken_for_another(dataset, tmp_path):
    """Noise is drawn anew, so an audit that goes on sees another update and finds anew."""
    settings = LeakageSettings(
        clients=5, images=1, attacks=("dlg:steps=2", "lm"), defenses=("noise:ratio=0.1",)
    )
    with pytest.raises(KeyboardInterrupt):
        audit(dataset, tmp_path, settings, cut_short_at="lm on noise:ratio=0.1")
    assert len(list((tmp_path / UNFINISHED).glob("*.safetensors"))) == 1
    _, again = audit(dataset, tmp_path, settings)
    assert "dlg:steps=2 on noise:ratio=0.1" in again


def test_a_damaged_piece_is_named(dataset, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        audit(dataset, tmp_path, cut_short_at="dlg:steps=3 on none")
    (piece,) = (tmp_path / UNFINISHED).glob("*.safetensors")
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(FedveilError, match=f"{piece.name} is damaged"):
        audit(dataset, tmp_path)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_signal_leaves_what_is_done(tmp_path, sent, code):
    slow = ["--attack", "ig:steps=1000000", "--out", tmp_path / "out"]
    process = started("audit", "leakage", *OPTIONS, *slow)
    deadline = time.monotonic() + 120
    kept = tmp_path / "out" / UNFINISHED
    while len(list(kept.glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.signal(sent)
    done = process.ended(60)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if sent == signal.SIGTERM:
        told = f"the same command goes on from what {tmp_path / 'out'} has"
        assert told in done.stderr.replace("\n", "")
    assert len(list(kept.glob("*.safetensors"))) == 2
    assert not list(kept.glob(".*.part"))
