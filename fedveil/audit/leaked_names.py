"""A leaked model under the names, and in the orientation, of the run it may have come from."""

from collections.abc import Iterable, Mapping
from functools import reduce

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
_TINY = 1e-12
_CLEARLY = 0.5  # of the distance that the next best order has
# Length and direction of a weight, as ``weight_norm`` keeps them, and what they are the weight of.
_NORMED = (
    (".parametrizations.weight.original0", ".parametrizations.weight.original1", ".weight"),
    ("weight_g", "weight_v", "weight"),
)


def as_in_the_run(leaked: Weights, model: Weights) -> dict[str, Tensor]:
    """Return a leaked state as far as possible by the names and in the shapes of a model.

    A tensor that is missing under its name is looked for under every name that holds the parts of
    its own in their order, as wrappers make them (``module.``, ``_orig_mod.``, ``base_layer``,
    ``parametrizations``), and taken where there is one of its size; else among tensors of its size
    whose names say nothing, as exporters make them, in their order, if they are as many as are
    missing. A weight kept as length and direction is put together. A tensor in another order of
    dimensions, as other libraries have it, is turned: into the order that fits all tensors of so
    many dimensions; of several, into the one that is clearly nearest to the model, which none is
    once hidden units were permuted, and then it is left as it is. Quantised and sparse tensors are
    read as the numbers they stand for. Nothing here looks at a fingerprint, so it can accuse
    nobody.

    Args:
        leaked: State by name.
        model: A shared copy of the run, by name, without fingerprints.
    """
    held = {name: v for name, v in leaked.items() if not (v.is_meta or v.is_nested)}
    found = _put_together({name: _dense(value) for name, value in held.items()})
    chosen = {name: own for name in model if (own := _named(found, name, model)) is not None}
    chosen |= _by_size(found, model, chosen)
    values = {name: found[own] for name, own in chosen.items()}
    common = _common_orders(values, model)
    turned = {name: _turned(v, model[name], common.get(v.ndim)) for name, v in values.items()}
    return {**found, **{name: _scaled(value, model[name]) for name, value in turned.items()}}


def shared_values(state: Weights, model: Weights) -> float:
    """Return the share of a model's numbers that a state has under the same names and shapes.

    Those that are not finite, and those of tensors of nothing but zeros, are no numbers.
    """
    every = sum(value.numel() for value in model.values() if value.is_floating_point())
    known = sum(
        int(state[name].isfinite().sum())
        for name, value in model.items()
        if value.is_floating_point()
        and name in state
        and state[name].shape == value.shape
        and bool(state[name].any())
    )
    return known / max(1, every)


def _dense(value: Tensor) -> Tensor:
    value = value.detach()
    if value.is_quantized:
        return value.dequantize()
    if value.layout is not torch.strided:
        value = value.to_dense()
    # Little is implemented for numbers of eight bits.
    value = value.float() if value.is_floating_point() and value.itemsize == 1 else value
    return value.real if value.is_complex() else value


def _scaled(value: Tensor, wanted: Tensor) -> Tensor:
    """Return whole numbers that stand for a weight in its size: their scale is known to none."""
    if value.is_floating_point() or not wanted.is_floating_point() or value.ndim < 2:
        return value
    spread, mean = torch.std_mean(value.float())
    known, around = torch.std_mean(wanted.float())
    return (value.float() - mean) * (known / spread.clamp_min(_TINY)) + around


def _put_together(state: Weights) -> dict[str, Tensor]:
    found = dict(state)
    for length, direction, whole in _NORMED:
        for name in [name for name in found if name.endswith(length)]:
            stem = name.removesuffix(length)
            size, way = found[name].double(), found.get(stem + direction)
            if way is None or way.ndim != size.ndim or not way.is_floating_point():
                continue
            over = [place for place in range(size.ndim) if size.shape[place] == 1]
            norm = torch.linalg.vector_norm(way.double(), dim=over or None, keepdim=True)
            if norm.shape == size.shape:
                found[stem + whole] = (size * way / norm).nan_to_num(0.0, 0.0, 0.0).float()
    return found


def _named(found: Weights, name: str, model: Weights) -> str | None:
    """Return under which name a tensor of the model is in a state, if its name says so."""
    others = [other for other in found if other not in model and _holds(other, name)]
    own = [name] if name in found else []
    for fits in (_orders, _like):
        for names in (own, others):
            fitting = [other for other in names if fits(found[other], model[name])]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                return None
    return None


def _by_size(found: Weights, model: Weights, chosen: Mapping[str, str]) -> dict[str, str]:
    """Return which tensors under names that say nothing stand for those of a size that lack."""
    lacking: dict[tuple[int, ...], list[str]] = {}
    for name, value in model.items():
        if name not in chosen and name not in found and value.is_floating_point() and value.ndim:
            lacking.setdefault(_size(value), []).append(name)
    free: dict[tuple[int, ...], list[str]] = {}
    taken = {*chosen.values(), *model}
    for name, value in found.items():
        if name not in taken and not any(_holds(name, other) for other in model):
            free.setdefault(_size(value), []).append(name)
    return {
        name: own
        for size, names in lacking.items()
        if len(free.get(size, ())) == len(names)
        for name, own in zip(names, free[size], strict=True)
    }


def _size(value: Tensor) -> tuple[int, ...]:
    return tuple(sorted(value.shape))


def _holds(name: str, wanted: str) -> bool:
    parts = iter(name.split("."))
    return all(part in parts for part in wanted.split("."))


def _like(value: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor could be another with some units more or less."""
    return value.ndim == wanted.ndim > 0 and value.shape[2:] == wanted.shape[2:]


def _orders(value: Tensor, wanted: Tensor) -> list[tuple[int, ...]]:
    """Return the orders of dimensions in which a tensor has the shape of another."""
    if value.ndim < 2:
        return [()] if value.numel() == wanted.numel() else []
    shape = tuple(wanted.shape)
    orders = _ORDERS.get(value.ndim, ())
    return [order for order in orders if tuple(value.shape[i] for i in order) == shape]


def _common_orders(values: Weights, model: Weights) -> dict[int, list[tuple[int, ...]]]:
    """Return by number of dimensions the orders that fit all tensors of so many."""
    every: dict[int, list[list[tuple[int, ...]]]] = {}
    for name, value in values.items():
        if value.ndim >= 2 and (orders := _orders(value, model[name])):
            every.setdefault(value.ndim, []).append(orders)
    return {ndim: reduce(_both, orders) for ndim, orders in every.items()}


def _both(
    some: Iterable[tuple[int, ...]], others: Iterable[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    kept = set(others)
    return [order for order in some if order in kept]


def _turned(value: Tensor, wanted: Tensor, common: list[tuple[int, ...]] | None) -> Tensor:
    """Return a tensor in the order of dimensions of another; as it is where it has another size."""
    fitting = _orders(value, wanted)
    if value.ndim < 2:
        return value.reshape(wanted.shape) if fitting else value
    fitting = _both(fitting, common) if common else fitting
    turned = [value.permute(order).contiguous() for order in fitting]
    if len(turned) < 2:
        return turned[0] if turned else value
    like = wanted.double()
    far = torch.stack([(some.double() - like).square().sum() for some in turned])
    far = far.nan_to_num(torch.inf)
    nearest, next_one = (float(d) for d in far.sort().values[:2])
    return turned[int(far.argmin())] if nearest < _CLEARLY * next_one else turned[0]
