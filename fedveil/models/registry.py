"""Models by name, and the user's own by import path."""

from collections.abc import Callable

import torch
from torch import nn

from fedveil.errors import FedveilError
from fedveil.models.cnn import CNN, MnistCNN
from fedveil.models.factories import answer, described, import_factory
from fedveil.models.imprint import Imprint
from fedveil.models.lenet import LeNet
from fedveil.models.resnet import (
    batch_norm_resnet,
    group_norm_resnet,
    wide_group_norm_resnet,
)
from fedveil.models.vit import ViT
from fedveil.specs import unknown
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
    factory = _own_factory(name) if ":" in name else _known_factory(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _made(name, factory, shape, classes)
        # Lazy layers are initialised by their first forward pass: under the same seed.
        _check_forward(name, model, shape, classes)
    return model


def _known_factory(name: str) -> Factory:
    if name in MODELS:
        return MODELS[name]
    raise unknown("model", name, MODELS, "; or your own as package.module:factory")


def _own_factory(path: str) -> Factory:
    return import_factory(path, kind="model", call="factory(shape, classes)")


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
    logits = answer(model, shape, kind="model", name=name)
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
        raise FedveilError(
            f"model {name!r} returns {described(logits)} for two images; logits of shape "
            f"(2, {classes}) are needed, one column a class"
        )
