"""Undo what changes no answer of a leaked model: the order and the scale of its hidden units."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedveil.types import Weights

# A copy's own mark moves the scale of its smallest units by less than this.
_RESCALED = 0.1
# So much more alike must units be before they are matched up to sign, or column by column.
_CLEARLY = 1.2
_ALIKE = 0.9
_FARTHEST = 4.0
_TINY = 1e-12


@dataclass(frozen=True)
class _Layer:
    """A layer with units: its weight, and what else has one value a unit.

    Attributes:
        weight: Name; its tensor is [units, inputs, ...].
        bias: Names of its own bias, [units]; one or none.
        after: Names of the parameters of the normalisation behind it, each of [units].
    """

    weight: str
    bias: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def aligned(leaked: Weights, base: Weights) -> dict[str, Tensor]:
    """Return a leaked model with its hidden units in the order and at the scale of a base.

    Layer by layer, from the input on, units are assigned to the base's by the cosine of their
    weights, and scaled by least squares; the next layer's inputs follow. Both leave every answer of
    a chain of layers with ReLU as it is, and would take a fingerprint's position from it. Before a
    normalisation, a unit's scale and sign change nothing, and are not passed on. Units that are
    missing, as dead ones may be without a change, come back as zeros; those that were added are
    left out. The last layer, whose scale changes no decision, is scaled as a whole. Nothing here
    looks at a fingerprint, so it can accuse nobody. Where a model is no chain, or the result is no
    nearer to the base, it is returned as it was; so is one whose units were left alone, to the bit.
    A normalisation that is missing, since it was folded into the layer before, hinders nothing.

    Sources: Uchida et al., "Embedding Watermarks into Deep Neural Networks", ICMR 2017, and
    Ainsworth, Hayase & Srinivasa, "Git Re-Basin", ICLR 2023, section 3.2 (matching of weights);
    the assignment is Kuhn's, "The Hungarian Method", 1955.

    Args:
        leaked: State by name.
        base: State by name, in the order of the layers.
    """
    names = [name for name, value in base.items() if _fits(leaked.get(name), value)]
    if any(value.ndim >= 2 and name not in names for name, value in base.items()):
        return dict(leaked)
    state = {name: leaked[name].detach().double().nan_to_num(0.0, 0.0, 0.0) for name in names}
    layers, moved = _chain(base), False
    for layer, following in itertools.pairwise(layers):
        if not _feeds(layer, following, state, base):
            return dict(leaked)  # no chain: the next layer is not fed by these units alone
        moved |= _put(state, base, layer, following.weight)
    moved |= bool(layers) and _last(state, base, layers[-1])
    if not moved or _distance(state, base) >= _distance(leaked, base):
        return dict(leaked)
    return {**leaked, **{name: value.to(leaked[name].dtype) for name, value in state.items()}}


def nearest(leaked: Weights, bases: Sequence[Weights]) -> Weights:
    """Return the base that a leaked model, aligned to it, is nearest to.

    Args:
        leaked: State by name.
        bases: At least one, each as ``aligned`` takes it.
    """
    return min(bases, key=lambda base: _unlike(aligned(leaked, base), base))


def _unlike(state: Weights, base: Weights) -> float:
    """Return how unlike two models are; of each tensor at most 1: one may be full of noise."""
    pairs = [
        (
            state[name].detach().double().flatten().nan_to_num(0.0, 0.0, 0.0),
            value.double().flatten(),
        )
        for name, value in base.items()
        if name in state and state[name].shape == value.shape
    ]
    return math.fsum(1 - float(torch.cosine_similarity(a, b, dim=0)) ** 2 for a, b in pairs)


def _fits(value: Tensor | None, wanted: Tensor) -> bool:
    """Whether a tensor has the shape of another, but perhaps another number of units."""
    return value is not None and value.ndim == wanted.ndim and value.shape[2:] == wanted.shape[2:]


def _feeds(layer: _Layer, following: _Layer, state: Weights, base: Weights) -> bool:
    own, known = state[layer.weight], base[layer.weight]
    places, rest = divmod(base[following.weight].shape[1], len(known))
    fed = state[following.weight].shape[1]
    return not rest and own.shape[1] == known.shape[1] and fed == places * len(own) > 0


def _chain(base: Weights) -> list[_Layer]:
    layers: list[_Layer] = []
    for name, value in base.items():
        if value.ndim >= 2:
            layers.append(_Layer(name))
        elif layers and value.shape == (len(base[layers[-1].weight]),):
            last = layers[-1]
            if not last.after and name == f"{last.weight.removesuffix('weight')}bias":
                layers[-1] = replace(last, bias=(name,))
            else:
                layers[-1] = replace(last, after=(*last.after, name))
    return layers


def _put(state: dict[str, Tensor], base: Weights, layer: _Layer, following: str) -> bool:
    """Put a layer's units, and the next one's inputs, into order and scale; tell if any moved."""
    units, count = len(base[layer.weight]), len(state[layer.weight])
    mine, there = (
        [name for name in names if name in state and len(state[name]) == count]
        for names in ((layer.weight, *layer.bias), layer.after)
    )
    rows = [layer.weight, *(() if layer.after else (n for n in layer.bias if n in mine))]
    own = {name: _padded(state[name], units) for name in (*mine, *there)}
    order, scale = _matched(_rows(own, rows), _rows(base, rows))
    own = {name: value[order] for name, value in own.items()}
    # What a normalisation did that was folded into this layer, the next one never undid.
    passed = torch.ones_like(scale) if layer.after else scale
    if there:
        for name in there:
            own[name] = own[name] * (scale.sign() if name.endswith("weight") else 1)
        passed = _least(_rows(own, there), _rows(base, there))
        near = (passed - 1).abs() < _RESCALED  # its own mark moves so few values by more
        passed = torch.where((passed > 0) & ~near, passed, torch.ones_like(passed))
    same = count == units and torch.equal(order, torch.arange(units))
    if same and all(bool((by - 1).abs().max() < _RESCALED) for by in (scale, passed)):
        return False
    for name, by in [*((name, scale) for name in mine), *((name, passed) for name in there)]:
        state[name] = own[name] * by.reshape(-1, *[1] * (own[name].ndim - 1))
    fed = state[following]
    # A flattened map has the places of one channel side by side.
    grouped = _padded(fed.reshape(len(fed), count, -1).transpose(0, 1), units)[order]
    grouped = (grouped / passed[:, None, None]).transpose(0, 1)
    state[following] = grouped.reshape(len(fed), -1, *fed.shape[2:])
    return True


def _last(state: dict[str, Tensor], base: Weights, layer: _Layer) -> bool:
    """Scale the last layer to the base's; tell whether it was at another scale."""
    if len(state[layer.weight]) != len(base[layer.weight]):
        return False
    own, known = (of[layer.weight].double().flatten() for of in (state, base))
    scale = float(_least(own[None], known[None]))
    # A copy's noise may make it larger, too: it is unlike the base then.
    if float(torch.cosine_similarity(own, known, dim=0)) < _ALIKE or abs(scale - 1) < _RESCALED:
        return False
    for name in (layer.weight, *(name for name in layer.bias if name in state)):
        state[name] = state[name] * scale
    return True


