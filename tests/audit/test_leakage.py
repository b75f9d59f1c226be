import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from fedveil.attacks.inversion import LevenbergMarquardt
from fedveil.audit.leakage import LeakageSettings, audit_leakage
from fedveil.audit.metrics import exact
from fedveil.audit.observe import observation_from_records, observe_clients
from fedveil.data import Dataset, Images
from fedveil.defenses import BlockDCT
from fedveil.errors import FedveilError
from fedveil.models import LeNet

CLASSES = tuple("abcdefghij")


@pytest.fixture(scope="module")
def dataset():
    picture = torch.from_numpy(load_sample_images().images[0].copy()).permute(2, 0, 1)[:, ::4, ::4]
    cut = picture.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    images = Images(cut.contiguous()[:40], torch.arange(40) % 10)
    return Dataset("photos", images, images, CLASSES)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LeNet((3, 16, 16), 10)


def _settings(**changes):
    given = {"dataset": "photos", "model": "lenet", "clients": 4, "victim": 3, "images": 3}
    return LeakageSettings(**{**given, "attacks": ("rgap",), **changes})


def test_report_files(dataset, model, tmp_path):
    out = tmp_path / "new" / "out"
    settings = _settings(defenses=("none", "dct:keep=6"), attacks=("rgap", "lm"))
    steps = []
    report = audit_leakage(
        dataset, model, settings, out=out, progress=lambda step, *_: steps.append(step)
    )
    assert {path.name for path in out.iterdir()} == {
        "leakage.json",
        "reconstructions.npz",
        "reconstructions.png",
    }
    content = json.loads((out / "leakage.json").read_text())
    assert content["settings"]["defenses"] == ["none", "dct:keep=6"]
    rows = content["rows"]
    kinds = [(row["attack"], row["defense"], row["adaptive"]) for row in rows]
    assert kinds == [
        ("rgap", "none", False),
        ("lm", "none", False),
        ("rgap", "dct:keep=6", False),
        ("rgap", "dct:keep=6", True),
        ("lm", "dct:keep=6", False),
        ("lm", "dct:keep=6", True),
    ]
    for row in rows:
        for key in (
            "exact",
            "identified",
            "label_accuracy",
            "psnr_original",
            "psnr_trained",
            "ssim_original",
            "seconds_per_image",
        ):
            assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
        assert row["images"] == 3
        assert row["exact"] == row["label_accuracy"] == row["identified"] == 1
    defended = rows[3]
    assert defended["psnr_trained"] > 60
    assert defended["psnr_original"] == pytest.approx(defended["psnr_ceiling"], abs=0.1)
    arrays = np.load(out / "reconstructions.npz")
    assert arrays["images/rgap/dct:keep=6/adaptive"].shape == (3, 3, 16, 16)
    assert np.array_equal(arrays["originals"], report.originals.numpy())
    assert Image.open(out / "reconstructions.png").width > 500
    assert "lm on dct:keep=6 (adaptive)" in steps


def test_attacks_see_observations_only(dataset, model):
    seen = []

    def observe(model, batches, *, classes, transform=None):
        seen.append((batches, transform))
        return observe_clients(model, batches, classes=classes, transform=transform)

    audit_leakage(dataset, model, _settings(defenses=("dct:keep=6",)), observe=observe)
    batches, transform = seen[0]
    assert len(seen) == 1
    assert [len(batch) for batch in batches] == [1, 1, 1]
    assert isinstance(transform, BlockDCT)


def test_nothing_is_written_when_an_attack_refuses(dataset, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10))
    with pytest.raises(FedveilError, match="rgap does not apply"):
        audit_leakage(dataset, model, _settings(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "--images 0"),
        ({"victim": 4}, "--victim 4"),
        ({"attacks": ()}, "at least one --attack"),
        ({"images": 11}, "has 10 images"),
    ],
)
def test_settings_that_cannot_be(dataset, model, changes, message):
    with pytest.raises(FedveilError, match=message):
        audit_leakage(dataset, model, _settings(**changes))


def test_gradients_come_from_messages(dataset, model):
    batch = dataset.train[torch.tensor([0, 1])]
    seen = observe_clients(model, [batch], classes=10)
    loss = nn.functional.cross_entropy(model(batch.pixels), batch.labels)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for got, wanted in zip(seen.gradients.values(), expected, strict=True):
        assert torch.equal(got[0], wanted)
    assert seen.images == 2
    assert seen.model is not model


def test_weights_after_a_step_tell_the_gradient(dataset, model):
    batch = [dataset.train[torch.tensor([0])]]
    plain = observe_clients(model, batch, classes=10)
    stepped = observe_clients(model, batch, classes=10, learning_rate=1.0)
    for name, gradient in plain.gradients.items():
        assert torch.allclose(stepped.gradients[name].float(), gradient, atol=2e-7)


@pytest.mark.parametrize("rate", [1.0, 0.1, 0.01])
def test_attacks_know_what_rounding_costs(dataset, model, rate):
    batch = [dataset.train[torch.tensor([0])]]
    plain = observe_clients(model, batch, classes=10)
    stepped = observe_clients(model, batch, classes=10, learning_rate=rate)
    pairs = [(stepped.gradients[k].double(), g.double()) for k, g in plain.gradients.items()]
    missed = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    assert missed / size == pytest.approx(stepped.rounding, rel=0.3)
    result = LevenbergMarquardt()(stepped)
    assert exact(result.images[:, 0], batch[0].pixels).all()


def test_records_that_do_not_match(dataset, model):
    from flwr.app import ArrayRecord

    sent = ArrayRecord(model.state_dict())
    state = {k: v for k, v in model.state_dict().items() if k != "fc.bias"}
    with pytest.raises(FedveilError, match=r"lacks fc\.bias"):
        observation_from_records(model, sent, [ArrayRecord(state)], shape=(3, 16, 16), classes=10)
    with pytest.raises(FedveilError, match="learning rate 0"):
        observation_from_records(
            model, sent, [sent], shape=(3, 16, 16), classes=10, learning_rate=0.0
        )
    with pytest.raises(FedveilError, match="at least one"):
        observe_clients(model, [], classes=10)
