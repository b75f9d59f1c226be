"""What w is taught to: the server's images without their labels, and nothing else."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.data import Images
from fedveil.errors import FedveilError
from fedveil.federation import Distillation, distillation, distilled
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.server_app import prepare_job, run_rounds
from fedveil.models import build_model
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory


def scores(generator: torch.Generator) -> nn.Module:
    made = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    made[1].weight.data = torch.randn(3, 16, generator=generator)
    made[1].bias.data.zero_()
    return made.eval()


def test_a_network_learns_what_another_says_and_no_label():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(600, 1, 4, 4, generator=generator)
    teacher, student = scores(generator), scores(generator)
    before = student[1].weight.clone()
    how = Distillation(steps=400, learning_rate=2.0)
    learnt = [
        distilled(teacher, student, Images(pixels, labels), how)
        for labels in (torch.zeros(600, dtype=torch.int64), torch.full((600,), -1))
    ]
    assert torch.equal(student[1].weight, before)
    assert torch.equal(learnt[0][1].weight, learnt[1][1].weight)
    others = torch.rand(200, 1, 4, 4, generator=generator)
    apart = F.softmax(learnt[0](others), 1) - F.softmax(teacher(others), 1)
    assert float(apart.detach().abs().max()) < 0.05


def test_without_images_there_is_nothing_to_teach_by():
    generator = torch.Generator().manual_seed(0)
    nothing = Images(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(FedveilError, match="no images to teach"):
        distilled(scores(generator), scores(generator), nothing)


def test_a_run_teaches_w_to_the_users_network_and_tells_what_both_score(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "_STEPS", 600)
    settings = {"dataset": "digits", "clients": 4, "filters": 10, "distil_into": "lenet"}
    config = TrainConfig.check(settings | {"secure_aggregation": False})
    directory = RunDirectory.create(tmp_path / "run", config)
    with LocalGrid("fedveil.federation.client_app:app", nodes=4, workers=1) as grid:
        job = prepare_job(config)
        run_rounds(grid, job, directory, on_round=lambda _: None)
    summary = json.loads((directory.path / "summary.json").read_text())
    told = summary["analytic"]["distilled"]
    assert told["images"] == summary["calibration_images"]
    network = build_model("lenet", (1, 8, 8), 10, seed=3)
    network.load_state_dict(directory.distilled())
    report = job.evaluation.report
    right = (network.eval()(report.pixels).argmax(1) == report.labels).double().mean()
    assert told["accuracy"] == pytest.approx(float(right))
    assert told["accuracy"] > 0.7
    assert summary["accuracy"] > told["accuracy"] - 0.05
    assert (directory.path / "distilled.safetensors").stat().st_mode & 0o777 == 0o600
    directory.extend(2)
    assert not (directory.path / "distilled.safetensors").exists()


def test_a_network_that_does_not_fit_is_refused_before_training():
    config = TrainConfig.check({"dataset": "digits", "distil_into": "lenett"})
    with pytest.raises(FedveilError, match="did you mean 'lenet'"):
        prepare_job(config)
    with pytest.raises(FedveilError, match="distil-into lenet is of strategy analytic"):
        TrainConfig.check({"strategy": "fedavg", "distil_into": "lenet"})
