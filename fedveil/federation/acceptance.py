"""What keeps one client's answer from moving the model further than the others'."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, median_low

import numpy as np
import torch
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from torch import Tensor

from fedveil.federation.replies import Update
from fedveil.federation.roster import Client, Refusal
from fedveil.types import Weights

Terms = Sequence[tuple[Weights, float]]

# Below this a median says nothing of who is the odd one out.
_ENOUGH = 3
_TRIMMED = 0.2


@dataclass(frozen=True)
class Acceptance:
    """Which well-formed answers of a round are averaged, and how.

    Attributes:
        norm_limit: An answer whose change is longer than this many times the median of the round's
            is refused; ``None`` refuses none. Nothing is refused in a round of fewer than three
            answers, or where more than half of them changed nothing.
        average: The weighted mean, or one of Flower's two robust averages coordinate by coordinate,
            in which every client counts the same: the median, or the mean without the lowest and
            the highest fifth.
        weight_limit: A client counts for no more images than this many times the median of what
            all clients say they have; ``None``: for as many as it says. How many images a client
            has is its word alone, and an unbounded word is the mean.

    The limit bounds what one client can do by scale, not what it can do by direction; the robust
    averages are from Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates", ICML 2018, and pay in accuracy where clients' images differ.
    """

    norm_limit: float | None = None
    average: str = "mean"
    weight_limit: float | None = 3.0


def refuse_large(
    updates: Sequence[Update], received: Mapping[Client, Weights], limit: float | None
) -> tuple[list[Update], list[Refusal]]:
    """Sort out the answers that changed far more than the median answer did.

    Args:
        updates: Well-formed answers.
        received: The copy each client was sent.
        limit: As ``Acceptance.norm_limit``.

    Returns:
        The answers that stay, and the refusals.
    """
    norms = [_length(update, received[update.client]) for update in updates]
    if limit is None or len(updates) < _ENOUGH or not (middle := median(norms)):
        return list(updates), []
    stay = [u for u, norm in zip(updates, norms, strict=True) if norm <= limit * middle]
    refusals = [
        Refusal(
            update.client.node,
            f"its change has norm {norm:.3g}, {norm / middle:.3g} times the round's median; "
            f"allowed: {limit:g} times",
        )
        for update, norm in zip(updates, norms, strict=True)
        if norm > limit * middle
    ]
    return stay, refusals


def weight_bound(clients: Sequence[Client], limit: float | None) -> int | None:
    """Return for how many images a client counts at most.

    The median is the lower one, so that of two clients the larger claim bounds nothing.

    Args:
        clients: All of the federation that answered the first query.
        limit: As ``Acceptance.weight_limit``.

    Returns:
        At least 1; None for no bound, where none is asked for or nobody said.
    """
    claims = [client.examples for client in clients if client.examples is not None]
    if limit is None or not claims:
        return None
    return max(1, int(limit * median_low(claims)))


def claim_bound(updates: Sequence[Update], limit: float | None) -> float | None:
    """Return for how much a client counts at most, by the answers of the round themselves.

    Args:
        updates: The answers; by whatever the app weighs them.
        limit: As ``Acceptance.weight_limit``.
    """
    if limit is None or not updates:
        return None
    bound = limit * median_low(update.examples for update in updates)
    return max(1, int(bound)) if all(type(u.examples) is int for u in updates) else bound


def bounded(
    updates: Sequence[Update], bound: float | None, *, unit: str = "images"
) -> tuple[list[Update], tuple[str, ...]]:
    """Return the updates with no weight over the bound, and who claimed more, in words."""
    if bound is None:
        return list(updates), ()
    over = tuple(
        f"node {update.client.node}: says it has {update.examples} {unit}, counted as {bound}, the "
        "most that the median claim allows (--weight-limit)"
        for update in updates
        if update.examples > bound
    )
    return [replace(update, examples=min(update.examples, bound)) for update in updates], over


def _length(update: Update, sent: Weights) -> float:
    squares = (
        _change(value.double(), sent[name].double()).square().sum()
        for name, value in update.weights.items()
        if value.is_floating_point()
    )
    return float(torch.stack(list(squares)).sum().sqrt())


def _change(value: Tensor, sent: Tensor) -> Tensor:
    # Infinities of the model's own have no difference, and no change either.
    return torch.where(value == sent, torch.zeros_like(value), value - sent)


def coordinate_median(terms: Terms) -> dict[str, Tensor]:
    """Return the median of each coordinate, whatever the counts; as Flower's FedMedian does."""
    return _coordinatewise(terms, lambda stacked: np.median(stacked, axis=0))


def trimmed_mean(terms: Terms) -> dict[str, Tensor]:
    """Return the mean of each coordinate without its extremes; as Flower's FedTrimmedAvg does."""
    return _coordinatewise(terms, lambda stacked: trim_mean(stacked, _TRIMMED))


def _coordinatewise(terms: Terms, average: Callable[[np.ndarray], np.ndarray]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, first in terms[0][0].items():
        if not first.is_floating_point():
            result[name] = first
            continue
        stacked = np.stack([weights[name].numpy() for weights, _ in terms])
        result[name] = torch.from_numpy(np.asarray(average(stacked))).to(first.dtype)
    return result
