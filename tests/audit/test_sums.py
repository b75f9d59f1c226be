"""What sums over clients' images tell: all of one client, little of many, nothing of noise."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from fedveil.audit.members import Members
from fedveil.audit.settings import SumsSettings
from fedveil.audit.sums import _mean_correlation, audit_sums
from fedveil.cli.main import app as command
from fedveil.data import Images
from fedveil.errors import FedveilError
from fedveil.federation.server_app import load_job
from fedveil.federation.training_run import run_to_completion
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory

SETTINGS = {"dataset": "digits", "clients": 20, "filters": 8, "secure_aggregation": False}


def trained(path, **settings):
    directory = RunDirectory.create(path, TrainConfig.check(SETTINGS | settings))
    run_to_completion(directory)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run") / "run", partition="dirichlet:0.3")


def test_one_clients_sums_show_its_images_and_those_of_all_do_not(run, tmp_path):
    told = CliRunner().invoke(
        command, ["audit", "sums", str(run), "--out", str(tmp_path), "--rebuilt", "3"]
    )
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "sums.json").read_text())
    everybody, traced, _, one, *_ = found["rows"]
    assert [row["attack"] for row in found["rows"]] == ["leverage", "tracing", "column"] * 2
    assert traced["auc"] > everybody["auc"]
    assert found["forecast"]["public"] == everybody["images"]
    assert everybody["holder"] == "20 clients"
    assert everybody["images"] == 1420  # one client has more than the weight limit lets it sum
    assert found["dimension"] == 64
    assert one["auc"] > 0.9 > 0.7 > everybody["auc"]
    assert everybody["seen"]
    assert one["seen"]  # there is no secure aggregation
    rebuilt = found["rebuilt"]
    assert rebuilt["images"] == 3
    assert rebuilt["from_one_client"] > rebuilt["from_the_round"]
    assert (tmp_path / "sums.png").read_bytes().startswith(b"\x89PNG")
    assert "0.1% cannot be told" in told.output
    assert "can choose one that singles an image out" in told.output


def test_images_that_are_not_those_in_the_sums_are_refused(run, monkeypatch):
    def others(config):
        job = load_job(config)
        train = job.dataset.train
        changed = train.raw.clone()
        changed[17] = changed[18]
        return replace(job, dataset=replace(job.dataset, train=Images(changed, train.labels)))

    monkeypatch.setattr("fedveil.audit.sums.load_job", others)
    with pytest.raises(FedveilError, match="images of digits here are not those that"):
        audit_sums(run, SumsSettings(rebuilt=0), out=None)
    # An earlier version noted no images, and the sums themselves tell.
    monkeypatch.setattr(RunDirectory, "check_images", lambda self, digest: None)
    with pytest.raises(FedveilError, match="images of digits here are not those in the sums"):
        audit_sums(run, SumsSettings(rebuilt=0), out=None)


def test_doubles_of_images_in_the_sums_are_neither_strangers_nor_public(run, monkeypatch):
    def doubled(config):
        job = load_job(config)
        split, inside = job.evaluation, Members.of(config, job.dataset.train).images(2)
        return replace(
            job,
            evaluation=replace(
                split,
                report=Images.joined([split.report, inside]),
                calibration=Images.joined([split.calibration, inside[:3]]),
            ),
        )

    settings = SumsSettings(rebuilt=0, images=300)
    clean = audit_sums(run, settings, out=None)
    monkeypatch.setattr("fedveil.audit.sums.load_job", doubled)
    mixed = audit_sums(run, settings, out=None)
    assert (mixed.strangers, mixed.public) == (clean.strangers, clean.public)
    assert [row.as_json() for row in mixed.rows] == [row.as_json() for row in clean.rows]
    assert "doubles of images that are, and were left out" in mixed.untold[0]


def test_a_client_of_few_images_shows_them_where_they_are_not_alone_in_their_class(tmp_path):
    path = trained(tmp_path / "run", filters=44, images_per_feature=4, clients=20)
    rebuilt = audit_sums(path, SumsSettings(rebuilt=3), out=tmp_path).rebuilt
    assert rebuilt is not None
    several = [place for place, some in enumerate(rebuilt.candidates) if len(some) > 1]
    assert rebuilt.as_json()["lone"] == 3 - len(several) < 3
    candidates = [rebuilt.candidates[place] for place in several]
    alone, floor = (
        _mean_correlation(some[several], candidates) for some in (rebuilt.alone, rebuilt.nearest)
    )
    assert alone > max(0.97, floor + 0.02)
    assert (tmp_path / "sums.png").exists()


def test_under_noise_nobody_is_told_from_one_clients_sums(tmp_path):
    path = trained(tmp_path / "run", epsilon=1.0, filters=None, clients=20)
    report = audit_sums(path, SumsSettings(rebuilt=2), out=None)
    assert report.epsilon == 1.0
    assert report.allowed["tpr_at_1"] < 0.03
    for row in report.rows:
        assert row.roc.auc.value < 0.78
    assert report.rebuilt is not None
    assert report.rebuilt.as_json()["from_one_client"] < 0.9


def test_what_has_no_sums_or_no_images_here_is_refused(tmp_path):
    with pytest.raises(FedveilError, match="strategy fedavg, whose clients return no sums"):
        audit_sums(
            trained(tmp_path / "a", strategy="fedavg", filters=None, rounds=1, model="lenet"),
            SumsSettings(),
            out=None,
        )
    with pytest.raises(FedveilError, match="--images 5 is out of range"):
        SumsSettings(images=5)


def test_a_mirror_image_is_the_image_where_a_map_takes_both_for_alike():
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    each = [one[None] for one in images]
    assert _mean_correlation(images.flip(3), each) == pytest.approx(1.0, abs=1e-5)
    assert _mean_correlation(images.flip(2), each) < 0.6
