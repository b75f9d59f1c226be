"""One step before a run: what would fail in every client is named before anything is written."""

import sys
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.cli.main import app
from fedveil.errors import FedveilError
from fedveil.federation import client_app
from fedveil.federation.server_app import prepare_job
from fedveil.runs.config import TrainConfig

_builds = count()


class _Base(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.fc = nn.Linear(shape[0] * shape[1] * shape[2], classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


class OutsideTheState(_Base):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.turn = torch.randn(classes, classes)  # no buffer: the clients' is another

    def forward(self, x):
        return super().forward(x) @ self.turn


class NameByCounter(_Base):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.add_module(f"layer{next(_builds)}", nn.Linear(2, 2))


class WritesInPlace(_Base):
    def forward(self, x):
        out = torch.sigmoid(super().forward(x))
        return out.mul_(out)


class _Refuses(nn.Module):
    def forward(self, x):
        if self.training:
            raise RuntimeError("cannot train")
        return x


class OnlyInEvaluation(_Base):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.bad = _Refuses()

    def forward(self, x):
        return self.bad(super().forward(x))


class Detached(_Base):
    def forward(self, x):
        return super().forward(x).detach()


class AlwaysLost(_Base):
    def forward(self, x):
        out = super().forward(x)
        return out / (0 * out) if self.training else out


class BatchNormed(_Base):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.norm = nn.BatchNorm1d(classes)

    def forward(self, x):
        return self.norm(super().forward(x))


class DrawsFromNumpy(_Base):
    def forward(self, x):
        out = super().forward(x)
        return out * float(np.random.rand()) if self.training else out


class Fine(_Base):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


def _prepare(make, **settings):
    client_app._model.cache_clear()
    settings = {
        "dataset": "digits", "clients": 4, "fraction": 1.0, "calibration_images": 100,
        "strategy": "fedavg", "seed": 1, "model": f"{__name__}:{make.__name__}", **settings,
    }  # fmt: skip
    return prepare_job(TrainConfig.check(settings))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (OutsideTheState, "outside its state; register it as a buffer"),
        (NameByCounter, r"built again, has other tensors .* layer\d"),
        (WritesInPlace, "in training on 2 images at once.*inplace=False"),
        (OnlyInEvaluation, "in bad, a _Refuses: RuntimeError: cannot train"),
        (Detached, "does not require grad.*leave some parameter trainable"),
        (AlwaysLost, "answer would be refused after its first step: its loss is nan"),
    ],
)
def test_what_would_fail_in_every_client_is_named_before_a_run(make, told):
    with pytest.raises(FedveilError, match=told):
        _prepare(make)


def test_a_client_of_one_image_whom_batch_normalisation_cannot_train_is_named():
    images = 1_437  # of the training split of digits
    with pytest.raises(FedveilError, match=r"on 1 image at once \(client \d+ has 1\).*group norm"):
        _prepare(BatchNormed, clients=images)
    _prepare(BatchNormed, batch_size=50)
    # Nodes of a deployment have images of their own; nobody here knows how many.
    _prepare(BatchNormed, clients=images, engine="deployed")


def test_what_no_seed_reaches_is_told_and_does_not_hinder():
    assert "the same seed will not give the same bits" in _prepare(DrawsFromNumpy).notes[0]
    assert _prepare(Fine).notes == ()


@pytest.mark.parametrize("strategy", ["fedavg", "noise-pair", "noise-delta", "protected"])
@pytest.mark.parametrize("defense", ["none", "dct:keep=21", "noise:ratio=1", "dp-sgd:noise=1"])
def test_it_leaves_model_and_random_state_as_they_were(strategy, defense):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = _prepare(Fine, strategy=strategy, defense=defense).model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = _prepare(Fine).model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_that_cannot_be_leaves_no_directory(tmp_path, monkeypatch):
    (tmp_path / "detached_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, shape, classes):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(shape[0] * shape[1] * shape[2], classes)\n"
        "    def forward(self, x):\n"
        "        return self.fc(x.flatten(1)).detach()\n"
    )
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("detached_net", None)
    run = ["train", "--dataset", "digits", "--model", "detached_net:Net", "--out", "run"]
    with pytest.raises(FedveilError, match="does not require grad"):
        app(run, standalone_mode=False)
    assert not (tmp_path / "run").exists()
