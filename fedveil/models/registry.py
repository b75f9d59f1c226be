"""Models by name, and the user's own by import path."""

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedveil.errors import FedveilError
from fedveil.models.cnn import CNN, MnistCNN
from fedveil.models.imprint import Imprint
from fedveil.models.lenet import LeNet
from fedveil.models.resnet import (
    batch_norm_resnet,
    group_norm_resnet,
    wide_group_norm_resnet,
)
from fedveil.models.vit import ViT
from fedveil.types import Shape

Factory = Callable[[Shape, int], nn.Module]


def _imprinted(inner: Factory) -> Factory:
    return lambda shape, classes: Imprint(inner(shape, classes), shape)


MODELS: dict[str, Factory] = {
    "lenet": LeNet,
    "cnn": CNN,
    "mnist-cnn": MnistCNN,
    "resnet-gn": group_norm_resnet,
    "wide-resnet-gn": wide_group_norm_resnet,
    "resnet-bn": batch_norm_resnet,
    "vit": ViT,
    "imprint-cnn": _imprinted(CNN),
    "imprint-resnet-gn": _imprinted(group_norm_resnet),
}


def build_model(name: str, shape: Shape, classes: int, *, seed: int) -> nn.Module:
    """Return a freshly initialised model.

    Args:
        name: A key of ``MODELS``, or ``package.module:factory`` where ``factory(shape, classes)``
            returns a ``torch.nn.Module``. The current folder is searched too.
        shape: (C, H, W) of one image, pixels in [0, 1].
        classes: Number of classes.
        seed: Seeds the initialisation; the caller's random state is left as it was.

    Raises:
        FedveilError: Unknown name, an import that fails, or a model that does not turn
            [2, C, H, W] into finite logits [2, classes].
    """
    factory = _import_factory(name) if ":" in name else _known_factory(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _made(name, factory, shape, classes)
        # Lazy layers are initialised by their first forward pass: under the same seed.
        _check_forward(name, model, shape, classes)
    return model


def _known_factory(name: str) -> Factory:
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise FedveilError(
        f"model {name!r} is unknown{hint} Known: {', '.join(MODELS)}; "
        "or your own as package.module:factory"
    )


def _import_factory(path: str) -> Factory:
    module_name, _, attribute = path.partition(":")
    look_here()
    try:
        factory: Any = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # the user's own module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FedveilError(
            f"model {path!r} could not be imported ({reason}). Give package.module:factory, "
            "importable from here; factory(shape, classes) must return a torch.nn.Module"
        ) from error
    if not callable(factory):
        raise FedveilError(f"model {path!r} is a {type(factory).__name__}, not a factory function")
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


def _made(name: str, factory: Factory, shape: Shape, classes: int) -> nn.Module:
    try:
        return factory(shape, classes)
    except FedveilError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise FedveilError(
            f"model {name!r} cannot be made for images of shape {shape} (C, H, W) and {classes} "
            f"classes: {error}; mend factory(shape, classes), or give images of another size"
        ) from error


def _check_forward(name: str, model: object, shape: Shape, classes: int) -> None:
    if not isinstance(model, nn.Module):
        raise FedveilError(
            f"model {name!r}: the factory returned a {type(model).__name__}, not a torch.nn.Module"
        )
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *shape))
    except Exception as error:  # the user's own code may raise anything
        raise FedveilError(
            f"model {name!r} fails on images of shape {shape} (C, H, W): {error}; give images of "
            "the size it takes, or another model"
        ) from error
    finally:
        model.train(training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise FedveilError(
            f"model {name!r} returns {got} for two images; logits of shape "
            f"(2, {classes}) are needed, one column a class"
        )
