"""A leakage audit from its settings: loads what they name, shows progress, writes the report."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from fedveil.audit.leakage import LeakageReport, LeakageSettings, audit_leakage
from fedveil.data import load_dataset
from fedveil.data.load import remarks_on
from fedveil.errors import FedveilError
from fedveil.models import build_model
from fedveil.runs.state_files import read_state


def run_leakage_audit(
    settings: LeakageSettings, *, out: Path | None, checkpoint: Path | None = None
) -> LeakageReport:
    """Audit what the settings name.

    Args:
        settings: What is audited.
        out: Directory for the results; ``None`` writes nothing.
        checkpoint: Trained weights for the model; freshly initialised by the seed otherwise, which
            is the worst case for the client.

    Raises:
        FedveilError: Anything the user can mend.
    """
    dataset = load_dataset(settings.dataset, seed=settings.seed)
    model = build_model(settings.model, dataset.shape, len(dataset.classes), seed=settings.seed)
    if checkpoint:
        load_checkpoint(model, checkpoint)
    model.train()  # as the clients will, whatever mode the user's factory leaves it in
    console = Console(stderr=True)
    for sentence in remarks_on(dataset.left_out, dataset.remarks):
        console.print(f"{settings.dataset}: {sentence}", markup=False, soft_wrap=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        tasks = {"": bars.add_task("federation", total=None, loss="")}

        def show(step: str, done: int, total: int, loss: float) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total, loss="")
            bars.update(tasks[step], completed=done, total=total, loss=f"loss {loss:.2g}")

        return audit_leakage(dataset, model, settings, out=out, progress=show)


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
