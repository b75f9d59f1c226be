"""What a run says of the part that clients have in a model with the server's own images in it."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV

from fedveil.analytic import FRACTION_BITS, load_classifier, rows_of
from fedveil.federation.gains import gain_of
from fedveil.federation.server_app import load_job
from tests.commands import forked
from tests.federation.strategies.test_analytic import trained
from tests.federation.test_secrecy import train


def compared(one, other):
    return gain_of(torch.tensor(one), torch.tensor(other))


def test_a_gain_is_told_image_by_image():
    found = compared([True] * 60 + [False] * 40, [True] * 50 + [False] * 45 + [True] * 5)
    assert found.gain == pytest.approx(0.05)
    same = compared([True] * 100, [True] * 100)
    assert same.gain == 0
    assert same.gain_low < 0 < same.gain_high  # as often right, which shows no more than it does


@pytest.mark.parametrize("gain", [0.0, 0.04])
def test_its_interval_covers_the_true_gain_as_often_as_it_says(gain):
    random = np.random.default_rng(0)
    chances = (0.1 + gain, 0.1, 0.8 - gain)
    covered = 0
    for _ in range(1_000):
        drawn = random.choice(3, size=300, p=chances)
        found = compared((drawn != 1).tolist(), (drawn != 0).tolist())
        covered += found.gain_low <= gain <= found.gain_high
    assert 0.93 <= covered / 1_000 <= 0.975


def summary_of(directory):
    return json.loads((directory.path / "summary.json").read_text())


def test_under_noise_the_servers_images_alone_are_a_ridge_of_theirs(tmp_path):
    directory, *_ = trained(tmp_path / "run", epsilon=8.0, components=12)
    told = summary_of(directory)
    job = load_job(directory.config)
    features = load_classifier(directory.model()).features
    own, report = job.evaluation.calibration, job.evaluation.report
    known, asked = (rows_of(features, some.raw) * 2.0**-FRACTION_BITS for some in (own, report))
    ridge = RidgeCV(np.logspace(-6, 2, 33)).fit(known.numpy(), np.eye(10)[own.labels.numpy()])
    right = ridge.predict(asked.numpy()).argmax(1) == report.labels.numpy()
    alone = told["server_alone"]
    assert alone["accuracy"] == pytest.approx(right.mean(), abs=0.02)
    assert alone["images"] == len(own)
    assert told["accuracy"] - alone["accuracy"] == pytest.approx(alone["gain"])


def test_without_noise_none_of_the_servers_labels_are_in_w(tmp_path):
    directory, *_ = trained(tmp_path / "run")
    assert "server_alone" not in summary_of(directory)


def test_labels_alone_are_taught_as_a_run_of_nothing_else_teaches_them(tmp_path):
    settings = {
        "strategy": "protected",
        "rounds": 2,
        "epochs": 1,
        "distillation_steps": 60,
        "secure_aggregation": False,
    }
    whole, half, none = (
        summary_of(train(tmp_path / str(share), **settings, label_share=share)[1])
        for share in (1.0, 0.5, 0.0)
    )
    assert whole["server_alone"]["accuracy"] == whole["accuracy"]
    assert whole["server_alone"]["gain"] == 0
    assert half["server_alone"]["accuracy"] == whole["accuracy"]
    assert "server_alone" not in none


def test_nobody_takes_the_servers_own_for_the_federations(tmp_path):
    done = forked(
        *("train", "--dataset", "digits", "--clients", "8", "--no-secure-aggregation"),
        *("--epsilon", "0.01", "--out", "run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert "the server's own 179 labelled images alone: " in done.stdout
    assert "Clients add nothing that can be told from chance" in done.stderr
    assert "or give a larger --epsilon" in done.stderr
