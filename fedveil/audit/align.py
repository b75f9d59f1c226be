"""Undo what changes no answer of a leaked model: the order and the scale of its hidden units."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.types import Weights

# A copy's own mark moves the scale of its smallest units by less than this.
_RESCALED = 0.1
_TINY = 1e-12


@dataclass(frozen=True)
class _Layer:
    """A layer with units: its weight, and what else has one value a unit.

    Attributes:
        weight: Name; its tensor is [units, inputs, ...].
        beside: Names of its bias and of the normalisations behind it, each of [units].
    """

    weight: str
    beside: tuple[str, ...]


def aligned(leaked: Weights, base: Weights) -> dict[str, Tensor]:
    """Return a leaked model with its hidden units in the order and at the scale of a base.

    Layer by layer, from the input on, units are assigned to the base's by the cosine of their
    weights, and scaled by least squares; the next layer's inputs follow. Both leave every answer of
    a chain of layers with ReLU as it is, and would take a fingerprint's position from it. Neither
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
    names = [name for name in base if name in leaked and leaked[name].shape == base[name].shape]
    if any(value.ndim >= 2 and name not in names for name, value in base.items()):
        return dict(leaked)
    known = {name: base[name] for name in names}
    state = {name: leaked[name].detach().double().nan_to_num(0.0, 0.0, 0.0) for name in names}
    layers, moved = _chain(base), False
    for layer, after in itertools.pairwise(layers):
        units = len(base[layer.weight])
        inputs = base[after.weight].shape[1]
        if inputs % units:
            return dict(leaked)  # no chain: the next layer is not fed by these units alone
        order, scale = _matched(_rows(state, layer), _rows(known, layer))
        if torch.equal(order, torch.arange(units)) and bool((scale - 1).abs().max() < _RESCALED):
            continue
        moved = True
        there = [name for name in layer.beside if name in state]
        for name in (layer.weight, *there):
            own = state[name][order]
            state[name] = own * scale.reshape(-1, *[1] * (own.ndim - 1))
        fed = state[after.weight]
        # A flattened map has the places of one channel side by side.
        grouped = fed.reshape(len(fed), units, -1)[:, order]
        # What a normalisation did that was folded into this layer, the next one never undid.
        if len(there) == len(layer.beside):
            grouped = grouped / scale[:, None]
        state[after.weight] = grouped.reshape(fed.shape)
    if not moved or _distance(state, known) >= _distance(leaked, known):
        return dict(leaked)
    return {**leaked, **{name: value.to(leaked[name].dtype) for name, value in state.items()}}


def nearest(leaked: Weights, bases: Sequence[Weights]) -> Weights:
    """Return the base that a leaked model, aligned to it, is nearest to.

    Args:
        leaked: State by name.
        bases: At least one, each as ``aligned`` takes it.
    """
    if any(name not in leaked or leaked[name].shape != v.shape for name, v in bases[0].items()):
        return bases[0]
    return min(bases, key=lambda base: _unlike(aligned(leaked, base), base))


def _unlike(state: Weights, base: Weights) -> float:
    """Return how unlike two models are; of each tensor at most 1: one may be full of noise."""
    pairs = [
        (state[name].double().flatten(), value.double().flatten()) for name, value in base.items()
    ]
    return math.fsum(1 - float(torch.cosine_similarity(a, b, dim=0)) ** 2 for a, b in pairs)


def _chain(base: Weights) -> list[_Layer]:
    layers: list[_Layer] = []
    for name, value in base.items():
        if value.ndim >= 2:
            layers.append(_Layer(name, ()))
        elif layers and value.shape == (len(base[layers[-1].weight]),):
            last = layers[-1]
            layers[-1] = _Layer(last.weight, (*last.beside, name))
    return layers


def _rows(state: Weights, layer: _Layer) -> Tensor:
    """Return what identifies each unit, float64 [units, values]: its weights and its bias."""
    parts = [state[layer.weight].double().flatten(1)]
    beside = (name for name in layer.beside if name.endswith("bias") and name in state)
    parts += [state[name].double()[:, None] for name in beside]
    return torch.cat(parts, dim=1)


def _matched(own: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each unit of the base which of ``own`` it is, and by what to scale that one."""
    from scipy.optimize import linear_sum_assignment

    lengths = own.norm(dim=1).clamp_min(_TINY), base.norm(dim=1).clamp_min(_TINY)
    cosine = (base / lengths[1][:, None]) @ (own / lengths[0][:, None]).T
    _, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    order = torch.from_numpy(columns)
    chosen = own[order]
    scale = (chosen * base).sum(1) / chosen.square().sum(1).clamp_min(_TINY)
    # Only a positive factor passes a ReLU.
    return order, torch.where(scale > 0, scale, torch.ones_like(scale))


def _distance(state: Weights, base: Weights) -> float:
    """Return how far two models lie apart, each tensor in units of the base's size."""
    return math.fsum(
        float((state[name].double() - value.double()).square().sum())
        / max(_TINY, float(value.double().square().sum()))
        for name, value in base.items()
    )


def mean_state(copies: Sequence[Weights], names: Sequence[str]) -> Mapping[str, Tensor]:
    """Return the mean of a round's shared copies, in which the signs of one noise cancel."""
    return {name: torch.stack([c[name].double() for c in copies]).mean(0) for name in names}
