"""The direction along which fingerprints are looked for in a leaked model.

Everything here sees the leaked model and the shared copies alone, never a fingerprint.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedveil.audit.align import aligned, nearest
from fedveil.audit.hosts import Hosts
from fedveil.types import Weights

_CLIP = 2.0
_ROBUST_STEPS = 3
_STEPS = 3
_ALIGNMENTS = 3
_MEDIAN_OF = 4_096
_PART = 1 << 18  # values looked at together: all of a tensor but of a very large one
_NEIGHBOURS = 200  # a part has so many neighbourhoods, of at least ...
_LEAST_NEIGHBOURS = 65
_LEAST_PART = 128
_VALUES_A_SHARE = 4
_FLOOR = 0.01  # a neighbourhood's noise counts as no less than this part of the tensor's
_OUTLIER = 4.0
_FORETOLD = 0.7
_BEYOND = 1e3  # medians
_TINY = 1e-30


@dataclass(frozen=True)
class Residual:
    """What of a leaked model is neither host nor damage that its host foretells.

    Attributes:
        direction: float32 [n], of unit length; all zeros where the leak is explained to the bit.
        values: How many values of the leaked model could be compared.
        compared: Share of the run's values that are of a tensor the leaked model has, in [0, 1].
        explained: Share of the compared values' variance within tensors that copies without
            fingerprints explain, in [0, 1].
    """

    direction: Tensor
    values: int
    compared: float
    explained: float


class _Score(NamedTuple):
    """How much a shift of each value's host is seen in a leak.

    Attributes:
        score: float32 [k], derivative of a log-likelihood by the host.
        information: float32 [k], what each value tells of its host, at least 0.
        efficacy: Expected z of a shift by 1 in all values, along ``score``.
        noise: Mean square of what is left of the values that are not 0.
        foretold: Whether the host foretells the damage.
    """

    score: Tensor
    information: Tensor
    efficacy: float
    noise: float
    foretold: bool = False


def residual(leaked: Weights, hosts: Hosts) -> Residual:
    """Explain a leaked model by a run's shared copies, and return what is left.

    Its hidden units are put into the order and the scale of what explains it, where that explains
    it better. Part by part, the residual is scored as ``_robust`` or as ``_local`` does, whichever
    tells more, and parts are weighed by what they tell.

    Args:
        leaked: State by name.
        hosts: Of the run.
    """
    values, shares = _explained(leaked, hosts)
    for _ in range(_STEPS):
        scores = _scores(hosts, values, shares, _best)
        shares = shares + _step(hosts, scores)
        if not any(score.foretold for score in scores):
            break
    host = hosts.combined(shares)
    score = torch.cat([_weighed(_best(v, h)) for v, h in _parts(hosts, values, host)])
    norm = score.norm()
    direction = score / norm if norm > 0 else score
    known = sum(len(part) for part in torch.split(values, hosts.sizes) if bool(part.any()))
    explained = _variance(hosts, values, host)
    return Residual(direction, int(torch.count_nonzero(values)), known / len(values), explained)


def _explained(leaked: Weights, hosts: Hosts) -> tuple[Tensor, Tensor]:
    """Return a leak's values, aligned if that helps, and the shares that explain them."""
    coarse, target = hosts.coarse, nearest(leaked, hosts.bases)
    values = _sound(hosts.values_of(leaked))
    shares = _fitted(coarse, values)
    least = _left(coarse, values, shares)
    for _ in range(_ALIGNMENTS):
        state = aligned(leaked, target)
        if all(state[name] is leaked[name] for name in state):
            break
        moved = _sound(hosts.values_of(state))
        explained = _fitted(coarse, moved)
        left = _left(coarse, moved, explained)
        if left < least:
            values, shares, least = moved, explained, left
        target = hosts.state_of(hosts.combined(explained))
    return values, shares


