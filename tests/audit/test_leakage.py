import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from PIL import Image
from torch import nn

from fedveil.attacks.inversion import RGAP, LevenbergMarquardt, LocalSteps
from fedveil.audit import leakage as leakage_module
from fedveil.audit.leakage import audit_leakage
from fedveil.audit.metrics import exact
from fedveil.audit.settings import LeakageSettings, Watching
from fedveil.audit.watch import WatchedFederation, ground_truth, observation_from_records
from fedveil.data import Dataset, Images, load_dataset
from fedveil.defenses import BlockDCT, parse_defense
from fedveil.errors import FedveilError
from fedveil.models import build_model
from fedveil.runs.state_files import load_checkpoint
from tests.audit.small_models import batch_norms


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def model(dataset):
    return build_model("lenet", dataset.shape, 10, seed=0)


def _settings(**changes):
    given = {"clients": 4, "victim": 3, "images": 3}
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
        assert 0 < row["identified_floor"] < 0.15
        assert row["picked_out_floor"] == 0.01
        assert row["exact_floor"] == 0
        assert 5 < row["psnr_original_floor"] < 20
    assert rows[1]["exact"] == rows[1]["label_accuracy"] == rows[1]["identified"] == 1
    defended = rows[-1]
    assert defended["psnr_trained"] > 60
    assert defended["psnr_original"] == pytest.approx(defended["psnr_ceiling"], abs=0.1)
    arrays = np.load(out / "reconstructions.npz")
    assert arrays["images/lm/dct:keep=6/adaptive"].shape == (3, 1, 8, 8)
    assert np.array_equal(arrays["originals"], report.originals.numpy())
    assert Image.open(out / "reconstructions.png").width > 500
    assert "lm on dct:keep=6 (adaptive)" in steps
    assert content["settings"]["model"] == type(model).__name__  # and no attack's name


def test_nothing_is_written_when_an_attack_refuses(dataset, tmp_path):
    model = build_model("cnn", dataset.shape, 10, seed=0)
    with pytest.raises(FedveilError, match="rgap does not apply"):
        audit_leakage(dataset, model, _settings(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "--images 0"),
        ({"victim": 4}, "--victim 4"),
        ({"attacks": ()}, "at least one --attack"),
        ({"images": 1000}, "--images 1000 is too many"),
        ({"workers": 0}, "--workers 0"),
        ({"batch": 2}, "--images 3 is no multiple of the 2 images of a round"),
        ({"batch": 0}, "--batch 0"),
        ({"learning_rate": -1.0}, "--learning-rate -1"),
    ],
)
def test_settings_that_cannot_be(dataset, model, changes, message):
    with pytest.raises(FedveilError, match=message):
        audit_leakage(dataset, model, _settings(**changes))


@pytest.mark.parametrize("defense", ["none", "dct:keep=6"])
def test_the_servers_notes_are_the_gradient_of_the_victims_own_images(dataset, model, defense):
    """The federation's messages against a gradient computed here, on the scored images."""
    watched = WatchedFederation(dataset, model, Watching(clients=4, victim=2, images=6, batch=2))
    parsed = parse_defense(defense)
    seen = watched.observe(parsed)
    used = dataset.train[watched.ground_truth()]
    assert seen.images == 2
    for number in range(3):
        batch = used[2 * number : 2 * number + 2]
        pixels = batch.pixels if parsed.transform is None else parsed.transform(batch.pixels)
        loss = nn.functional.cross_entropy(model(pixels), batch.labels)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for got, wanted in zip(seen.gradients.values(), expected, strict=True):
            assert torch.allclose(got[number], wanted, rtol=1e-4, atol=1e-6)


