"""Defences in real federations: processes, messages and mods as in production."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from fedveil.data import load_dataset
from fedveil.defenses import parse_defense
from fedveil.errors import FedveilError
from fedveil.federation.server_app import prepare_job
from fedveil.federation.training_run import run_to_completion
from fedveil.models import build_model
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory


def _train(tmp_path, defense, **changes):
    settings = {
        "dataset": "digits",
        "clients": 4,
        "fraction": 1.0,
        "rounds": 1,
        "strategy": "fedavg",
        "defense": defense,
        "learning_rate": 0.1,
        "workers": 2,
    }
    config = TrainConfig.check({**settings, **changes})
    directory = RunDirectory.create(tmp_path / "run", config)
    summary = run_to_completion(directory)
    start = build_model("cnn", (1, 8, 8), 10, seed=0).state_dict()
    weights = load_file(directory.path / "model.safetensors")
    return summary, {name: weights[name] - start[name] for name in start}


def test_one_client_pruned_returns_few_weights(tmp_path):
    _, change = _train(tmp_path, "prune:share=0.9", clients=1)
    for name, value in change.items():
        kept = max(1, round(value.numel() * 0.1))
        assert int((value != 0).sum()) <= kept, name
    assert sum(int((value != 0).sum()) for value in change.values()) > 100


def test_clipped_clients_move_the_mean_no_further_than_the_norm(tmp_path):
    _, change = _train(tmp_path, "clip:norm=0.05")
    length = math.sqrt(sum(float(value.square().sum()) for value in change.values()))
    assert 0.01 < length < 0.0501


def test_private_training_reports_its_epsilon(tmp_path):
    summary, change = _train(tmp_path, "dp-sgd:noise=2", rounds=2, batch_size=20)
    images = math.ceil(len(load_dataset("digits").train) / 4)
    privacy = parse_defense("dp-sgd:noise=2").privacy
    expected = privacy.epsilon(images=images, batch_size=20, steps=2 * math.ceil(images / 20))
    assert summary["privacy"]["epsilon"] == pytest.approx(expected, rel=0.02)
    assert summary["privacy"]["delta"] == 1e-5
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["privacy"] == summary["privacy"]
    assert all(torch.isfinite(value).all() for value in change.values())


@pytest.mark.parametrize("defense", ["jpeg:quality=50", "soteria:share=0.5", "noise:ratio=0.05"])
def test_a_defended_federation_learns(tmp_path, defense):
    summary, _ = _train(tmp_path, defense, rounds=2, batch_size=10)
    assert summary["accuracy"] > 0.6
    assert summary["privacy"] is None


def test_an_old_run_is_read_with_its_transform():
    config = TrainConfig.check({"transform": "dct:keep=3"})
    assert config.defense == "dct:keep=3"
    assert TrainConfig.check({"transform": None}).defense == "none"
    assert TrainConfig.check(config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"defense": "blur:sigma=9"}, "sigma=9"),
        (
            {"defense": "dp-sgd:noise=1", "model": "resnet-bn"},
            "BatchNorm2d, mixes the images",
        ),
        ({"defense": "sotera:share=0.1"}, "did you mean 'soteria'"),
    ],
)
def test_a_defence_that_does_not_fit_is_refused_before_anything_runs(settings, message):
    with pytest.raises(FedveilError, match=message):
        prepare_job(TrainConfig.check({"dataset": "digits", "strategy": "fedavg", **settings}))