def _sound(values: Tensor) -> Tensor:
    """Return values with 0 for those that are far beyond all others.

    What a unit that is never on gets or gives, or a bias before a normalisation, may be anything:
    one such value would outweigh all others in a fit by squares.
    """
    sizes = values.abs()
    there = sizes[sizes > 0]
    stride = max(1, len(there) // _MEDIAN_OF)
    bound = _BEYOND * float(there[::stride].median()) if len(there) else 0.0
    return torch.where(sizes <= bound, values, torch.zeros(()))


def _variance(hosts: Hosts, values: Tensor, host: Tensor) -> float:
    """Return the share of the values' variance within tensors that their host explains.

    Of few values the many directions would explain all: what they explain by chance is left out.
    """
    missed, spread, count = 0.0, 0.0, 0
    for own, known in zip(
        torch.split(values, hosts.sizes), torch.split(host, hosts.sizes), strict=True
    ):
        kept = own != 0
        if kept.any():
            rest, centred = (own - known)[kept], own[kept] - own[kept].mean()
            missed += float(rest.square().sum())
            spread += float(centred.square().sum())
            count += len(rest)
    free = count - len(hosts.directions)
    if spread <= 0 or free <= 0:
        return 0.0
    return max(0.0, 1 - missed / spread * count / free)


def _fitted(hosts: Hosts, values: Tensor) -> Tensor:
    """Return the shares that explain most values, whatever a few large steps did to the others."""
    kept = hosts.thinned(values) != 0
    shares = hosts.step(hosts.thinned(values - hosts.origin) * kept, kept.float())
    for _ in range(_ROBUST_STEPS):
        shares = shares + _step(hosts, _scores(hosts, values, shares, _robust))
    return shares


def _scores(
    hosts: Hosts, values: Tensor, shares: Tensor, rate: Callable[[Tensor, Tensor], "_Score"]
) -> list["_Score"]:
    """Return the score of each part of the values that are fitted."""
    host = hosts.thinned(hosts.origin) + shares @ hosts.directions
    return [rate(*part) for part in _parts(hosts, hosts.thinned(values), host)]


def _step(hosts: Hosts, scores: Sequence["_Score"]) -> Tensor:
    return hosts.step(
        torch.cat([of.score for of in scores]), torch.cat([of.information for of in scores])
    )


def _left(hosts: Hosts, values: Tensor, shares: Tensor) -> float:
    """Return how much of the values is unexplained, a mean square; of what is missing, all."""
    host = hosts.thinned(hosts.origin) + shares @ hosts.directions
    return float((hosts.thinned(values) - host).square().mean())


def _parts(hosts: Hosts, values: Tensor, host: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what is looked at together: a tensor, small ones with the next, of large ones a piece.

    A part of few values would be explained by the many directions to the bit, and count for all.
    """
    every = 1 if len(values) == len(hosts.origin) else hosts.every
    least = _LEAST_PART + _VALUES_A_SHARE * len(hosts.directions)
    sizes, gathered = [], 0
    for size in hosts.sizes:
        gathered += -(-size // every)
        if gathered >= least:
            sizes.append(gathered)
            gathered = 0
    sizes = [*sizes[:-1], sum(sizes[-1:]) + gathered]
    for own, explained in zip(torch.split(values, sizes), torch.split(host, sizes), strict=True):
        pieces = -(-len(own) // _PART)
        yield from zip(own.tensor_split(pieces), explained.tensor_split(pieces), strict=True)


def _best(values: Tensor, host: Tensor) -> _Score:
    plain, local = _robust(values, host), _local(values, host)
    return local if local.noise < _FORETOLD * plain.noise else plain


def _weighed(score: _Score) -> Tensor:
    norm = score.score.norm()
    return score.score * (score.efficacy / norm) if norm > 0 else score.score


def _robust(values: Tensor, host: Tensor) -> _Score:
    """Score the differences themselves, clipped at twice the median size.

    Fine-tuning's few large steps pass that. Zeros, which pruning made, are left out.
    """
    kept = values != 0
    if not kept.any():
        return _nothing(values)
    rest = (values - host) * kept
    compared = rest[kept]
    # Some thousands tell the median of a large part well enough.
    stride = -(-len(compared) // _MEDIAN_OF)
    bound = float(_CLIP * compared[::stride].abs().median())
    clipped = rest.clamp(-bound, bound)
    square = float(clipped.square().sum()) / len(compared)
    if square <= 0:
        return _nothing(values)
    inside = (rest.abs() <= bound) & kept
    weight = torch.where(rest != 0, clipped / rest, torch.ones(())) * kept
    efficacy = float(inside.sum()) / math.sqrt(square * len(compared))
    noise = float(compared.square().mean())
    return _Score(clipped / square, weight / square, efficacy, noise)


def _local(values: Tensor, host: Tensor) -> _Score:
    """Score what the host does not foretell, where a small shift of the host would show.

    Rounding and pruning are functions of the value: most values tell nothing of a small shift, and
    those next to a threshold tell all. Values are sorted by their host; in each neighbourhood the
    leak is regressed on the host, and the score is slope x residual / noise, the derivative of the
    normal log-likelihood. That needs no knowledge of what was done to the model.
    """
    count = len(values)
    half = max(_LEAST_NEIGHBOURS, count // _NEIGHBOURS) // 2
    if count < 4 * half:
        return _nothing(values)
    order = torch.argsort(host)
    own, explained = values[order].double(), host[order].double()
    mean, center = _near(own, half), _near(explained, half)
    spread = (_near(explained.square(), half) - center.square()).clamp_min(0)
    joint = _near(explained * own, half) - center * mean
    slope = torch.where(spread > _TINY, joint / spread.clamp_min(_TINY), torch.zeros(()))
    slope = slope.clamp_min(0)  # whatever was done keeps the order
    rest = own - mean - slope * (explained - center)
    noise = _near(rest.square(), half)
    floored = noise + _FLOOR * noise.mean() + _TINY
    bound = _OUTLIER * noise.sqrt()
    score = slope * rest.clamp(-bound, bound) / floored
    # A slope is known to noise / (neighbours x spread), which is no information.
    known = (slope.square() - noise / (2 * half + 1) / spread.clamp_min(_TINY)).clamp_min(0)
    information = slope.square() / floored
    length = float(score.norm())
    efficacy = float((known / floored).sum()) / length if length > 0 else 0.0
    back = torch.empty_like(order)
    back[order] = torch.arange(count)
    kept = own != 0
    left = float(rest[kept].square().mean()) if kept.any() else math.inf
    return _Score(score[back].float(), information[back].float(), efficacy, left, foretold=True)


def _near(values: Tensor, half: int) -> Tensor:
    """Return the mean of each value and ``half`` neighbours on either side, as far as there are."""
    sums = torch.cat([torch.zeros(1, dtype=values.dtype), values.cumsum(0)])
    place = torch.arange(len(values))
    low, high = (place - half).clamp_min(0), (place + half + 1).clamp_max(len(values))
    return (sums[high] - sums[low]) / (high - low)


def _nothing(values: Tensor) -> _Score:
    return _Score(torch.zeros_like(values), torch.zeros_like(values), 0.0, math.inf)
