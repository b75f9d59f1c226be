"""``--log``: what TensorBoard and MLflow are told, and what is said where they are missing."""

import os
import socket

import pytest
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.errors import FedveilError
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RoundRecord, RunDirectory
from fedveil.runs.logs import check_log, round_log

MEASURES = ("accuracy", "best_copy", "sigma", "seconds")


def record(number):
    return RoundRecord(
        round=number,
        accuracy=0.5 + number / 100,
        copies=(0.1, 0.2 + number / 100),
        sigma=0.25 * number,
        calibration_evaluations=1,
        calibration_images=10,
        calibration_seconds=0.5,
        seconds=2.0 * number,
        loss=1.0,
        clients=(0, 1),
    )


def train_until_killed(directory):
    with round_log(directory) as log:
        directory.write_rounds([record(1)])
        log(record(1))
        # The second was written down, and not yet logged.
        directory.write_rounds([record(1), record(2)])
        raise KeyboardInterrupt


def logged_twice(path, kind):
    """A run that is killed in its second round, and goes on to its third."""
    directory = RunDirectory.create(path, TrainConfig(log=kind, clients=2))
    with pytest.raises(KeyboardInterrupt):
        train_until_killed(directory)
    with round_log(directory) as log:
        directory.write_rounds([record(1), record(2), record(3)])
        log(record(3))
    return directory


def wanted():
    return {
        "accuracy": [0.51, 0.52, 0.53],
        "best_copy": [0.21, 0.22, 0.23],
        "sigma": [0.25, 0.5, 0.75],
        "seconds": [2.0, 4.0, 6.0],
    }


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_tensorboard_has_every_round_once(tmp_path, no_network):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = logged_twice(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(directory.path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(MEASURES)
    for name, values in wanted().items():
        points = events.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx(values)


def test_mlflow_has_every_round_once_and_stays_in_the_runs_directory(
    tmp_path, no_network, monkeypatch
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://203.0.113.1:5000")
    monkeypatch.chdir(tmp_path)
    directory = logged_twice(tmp_path / "run", "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{directory.path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedveil")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["strategy"] == "analytic"
    for name, values in wanted().items():
        points = client.get_metric_history(run.info.run_id, name)
        assert {point.step: point.value for point in points} == pytest.approx(
            dict(enumerate(values, start=1))
        )
        assert len(points) == 3
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_package_that_is_missing_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("fedveil.runs.logs.find_spec", lambda name: None)
    for kind in ("tensorboard", "mlflow"):
        with pytest.raises(FedveilError, match=rf"pip install 'fedveil\[{kind}\]'"):
            check_log(kind)
        done = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), "--log", kind])
        assert f"--log {kind} needs the package {kind}" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_nothing_is_logged_unless_it_is_asked_for(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", TrainConfig(clients=2))
    with round_log(directory) as log:
        log(record(1))
    assert {path.name for path in directory.path.iterdir()} == {"config.json", "noise.key"}
