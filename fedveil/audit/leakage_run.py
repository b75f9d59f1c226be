"""A leakage audit from its settings: loads what they name, shows progress, writes the report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from fedveil.audit.leakage import LeakageReport, LeakageSettings, audit_leakage
from fedveil.audit.recorded import (
    alike,
    audit_recorded,
    of_one_client,
    pair,
    read_truth,
    truth_of,
    unchecked,
)
from fedveil.data import Dataset, Images, load_dataset
from fedveil.data.load import remarks_on
from fedveil.defenses import parse_defense
from fedveil.errors import FedveilError
from fedveil.models import build_model
from fedveil.progress import ProgressBars, say
from fedveil.runs.recordings import RECORD_KEY_FILE, Exchange, read_exchanges, recording_key
from fedveil.runs.state_files import read_state


def run_leakage_audit(
    dataset: str,
    model: str,
    settings: LeakageSettings,
    *,
    out: Path | None,
    checkpoint: Path | None = None,
) -> LeakageReport:
    """Audit a dataset and a model by their names.

    Args:
        dataset: As ``fedveil.data.load_dataset`` reads it.
        model: As ``fedveil.models.build_model`` reads it.
        settings: What is audited.
        out: Directory for the results; ``None`` writes nothing.
        checkpoint: Trained weights for the model; freshly initialised by the seed otherwise, which
            is the worst case for the client.

    Raises:
        FedveilError: Anything the user can mend.
    """
    data, built = _prepared(dataset, model, settings.seed)
    if checkpoint:
        load_checkpoint(built, checkpoint)
    with _shown() as show:
        return audit_leakage(data, built, settings, model_name=model, out=out, progress=show)


@dataclass(frozen=True)
class Recorded:
    """Where the exchanges of another app's federation lie.

    Attributes:
        directory: What the recorders wrote; None where there is a pair of files.
        before, after: The model that was sent and the one that came back.
        truth: File of the images that were trained on; None where they were recorded, too.

    Raises:
        FedveilError: Neither or both are given.
    """

    directory: Path | None = None
    before: Path | None = None
    after: Path | None = None
    truth: Path | None = None

    def __post_init__(self) -> None:
        if (self.before is None) != (self.after is None):
            raise FedveilError("--before and --after belong together: give both")
        if (self.directory is None) == (self.before is None):
            raise FedveilError("give either --recorded DIR, or --before FILE and --after FILE")

    def exchanges(self, given: Images | None) -> tuple[Exchange, ...]:
        """Read the exchanges.

        Raises:
            FedveilError: They cannot be read.
        """
        if self.directory is None:
            assert self.before is not None
            assert self.after is not None
            return pair(self.before, self.after, given)
        key = recording_key()
        if key is None:
            raise FedveilError(
                f"--recorded {self.directory} is encrypted: put the path of its key into "
                f"{RECORD_KEY_FILE}"
            )
        return read_exchanges(self.directory, key)


def run_recorded_audit(
    dataset: str, model: str, settings: LeakageSettings, recorded: Recorded, *, out: Path | None
) -> LeakageReport:
    """Audit an app that fedveil is not part of, from what was recorded of it.

    Args:
        dataset: Where the images, the candidates and the strangers are from.
        model: What the app trains, as ``fedveil.models.build_model`` reads it.
        settings: What is audited; how many images there are follows from the recording.
        recorded: Where it lies.
        out: Directory for the results; ``None`` writes nothing.

    Raises:
        FedveilError: Anything the user can mend.
    """
    given = None if recorded.truth is None else read_truth(recorded.truth)
    exchanges, left = alike(of_one_client(recorded.exchanges(given), settings.victim))
    batch = exchanges[0].examples
    place = recorded.directory or f"{recorded.before} to {recorded.after}"
    told = unchecked(parse_defense(settings.defenses[0]))
    settings = replace(
        settings,
        images=batch * len(exchanges),
        batch=batch,
        recorded=str(place),
        unchecked=told,
    )
    for sentence in filter(None, (left, told)):
        say(sentence)
    data, built = _prepared(dataset, model, settings.seed)
    truth = truth_of(exchanges, data, given)
    with _shown() as show:
        report = audit_recorded(exchanges, truth, built, settings, model_name=model, progress=show)
    if out is not None:
        report.write(out)
    return report


def _prepared(dataset: str, model: str, seed: int) -> tuple[Dataset, nn.Module]:
    data = load_dataset(dataset, seed=seed)
    built = build_model(model, data.shape, len(data.classes), seed=seed)
    for sentence in remarks_on(data.left_out, data.remarks):
        say(f"{dataset}: {sentence}")
    return data, built.train()  # as the clients will, whatever mode the factory leaves it in


@contextmanager
def _shown() -> Iterator[Callable[[str, int, int, float], None]]:
    with ProgressBars() as bars:
        bars.begin("federation", 0, None, "")
        yield lambda step, done, total, loss: bars(step, done, total, f"loss {loss:.2g}")


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load weights into a model; safetensors, or a PyTorch file of nothing but tensors.

    Raises:
        FedveilError: The file cannot be read, or does not fit the model.
    """
    state = read_state(path, option="--checkpoint")
    wanted = model.state_dict()
    faults = [
        *(f"it lacks {name}" for name in wanted if name not in state),
        *(f"it has {name}, which the model has not" for name in state if name not in wanted),
        *(
            f"its {name} has shape {tuple(state[name].shape)}, the model's {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ),
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise FedveilError(
            f"--checkpoint {path} does not fit the model: {faults[0]}{more}; give the weights of "
            "this --model, trained on images of this size and as many classes"
        )
    model.load_state_dict(state)
