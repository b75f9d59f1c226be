"""What a user names as ``package.module:factory``: imported, and tried once."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedveil.errors import FedveilError
from fedveil.types import Shape


def import_factory(path: str, *, kind: str, call: str) -> Callable[..., Any]:
    """Return the function that a path names; the current folder is searched too.

    Args:
        path: ``package.module:factory``.
        kind: What it makes, for messages.
        call: How it is called, for messages.

    Raises:
        FedveilError: It cannot be imported, or is no function.
    """
    module_name, _, attribute = path.partition(":")
    look_here()
    try:
        factory: Any = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # the user's own module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FedveilError(
            f"{kind} {path!r} could not be imported ({reason}). Give package.module:factory, "
            f"importable from here; {call} must return a torch.nn.Module"
        ) from error
    if not callable(factory):
        raise FedveilError(f"{kind} {path!r} is a {type(factory).__name__}, not a factory function")
    return factory  # type: ignore[no-any-return]


def look_here() -> None:
    """Let modules of the current folder be imported, unless it is a run's own directory.

    Whoever may write into a run's directory must not choose what code its operator runs.
    """
    here = Path.cwd()
    if (here / "config.json").is_file() and any(here.glob("noise.key*")):
        sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != here]
    elif str(here) not in sys.path:
        sys.path.insert(0, str(here))


def answer(made: object, shape: Shape, *, kind: str, name: str) -> Any:
    """Return what a module makes of two black images in evaluation mode, and leave its mode alone.

    Args:
        made: What a factory returned.
        shape: (C, H, W) of one image.
        kind: What it is, for messages.
        name: What the user calls it.

    Raises:
        FedveilError: It is no module, or fails.
    """
    if not isinstance(made, nn.Module):
        raise FedveilError(
            f"{kind} {name!r}: the factory returned a {type(made).__name__}, not a torch.nn.Module"
        )
    training = made.training
    made.eval()
    try:
        with torch.no_grad():
            return made(torch.zeros(2, *shape))
    except Exception as error:  # the user's own code may raise anything
        raise FedveilError(
            f"{kind} {name!r} fails on images of shape {shape} (C, H, W): {error}; give images of "
            f"the size it takes, or another {kind}"
        ) from error
    finally:
        made.train(training)


def described(found: object) -> object:
    """Return a tensor's shape, or the type of what is none, for messages."""
    return tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