class _MyNet(nn.Module):
    """A model that no name leads to."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(1 - images)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_clients_hold_the_very_dataset_and_model_that_are_audited(dataset, workers):
    """Other images than any name's, under another model: what leaks everything is found out."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (80, 1, 8, 8), generator=generator, dtype=torch.uint8)
    mine = Dataset(
        "digits",
        Images(pixels[:60], torch.arange(60) % 3),
        Images(pixels[60:], torch.arange(20) % 3),
        ("a", "b", "c"),
    )
    model = _MyNet(build_model("lenet", mine.shape, 3, seed=1)).eval()
    report = audit_leakage(mine, model, _settings(attacks=("lm",), seed=3, workers=workers))
    assert report.rows[0].summary()["exact"] == 1
    assert not model.training  # what was given is left as it was
    assert report.as_json()["settings"]["model"] == "_MyNet"


def test_names_of_a_second_source_are_not_taken():
    for name in ("dataset", "model"):
        with pytest.raises(TypeError, match=name):
            _settings(**{name: "digits"})


def test_batches_are_put_in_order_before_they_are_scored(dataset, model):
    settings = _settings(images=6, batch=3, attacks=("lm",))
    report = audit_leakage(dataset, model, settings)
    (row,) = report.rows
    assert row.reconstructions.shape == report.originals.shape == (6, 1, 8, 8)
    assert row.loss.shape == (2,)
    summary = row.summary()
    assert summary["images"] == 6
    assert summary["exact"] == summary["identified"] == summary["label_accuracy"] == 1
    assert len(set(ground_truth(dataset, settings).tolist())) == 6
    assert summary["identified_floor"] < 0.15
    assert "floor" in report.table().splitlines()[2]


def test_the_original_and_what_was_trained_on_are_scored_by_their_own_answers(
    dataset, model, monkeypatch
):
    def two_answers(observation, *, progress=None):
        found = RGAP()(observation)
        return dataclasses.replace(
            found, images=torch.zeros_like(found.images), originals=found.images
        )

    two_answers.uses = RGAP.uses
    monkeypatch.setattr(leakage_module, "build_attack", lambda _name: two_answers)
    scores = audit_leakage(dataset, model, _settings()).rows[0].scores
    assert (scores["psnr_original"] > 40).all()
    assert (scores["identified"] == 1).all()
    assert (scores["psnr_trained"] < 20).all()


def test_the_servers_notes_of_local_training(dataset, model):
    """A client's epochs and minibatches, done again here with the seed that only it has."""
    watching = Watching(
        clients=4, victim=2, images=5, batch=5, update="fedavg", epochs=2, batch_size=2,
        learning_rate=0.1,
    )  # fmt: skip
    watched = WatchedFederation(dataset, model, watching)
    seen = watched.observe(parse_defense("none"))
    assert seen.local == LocalSteps(epochs=2, batch_size=2, learning_rate=0.1)
    assert seen.images == 5
    used = dataset.train[watched.ground_truth()]
    shuffler = torch.Generator().manual_seed((0 * 1_000_003 + 1) * 1_000_003 + 2)
    own = copy.deepcopy(model)
    optimiser = torch.optim.SGD(own.parameters(), 0.1)
    for _ in range(2):
        for index in torch.randperm(5, generator=shuffler).split(2):
            optimiser.zero_grad()
            nn.functional.cross_entropy(own(used.pixels[index]), used.labels[index]).backward()
            optimiser.step()
    for (name, before), after in zip(model.named_parameters(), own.parameters(), strict=True):
        moved = (before - after).detach() / (0.1 * 6)
        assert torch.allclose(seen.gradients[name][0].float(), moved, rtol=1e-2, atol=1e-5)


def test_an_audit_of_federated_averaging(dataset, model):
    settings = _settings(
        images=4, batch=2, update="fedavg", batch_size=1, learning_rate=0.1,
        attacks=("ig:steps=30,restarts=2",),
    )  # fmt: skip
    report = audit_leakage(dataset, model, settings)
    assert report.rows[0].reconstructions.shape == (4, 1, 8, 8)
    assert "ig:steps=30,restarts=2" in report.table()
    with pytest.raises(FedveilError, match="use --attack ig, which simulates"):
        audit_leakage(dataset, model, dataclasses.replace(settings, attacks=("dlg",)))


