"""A leakage audit from its settings: loads what they name, shows progress, writes the report."""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedveil.audit.leakage import LeakageReport, LeakageSettings, audit_leakage
from fedveil.data import load_dataset
from fedveil.errors import FedveilError
from fedveil.models import build_model


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
    console = Console(stderr=True)
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
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except (OSError, SafetensorError) as error:
        raise FedveilError(f"--checkpoint {path} cannot be read: {error}") from None
    except Exception as error:  # unpickling and loading raise what they like
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FedveilError(
            f"--checkpoint {path} does not fit the model: {first} Give a .safetensors file, or a "
            ".pt file with the state dict of the same architecture"
        ) from None
