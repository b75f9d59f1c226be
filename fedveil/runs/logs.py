"""Rounds in TensorBoard or MLflow, where ``--log`` asks for it; files in the run's directory alone.

Both record four numbers a round: accuracy of w, accuracy of the best copy, σ and seconds. No
weights, no key, nothing over the network.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fedveil.errors import FedveilError
from fedveil.runs.directory import RoundRecord, RunDirectory

if TYPE_CHECKING:
    from mlflow import MlflowClient

LogRound = Callable[[RoundRecord], None]

_TENSORBOARD_FOLDER = "tensorboard"
_MLFLOW_DATABASE = "mlflow.db"
_EXPERIMENT = "fedveil"
_LONGEST_PARAMETER = 500


@dataclass(frozen=True)
class _Kind:
    """A way to log.

    Attributes:
        package: What must be importable.
        open: Returns what is told of every round, the rounds there are logged.
    """

    package: str
    open: Callable[[RunDirectory], AbstractContextManager[LogRound]]


def measures(record: RoundRecord) -> dict[str, float]:
    """Return what is logged of a round: shares of images, σ in the strategy's unit, seconds."""
    return {
        "accuracy": record.accuracy,
        "best_copy": max(record.copies),
        "sigma": record.sigma,
        "seconds": record.seconds,
    }


def check_log(name: str | None) -> None:
    """Refuse a way to log whose package is not installed.

    Args:
        name: ``tensorboard`` or ``mlflow``; ``None``: no logging.

    Raises:
        FedveilError: It is not.
    """
    if name and find_spec(_KINDS[name].package) is None:
        raise FedveilError(
            f"--log {name} needs the package {_KINDS[name].package}, which is not installed; "
            f"pip install 'fedveil[{name}]', or leave --log out"
        )


def round_log(directory: RunDirectory) -> AbstractContextManager[LogRound]:
    """Return what to tell of every round of a run, those it has completed already logged.

    Raises:
        FedveilError: The package is not installed.
    """
    name = directory.config.log
    check_log(name)
    return _KINDS[name].open(directory) if name else nullcontext(lambda _: None)


@contextmanager
def _tensorboard(directory: RunDirectory) -> Iterator[LogRound]:
    from torch.utils.tensorboard import SummaryWriter

    # Every round anew, since a killed process may have kept some of its last to itself; what it
    # did write is purged by TensorBoard.
    folder = directory.path / _TENSORBOARD_FOLDER
    with SummaryWriter(str(folder), purge_step=1) as writer:

        def log(record: RoundRecord) -> None:
            for name, value in measures(record).items():
                writer.add_scalar(name, value, record.round)
            writer.flush()

        for record in directory.rounds():
            log(record)
        yield log


@contextmanager
def _mlflow(directory: RunDirectory) -> Iterator[LogRound]:
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    from mlflow import MlflowClient

    # By its own address, so that no MLFLOW_TRACKING_URI sends it elsewhere.
    client = MlflowClient(f"sqlite:///{directory.path.resolve() / _MLFLOW_DATABASE}")
    run = _mlflow_run(client, directory)
    logged = {point.step for point in client.get_metric_history(run, "seconds")}

    def log(record: RoundRecord) -> None:
        for name, value in measures(record).items():
            client.log_metric(run, name, value, step=record.round)

    for record in directory.rounds():
        if record.round not in logged:
            log(record)
    yield log
    client.set_terminated(run)


def _mlflow_run(client: "MlflowClient", directory: RunDirectory) -> str:
    """Return the number of the run in MLflow, made at the first call."""
    known = client.get_experiment_by_name(_EXPERIMENT)
    experiment = known.experiment_id if known else client.create_experiment(_EXPERIMENT)
    for run in client.search_runs([experiment]):
        return str(run.info.run_id)
    made = client.create_run(experiment, run_name=directory.path.resolve().name)
    settings: dict[str, Any] = directory.config.model_dump()
    for name, value in settings.items():
        client.log_param(made.info.run_id, name, str(value)[:_LONGEST_PARAMETER])
    return str(made.info.run_id)


_KINDS: Mapping[str, _Kind] = {
    "tensorboard": _Kind("tensorboard", _tensorboard),
    "mlflow": _Kind("mlflow", _mlflow),
}
