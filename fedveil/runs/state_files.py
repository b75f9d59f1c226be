"""Files of tensors by name, as users hand them in."""

import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedveil.errors import FedveilError
from fedveil.runs.directory import RunDirectory
from fedveil.runs.secrets import MODEL

_PACKED = "._packed_params"


def read_state(path: Path, *, option: str) -> dict[str, Tensor]:
    """Read a model's state; safetensors, or a PyTorch file of tensors.

    A checkpoint that holds one state dict beside other things is taken for that.

    Args:
        path: The file; the encrypted model of a run is decrypted.
        option: What the user knows it by, for messages.

    Raises:
        FedveilError: It cannot be read, or holds something else.
    """
    if path.name == f"{MODEL}.enc":
        return RunDirectory.open(path.parent).model()
    try:
        state = _load(path)
    except OSError as error:
        raise FedveilError(
            f"{option} {path} cannot be read: {error.strerror or error}; give the path of a "
            ".safetensors file, or of a .pt file of tensors"
        ) from None
    except Exception:  # unpickling raises what it likes, and says nothing a user can mend
        raise FedveilError(
            f"{option} {path} is damaged or no file of tensors; give a .safetensors file, or a "
            ".pt file written by torch.save(model.state_dict(), FILE)"
        ) from None
    state = _unwrapped(state)
    if not _is_state(state):
        raise FedveilError(
            f"{option} {path} holds no state dict, or several; write one with "
            "torch.save(model.state_dict(), FILE) or safetensors"
        )
    return state


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


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    _refuse_compressed(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(loaded: Any) -> Any:
    """Return the one state dict in a checkpoint that holds other things beside it, if it does."""
    if not isinstance(loaded, dict) or _is_state(loaded):
        return loaded
    inside = [_unpacked(value) for value in (loaded, *loaded.values()) if isinstance(value, dict)]
    states = [value for value in inside if value and _is_state(value)]
    return states[0] if len(states) == 1 else loaded


def _is_state(held: Any) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(held, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items()
    )


def _unpacked(held: dict[Any, Any]) -> dict[Any, Any]:
    """Return a state with the weights that PyTorch's quantised layers keep as a pair."""
    state = dict(held)
    for name in [name for name in state if isinstance(name, str) and _PACKED in name]:
        pair = state.pop(name)
        if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Tensor):
            stem = name.partition(_PACKED)[0]
            state[f"{stem}.weight"] = pair[0].dequantize()
            if isinstance(pair[1], Tensor):
                state[f"{stem}.bias"] = pair[1]
    return state


def _refuse_compressed(path: Path) -> None:
    """Refuse an archive that unpacks to more than it is; ``torch.save`` compresses nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")
