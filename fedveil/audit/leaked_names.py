"""A leaked model under the names, and in the orientation, of the run it may have come from."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedveil.types import Weights

# How other libraries lay out what PyTorch has as [out, in, height, width].
_ORDERS: Mapping[int, tuple[tuple[int, ...], ...]] = {
    2: ((0, 1), (1, 0)),
    3: ((0, 1, 2), (2, 1, 0)),
    4: ((0, 1, 2, 3), (3, 2, 0, 1), (3, 2, 1, 0), (0, 3, 1, 2)),
    5: ((0, 1, 2, 3, 4), (4, 3, 0, 1, 2), (4, 3, 2, 1, 0), (0, 4, 1, 2, 3)),
}


def as_in_the_run(leaked: Weights, model: Weights) -> dict[str, Tensor]:
    """Return a leaked state as far as possible by the names and in the shapes of a model.

    A tensor that is missing under its name is looked for under every name that holds the parts of
    its own in their order, as wrappers make them (``module.``, ``_orig_mod.``, ``base_layer``,
    ``parametrizations``), and taken where there is one of its size. One in another order of
    dimensions, as other libraries have it, is turned; of several orders that fit, to the one that
    is nearest to the model. Quantised tensors are read as the numbers they stand for. Nothing here
    looks at a fingerprint, so it can accuse nobody.

    Args:
        leaked: State by name.
        model: A shared copy of the run, by name, without fingerprints.
    """
    found = {
        name: value.dequantize() if value.is_quantized else value for name, value in leaked.items()
    }
    for name, wanted in model.items():
        fitting = [_turned(found[name], wanted)] if name in found else []
        if not any(value is not None for value in fitting):
            fitting = [
                _turned(found[other], wanted)
                for other in found
                if other not in model and _holds(other, name)
            ]
        fitted = [value for value in fitting if value is not None]
        if len(fitted) == 1:
            found[name] = fitted[0]
    return found


def shared_values(state: Weights, model: Weights) -> float:
    """Return the share of a model's numbers that a state has under the same names and shapes."""
    every = sum(value.numel() for value in model.values() if value.is_floating_point())
    known = sum(
        value.numel()
        for name, value in model.items()
        if value.is_floating_point() and name in state and state[name].shape == value.shape
    )
    return known / max(1, every)


def _holds(name: str, wanted: str) -> bool:
    parts = iter(name.split("."))
    return all(part in parts for part in wanted.split("."))


def _turned(value: Tensor, wanted: Tensor) -> Tensor | None:
    """Return a tensor in the order of dimensions that fits another; None where none does."""
    fitting = list(_orders(value, wanted))
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    like = wanted.double()
    far = torch.stack([(some.double() - like).square().sum() for some in fitting]).nan_to_num()
    return fitting[int(far.argmin())]


def _orders(value: Tensor, wanted: Tensor) -> Iterator[Tensor]:
    if value.ndim < 2:
        if value.numel() == wanted.numel():
            yield value.reshape(wanted.shape)
        return
    for order in _ORDERS.get(value.ndim, ()):
        turned = value.permute(order)
        if turned.shape == wanted.shape:
            yield turned.contiguous()
