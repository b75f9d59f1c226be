"""What the commands do, as functions: a run, and what can be read, stolen and traced of it."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from fedveil.audit.leakage import LeakageReport
    from fedveil.audit.theft import TheftReport
    from fedveil.data import Dataset

Location = str | PathLike[str]


def train(out: Location, **settings: Any) -> dict[str, Any]:
    """Train a model on a federation of this machine's processes, as ``fedveil train`` does.

    Args:
        out: New directory for the run.
        settings: By the names of ``fedveil.runs.config.TrainConfig``.

    Returns:
        The content of ``summary.json``.

    Raises:
        FedveilError: Anything the user can mend; nothing is written where a setting is wrong.

    Example:
        >>> train("runs/first", dataset="mnist", strategy="protected", rounds=20)  # doctest: +SKIP
    """
    from fedveil.federation.server_app import prepare_job
    from fedveil.federation.training_run import run_to_completion
    from fedveil.runs.config import TrainConfig
    from fedveil.runs.directory import RunDirectory

    config = TrainConfig.check(settings)
    prepare_job(config)
    return run_to_completion(RunDirectory.create(Path(out), config))


def watch(
    dataset: "Dataset", model: "nn.Module", *, out: Location | None = None, **settings: Any
) -> "LeakageReport":
    """Attack what a server would receive of one client, as ``fedveil audit leakage`` does.

    Args:
        dataset: What the clients share out among them.
        model: What the server sends, with its weights.
        out: Directory for the results; None writes nothing.
        settings: By the names of ``fedveil.audit.settings.LeakageSettings``.

    Raises:
        FedveilError: Anything the user can mend.

    Example:
        >>> watch(data, Net(), attacks=("lm",), defenses=("none",)).table()  # doctest: +SKIP
    """
    from fedveil.audit.leakage import audit_leakage
    from fedveil.audit.settings import LeakageSettings

    place = None if out is None else Path(out)
    return audit_leakage(dataset, model, LeakageSettings(**settings), out=place)


def steal(run: Location, out: Location, **settings: Any) -> "TheftReport":
    """Steal a run's model as its clients could, as ``fedveil audit theft`` does.

    Args:
        run: Directory of the run.
        out: Directory for the results; one that was interrupted goes on.
        settings: By the names of ``fedveil.audit.settings.TheftSettings``; and ``workers``.

    Raises:
        FedveilError: Anything the user can mend.
    """
    from fedveil.audit.settings import TheftSettings
    from fedveil.audit.theft import run_theft_audit

    workers = settings.pop("workers", None)
    return run_theft_audit(TheftSettings(run=Path(run), **settings), out=Path(out), workers=workers)


def trace(leaked: Location, run: Location, **settings: Any) -> str:
    """Say which clients a leaked model came from, as ``fedveil audit trace`` does.

    Args:
        leaked: File of the leaked model's tensors.
        run: Directory of the run it may have come from.
        settings: By the names of ``fedveil.audit.settings.TraceSettings``.

    Raises:
        FedveilError: A file is missing, damaged or does not fit, or copies carry no fingerprints.
    """
    from fedveil.audit.settings import TraceSettings
    from fedveil.audit.trace import run_trace

    return run_trace(Path(leaked), Path(run), TraceSettings(**settings), out=None)


def write_report(
    directories: Sequence[Location], out: Location, *, title: str = "fedveil report"
) -> None:
    """Write one page about runs and audits, as ``fedveil report`` does.

    Not called ``report``, which is the package that does it.

    Args:
        directories: Of runs and audits.
        out: HTML file to write.
        title: Heading of the page.

    Raises:
        FedveilError: Anything the user can mend.
    """
    from fedveil.report import write_report as write

    write([Path(directory) for directory in directories], Path(out), title=title)
