"""Files of tensors by name, as users hand them in."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedveil.errors import FedveilError


def read_state(path: Path, *, option: str) -> dict[str, Tensor]:
    """Read a model's state; safetensors, or a PyTorch file of nothing but tensors.

    Args:
        path: The file.
        option: What the user knows it by, for messages.

    Raises:
        FedveilError: It cannot be read, or holds something else.
    """
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FedveilError(
            f"{option} {path} cannot be read: {error.strerror or error}; give the path of a "
            ".safetensors file, or of a .pt file of tensors"
        ) from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise FedveilError(
            f"{option} {path} is damaged or no file of tensors; give a .safetensors file, or a "
            ".pt file written by torch.save(model.state_dict(), FILE)"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise FedveilError(
            f"{option} {path} holds no state dict; write one with "
            "torch.save(model.state_dict(), FILE) or safetensors"
        )
    return state
