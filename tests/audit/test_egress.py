"""What a delivered model tells of who was in its training."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from fedveil.audit.egress import LearningByDescent, audit_egress, audit_run
from fedveil.audit.settings import EgressSettings
from fedveil.cli.main import app as command
from fedveil.cli.train import _met, _untested
from fedveil.data import Images, load_dataset
from fedveil.errors import FedveilError
from fedveil.federation.training import LocalTraining, train_locally
from fedveil.federation.training_run import run_to_completion
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from tests.audit.small_models import two_layers

TRAINING = LocalTraining(epochs=1, batch_size=20, learning_rate=0.2, momentum=0.9)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def fresh(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def learnt(images, epochs):
    torch.set_num_threads(1)
    model, generator = fresh(99), torch.Generator().manual_seed(0)
    for _ in range(epochs):
        train_locally(model, images, TRAINING, generator=generator)
    return model


def audited(model, used, unused, **changes):
    settings = EgressSettings(**{"images": 150, "shadows": 4, "companions": 0, **changes})
    learning = LearningByDescent(fresh, TRAINING, settings.epochs)
    return audit_egress(model, learning, used, unused, settings, subject="a model")


def test_a_model_that_learnt_by_heart_tells_who_was_in_it(digits):
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(3))
    labels = torch.randint(10, (len(order),), generator=torch.Generator().manual_seed(4))
    everything = type(digits.train)(digits.train.raw[order], labels)  # nothing but by heart
    used, unused = everything[:300], everything[300:600]
    report = audited(learnt(used, 120), used, unused, images=300, epochs=150)
    assert [row.attack for row in report.rows] == ["loss", "calibrated", "lira", "rmia"]
    for row in report.rows:
        assert row.roc.auc.low > 0.5, row.attack
    assert report.best.roc.found[0].low > 0.02
    exposed = report.as_json()["exposed"]
    assert len(exposed) == 10
    assert all(one["others_above"] <= 6 for one in exposed)
    assert {one["image"] for one in exposed} <= set(range(300))


def test_a_model_that_never_saw_the_images_tells_nothing(digits):
    model = learnt(digits.train[:300], 5)
    report = audited(model, digits.train[300:700], digits.train[700:])
    for row in report.rows:
        assert row.roc.auc.low < 0.52
        assert row.roc.found[0].value < 0.08


def by_heart(digits, count=600):
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(3))[:count]
    labels = torch.randint(10, (count,), generator=torch.Generator().manual_seed(4))
    return Images(digits.train.raw[order], labels)


def test_doubles_of_training_images_are_no_strangers(digits):
    everything = by_heart(digits)
    used, unused = everything[:300], everything[300:]
    model = learnt(used, 60)
    clean = audited(model, used, unused, shadows=0, images=300)
    mixed = audited(
        model, Images.joined([used, used[:40]]), Images.joined([unused, used[:60]]),
        shadows=0, images=300,
    )  # fmt: skip
    assert (clean.doubles, mixed.doubles) == (0, 60)
    assert clean.told
    assert mixed.others == 300
    assert mixed.rows[0].roc.found[0].value > 0.9 * clean.rows[0].roc.found[0].value > 0.02
    assert mixed.members.unique().numel() == 300
    assert int(mixed.members.max()) < 300
    assert "60 are doubles of images that are, and were left out" in mixed.untold[0]
    with pytest.raises(FedveilError, match="others: 19, doubles left out"):
        audited(model, used, Images.joined([unused[:19], used]))


def test_a_run_says_that_its_report_images_are_training_images(digits, tmp_path, monkeypatch):
    some = Images.joined([digits.test[:100], digits.train[:100]])
    doubled = dataclasses.replace(digits, test=some[some.labels != 3])
    monkeypatch.setattr("fedveil.federation.server_app.load_dataset", lambda *_, **__: doubled)
    given = {"dataset": "digits", "clients": 5, "filters": 8, "workers": 1}
    summary = run_to_completion(RunDirectory.create(tmp_path / "run", TrainConfig.check(given)))
    assert 30 <= summary["report_doubles"] <= 70
    assert summary["untested"] == ["3"]
    assert "No report image is of 3: no accuracy here tells" in str(_untested(summary))
    assert _untested({"untested": []}) is None
    settings = EgressSettings(images=40, shadows=0)
    assert "distilled" not in audit_run(tmp_path / "run", settings, out=None).untold[-1]
    (tmp_path / "run" / "distilled.safetensors").touch()
    told = audit_run(tmp_path / "run", settings, out=None).untold[-1]
    assert "distilled.safetensors was not audited" in told
    told = f"of which {summary['report_doubles']} are doubles of training images"
    assert told in _met(summary)
    assert _met(summary | {"report_doubles": 0}) == _met({}) == "it never met"


def test_answers_that_are_no_numbers_are_refused(digits):
    model = fresh(0)
    torch.nn.init.constant_(model[1].weight, torch.nan)
    with pytest.raises(FedveilError, match="the model answers images with numbers that are not"):
        audited(model, digits.train[:300], digits.test)
    diverging = LearningByDescent(fresh, LocalTraining(epochs=1, learning_rate=1e30), 1)
    settings = EgressSettings(images=100, shadows=2)
    with pytest.raises(FedveilError, match="--shadows 0 trains none"):
        audit_egress(fresh(0), diverging, digits.train[:99], digits.test, settings, subject="m")


def test_nothing_is_cleared_by_a_model_or_by_shadows_that_learnt_nothing(digits):
    useless = audited(fresh(1), digits.train[:300], digits.test, shadows=0)
    assert not useless.told
    assert not useless.as_json()["told"]
    assert "it learnt nothing, or it is not asked as it was trained" in useless.table()
    everything = by_heart(digits)
    weak = audited(learnt(everything[:300], 120), everything[:300], everything[300:], epochs=1)
    assert not weak.told
    assert "they learnt too little to be compared with" in weak.untold[0]


def test_a_rate_that_too_few_images_can_tell_is_not_told(digits):
    report = audited(learnt(digits.train[:60], 3), digits.train[:60], digits.test[:99])
    assert all(row.roc.found == (None, None) for row in report.rows)
    assert "cannot tell" in report.table()
    assert report.as_json()["rows"][0]["tpr_at_01"] is None
    assert report.as_json()["rows"][0]["tpr_at_01_low"] is None
    assert [sentence.split(" cannot")[0] for sentence in report.untold] == [
        "A false-positive rate of 1.0%",
        "A false-positive rate of 0.1%",
    ]


def test_settings_that_cannot_be(digits):
    for changes, message in (
        ({"shadows": 3}, "--shadows 3 is odd"),
        ({"images": 5}, "--images 5"),
        ({"shadows": -2}, "--shadows -2"),
    ):
        with pytest.raises(FedveilError, match=message):
            EgressSettings(**changes)
    with pytest.raises(FedveilError, match="needs at least 20 of each"):
        audited(fresh(0), digits.train[:5], digits.test)


def test_a_run_and_a_file_of_weights(digits, tmp_path):
    torch.set_num_threads(1)
    config = TrainConfig.check(
        {
            "dataset": "digits", "model": "tests.audit.small_models:two_layers", "clients": 6,
            "fraction": 0.5, "rounds": 2, "learning_rate": 0.1, "strategy": "fedavg",
            "workers": 1, "calibration_images": 60,
        }
    )  # fmt: skip
    run = RunDirectory.create(tmp_path / "run", config)
    run_to_completion(run)
    options = ["--images", "60", "--shadows", "2", "--epochs", "2"]
    out = tmp_path / "egress"
    done = CliRunner().invoke(
        command, ["audit", "egress", str(tmp_path / "run"), "--out", str(out), *options]
    )
    assert done.exit_code == 0, done.output
    told = json.loads((out / "egress.json").read_text())
    assert told["members"] == 60
    described = run.path / "config.json"
    content = json.loads(described.read_text())
    described.write_text(json.dumps(content | {"images": "0" * 64}))
    for again in (
        ["audit", "egress", str(run.path), "--out", str(out)],
        ["audit", "theft", "--run", str(run.path), "--out", str(out)],
        ["train", "--resume", str(run.path), "--rounds", "3"],
    ):
        refused = CliRunner().invoke(command, again)
        assert "the images of digits here are not those that" in str(refused.exception), again
    described.write_text(json.dumps(content))
    assert [row["attack"] for row in told["rows"]] == ["loss", "calibrated", "lira", "rmia"]
    assert "cannot tell" in done.output
    weights = tmp_path / "model.safetensors"
    save_file(two_layers(digits.shape, 10).state_dict(), weights)
    refused = CliRunner().invoke(
        command, ["audit", "egress", str(weights), "--out", str(out), *options]
    )
    assert "give the --dataset" in str(refused.exception)
    given = ["--dataset", "digits", "--model", "tests.audit.small_models:two_layers"]
    done = CliRunner().invoke(
        command, ["audit", "egress", str(weights), "--out", str(out), *given, *options]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "egress.json").read_text())["rows"]
    assert all(row["auc_low"] < 0.6 for row in rows)  # nothing was learnt


def test_a_classifier_in_closed_form_is_compared_with_others_of_its_kind(tmp_path):
    """Few images for many features: w tells who was in the sums, and under noise it does not."""
    found = {}
    for name, settings in {"plain": {"filters": 60}, "noisy": {"epsilon": 1.0}}.items():
        given = {"dataset": "digits", "clients": 20, "secure_aggregation": False, **settings}
        run = RunDirectory.create(tmp_path / name, TrainConfig.check(given))
        run_to_completion(run)
        out = tmp_path / f"{name}-egress"
        told = CliRunner().invoke(
            command,
            ["audit", "egress", str(run.path), "--out", str(out), "--shadows", "8"],
        )
        assert told.exit_code == 0, told.output
        rows = json.loads((out / "egress.json").read_text())["rows"]
        found[name] = {row["attack"]: row["auc"] for row in rows}
    assert found["plain"]["lira"] > found["plain"]["loss"] - 0.02
    assert max(found["plain"].values()) > 0.6
    assert max(found["noisy"].values()) < 0.7