@pytest.mark.parametrize("update", ["gradient", "fedavg"])
def test_batch_normalisation_is_scored_in_the_clients_own_mode(dataset, update):
    """In evaluation mode such a model's gradients are others', and nobody seemed recognised."""
    torch.manual_seed(0)
    model = batch_norms(dataset.shape, len(dataset.classes))
    settings = _settings(
        images=8, batch=4, batch_size=4, update=update, attacks=("ig:steps=1",), workers=1
    )
    (row,) = audit_leakage(dataset, model, settings).rows
    assert row.scores["picked_out"].mean() > 0.9


@pytest.mark.parametrize("rate", [1.0, 0.1, 0.01])
def test_weights_after_a_step_tell_the_gradient_and_what_rounding_cost(dataset, model, rate):
    given = Watching(clients=4, victim=1, images=1)
    stepping = dataclasses.replace(given, update="step", learning_rate=rate)
    watched = WatchedFederation(dataset, model, stepping)
    stepped = watched.observe(parse_defense("none"))
    plain = WatchedFederation(dataset, model, given).observe(parse_defense("none"))
    pairs = [(stepped.gradients[k].double(), g.double()) for k, g in plain.gradients.items()]
    missed = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    assert missed / size == pytest.approx(stepped.rounding, rel=0.3)
    result = LevenbergMarquardt()(stepped)
    assert exact(result.images[:, 0], dataset.train[watched.ground_truth()].pixels).all()


def test_only_the_adaptive_attacker_is_told_of_the_defence(dataset, model):
    watched = WatchedFederation(dataset, model, Watching(clients=4, images=1))
    seen = watched.observe(parse_defense("dct:keep=6"))
    assert isinstance(seen.knows, BlockDCT)
    assert set(vars(seen)) == {
        "model",
        "gradients",
        "shape",
        "classes",
        "images",
        "knows",
        "rounding",
        "sanitizer",
        "local",
        "clients",
        "statistics",
        "unread",
    }


def test_rounds_go_through_the_victims_images_without_repeating(dataset):
    used, others = (
        ground_truth(dataset, Watching(victim=victim, images=100)).tolist() for victim in (3, 4)
    )
    assert len(set(used)) == 100
    assert not set(used) & set(others)


def test_records_that_do_not_match(model):
    sent = ArrayRecord(model.state_dict())
    state = {k: v for k, v in model.state_dict().items() if k != "fc.bias"}
    with pytest.raises(FedveilError, match=r"lacks fc\.bias"):
        observation_from_records(model, sent, [ArrayRecord(state)], shape=(1, 8, 8), classes=10)
    with pytest.raises(FedveilError, match="learning rate 0"):
        LocalSteps(epochs=1, batch_size=1, learning_rate=0.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("junk.pt", b"junk", r"junk\.pt is damaged or no file of tensors; give"),
        ("list.pt", [1, 2], "holds no state dict"),
        ("half.pt", {"fc.bias": torch.zeros(10)}, r"it lacks body\.0\.weight"),
    ],
)
def test_checkpoints_that_do_not_serve(model, tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(FedveilError, match=message):
        load_checkpoint(model, path)


def test_a_model_that_cannot_tell_is_refused_before_any_round(dataset, monkeypatch):
    monkeypatch.setattr(WatchedFederation, "observe", None)
    frozen = build_model("lenet", dataset.shape, 10, seed=0).requires_grad_(False)
    with pytest.raises(FedveilError, match="no weight that is trained"):
        audit_leakage(dataset, frozen, _settings())
    diverged = build_model("lenet", dataset.shape, 10, seed=0)
    diverged.fc.weight.data.fill_(torch.nan)
    with pytest.raises(FedveilError, match="returns NaN or infinity"):
        audit_leakage(dataset, diverged, _settings())


def test_a_result_that_cannot_be_written_is_one_sentence(dataset, model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FedveilError, match="could not be written: Not a directory; make room"):
        audit_leakage(dataset, model, _settings(images=1), out=tmp_path / "file" / "out")