def _padded(value: Tensor, units: int) -> Tensor:
    """Return a tensor with zeros for the units that it lacks."""
    lacking = max(0, units - len(value))
    return torch.cat([value, value.new_zeros(lacking, *value.shape[1:])])


def _rows(state: Weights, names: Sequence[str]) -> Tensor:
    """Return what identifies each unit, float64 [units, values]."""
    return torch.cat([state[name].double().reshape(len(state[name]), -1) for name in names], dim=1)


def _least(own: Tensor, base: Tensor) -> Tensor:
    """Return by what to scale each row to be nearest to the base's."""
    return (own * base).sum(1) / own.square().sum(1).clamp_min(_TINY)


def _matched(own: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each unit of the base which of ``own`` it is, and by what to scale that one.

    Only a positive factor passes a ReLU. Normalisations and odd activations pass both signs, and
    one huge column, the outputs of a unit that is never on, would hide all others: units are
    matched up to sign, or with all columns as long, where they are clearly more alike then.
    """
    lengths = own.norm(dim=0).clamp_min(_TINY), base.norm(dim=0).clamp_min(_TINY)
    even = own / lengths[0] * lengths[1]
    best: tuple[float, Tensor, Tensor] | None = None
    for units in (own, even):
        for signed in (False, True):
            alike, order = _assigned(units, base, signed)
            if best is None or alike > _CLEARLY * best[0]:
                scale = _least(units[order], base)
                allowed = scale != 0 if signed else scale > 0
                best = alike, order, torch.where(allowed, scale, torch.ones_like(scale))
            if best[0] > len(base) / _CLEARLY:
                return best[1:]  # nothing can be clearly more alike
    assert best is not None
    return best[1:]


def _assigned(own: Tensor, base: Tensor, signed: bool) -> tuple[float, Tensor]:
    """Return how alike units are, summed, where each of the base's is given the one most alike."""
    from scipy.optimize import linear_sum_assignment

    lengths = own.norm(dim=1).clamp_min(_TINY), base.norm(dim=1).clamp_min(_TINY)
    cosine = (base / lengths[1][:, None]) @ (own / lengths[0][:, None]).T
    alike = cosine.abs() if signed else cosine
    rows, columns = linear_sum_assignment(alike.numpy(), maximize=True)
    return float(alike[rows, columns].sum()), torch.from_numpy(columns)


def _distance(state: Weights, base: Weights) -> float:
    """Return how far two models lie apart, each tensor in units of the base's size."""
    far = 0.0
    for name, value in base.items():
        if name not in state:
            continue
        own, known = state[name].detach().double().nan_to_num(0.0, 0.0, 0.0), value.double()
        if own.shape == known.shape:
            ratio = float((own - known).square().sum()) / max(_TINY, float(known.square().sum()))
            far += min(ratio, _FARTHEST)  # a bias before a normalisation may be anything
        else:
            far += _FARTHEST
    return far


def mean_state(copies: Sequence[Weights], names: Sequence[str]) -> Mapping[str, Tensor]:
    """Return the mean of a round's shared copies, in which the signs of one noise cancel."""
    return {name: torch.stack([c[name].double() for c in copies]).mean(0) for name in names}
