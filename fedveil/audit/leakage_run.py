"""A leakage audit from its settings: loads what they name, shows progress, writes the report."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from torch import Tensor, nn

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
    model.train()  # as the clients will, whatever mode the user's factory leaves it in
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
    state = _read_state(path)
    wanted = model.state_dict()
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise FedveilError(
            f"--checkpoint {path} holds no state dict; write one with "
            "torch.save(model.state_dict(), FILE) or safetensors"
        )
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


def _refuse_compressed(path: Path) -> None:
    """Refuse an archive that unpacks to more than it is; ``torch.save`` compresses nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")


def _read_state(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _refuse_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FedveilError(
            f"--checkpoint {path} cannot be read: {error.strerror or error}; give the path of a "
            ".safetensors file, or of a .pt file of tensors"
        ) from None
    except Exception:  # unpickling raises what it likes, and says nothing a user can mend
        raise FedveilError(
            f"--checkpoint {path} is damaged or no file of tensors; give a .safetensors file, or a "
            ".pt file with a state dict and nothing else"
        ) from None
