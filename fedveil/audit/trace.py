"""Which clients a leaked model came from, by the fingerprints in the copies they were sent.

The test. Of round r and a shared copy c, take u = (leaked - c) / RMS(layer), the differences to the
round's other shared copies projected out, clipped, whitened tensor by tensor, and brought to unit
length. For a client k of that round with the pattern f (independent standard normal values that
only the server's key gives), z = <u, f>. Whatever the leaked model is, as long as it was made
without knowledge of f, u does not depend on f and z is standard normal: the false-accusation rate
needs no assumption about innocent models. Every step on the way to u looks at the leaked model and
at c alone, never at a pattern, so it costs power at worst, never validity.

Source: Cox, Kilian, Leighton, Shamoon 1997 (correlation detector for Gaussian marks); Wu, Trappe,
Wang, Liu, "Collusion-resistant fingerprinting for multimedia", IEEE Signal Processing Magazine 21
(2004) (one mark a user, correlated after subtracting the host, against averaging).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from fedveil.defenses.fingerprint import Fingerprint
from fedveil.defenses.noise import root_mean_square
from fedveil.errors import FedveilError
from fedveil.federation.archive import Archive, Entry

Weights = Mapping[str, Tensor]

ALPHA = 1e-6
"""Chance to accuse anybody innocent, over all tests of one leaked model."""

_DECOYS = 2
_CLIP = 2.0


@dataclass(frozen=True)
class Lineup:
    """The clients that got one shared copy in one round, beside keys that nobody got.

    Attributes:
        round: The round, from 1.
        clients: Partitions of the clients.
        reference: float32 [n], the shared copy, its parameters in the fingerprint's order.
        scale: float32 [n], root mean square of each value's layer; 0 where it carries no mark.
        directions: float32 [m, n], differences to the round's other shared copies.
        patterns: float32 [clients + decoys, n], of the clients, then of keys nobody got.
        fingerprint: What the patterns are of.
        sizes: Number of values of each tensor.
    """

    round: int
    clients: tuple[int, ...]
    reference: Tensor
    scale: Tensor
    directions: Tensor
    patterns: Tensor
    fingerprint: Fingerprint
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Suspect:
    """What speaks against one client.

    Attributes:
        client: Its partition.
        z: The largest of its statistics.
        log10_p: Logarithm of the p-value of that z, corrected for all tests of the trace; at most
            0.
        rounds: Rounds whose copy of it is in the leak beyond doubt; empty where only all its
            rounds together are.
        scores: z of each round it took part in.
    """

    client: int
    z: float
    log10_p: float
    rounds: tuple[int, ...]
    scores: Mapping[int, float]


@dataclass(frozen=True)
class Trace:
    """The outcome for one leaked model.

    Attributes:
        suspects: All clients that were ever sent a copy, the most suspect first.
        alpha: Chance to name anybody innocent.
        tests: Number of tests that the p-values are corrected for.
        decoys: z of keys that nobody got; standard normal if all is well.
        values: How many values of the leaked model could be compared.
    """

    suspects: tuple[Suspect, ...]
    alpha: float
    tests: int
    decoys: tuple[float, ...]
    values: int

    @cached_property
    def named(self) -> tuple[int, ...]:
        """Partitions of the clients that the leak came from, ascending."""
        limit = math.log10(self.alpha)
        return tuple(sorted(s.client for s in self.suspects if s.log10_p <= limit))


def lineups(archive: Archive) -> Iterator[Lineup]:
    """Yield who was sent what, round by round, with what identifies each.

    Raises:
        FedveilError: No round of the archive carries fingerprints, or a file is damaged.
    """
    found = False
    for entry in archive:
        if entry.fingerprint:
            found = True
            yield from _of_round(entry, entry.fingerprint)
    if not found:
        raise FedveilError(
            f"the copies in {archive.folder} carry no fingerprints, so nothing tells one client's "
            "from another's; train with --fingerprint"
        )


def trace(leaked: Weights, among: Iterable[Lineup], *, alpha: float = ALPHA) -> Trace:
    """Name the clients whose copies a leaked model was made from.

    Clients are tested round by round, and those of several rounds once more by the sum of their z
    over the square root of their number. Bonferroni's correction over all these tests bounds the
    chance that anybody innocent is named.

    Args:
        leaked: State by name. Tensors of other names or sizes than the run's are left out, as are
            zeros (pruning made them) and what is not finite.
        among: What ``lineups`` yields.
        alpha: Chance to name anybody innocent, in (0, 1).

    Raises:
        FedveilError: No tensor of the leaked model fits the run's.
    """
    scores: dict[int, dict[int, float]] = {}
    decoys: list[float] = []
    values = 0
    for lineup in among:
        flat = _flat(leaked, lineup)
        values = max(values, int(flat.isfinite().sum()))
        z = (lineup.patterns @ direction(flat, lineup)).tolist()
        for client, score in zip(lineup.clients, z, strict=False):
            scores.setdefault(client, {})[lineup.round] = score
        decoys += z[len(lineup.clients) :]
    if not values:
        raise FedveilError(
            "no tensor of the leaked model has the name and size of one of the run's model; "
            "rename its tensors as the run's model.safetensors names them"
        )
    tests = sum(len(of) + (len(of) > 1) for of in scores.values())
    suspects = (_suspect(client, of, tests, alpha) for client, of in scores.items())
    ordered = sorted(suspects, key=lambda suspect: (-suspect.z, suspect.client))
    return Trace(tuple(ordered), alpha, tests, tuple(decoys), values)


def direction(leaked: Tensor, lineup: Lineup) -> Tensor:
    """Return the unit vector along which patterns are looked for.

    Args:
        leaked: float32 [n]; NaN where there is nothing to compare.
        lineup: Gives the reference.

    Returns:
        float32 [n]; all zeros where the leaked model is the reference itself.
    """
    kept = leaked.isfinite() & (leaked != 0) & (lineup.scale > 0)
    residual = torch.where(kept, (leaked - lineup.reference) / lineup.scale, 0.0)
    if len(lineup.directions):
        residual = _without(residual, torch.where(kept, lineup.directions / lineup.scale, 0.0))
    sizes = list(lineup.sizes)
    parts = zip(residual.split(sizes), kept.split(sizes), strict=True)
    whitened = torch.cat([_whitened(part, mask) for part, mask in parts])
    norm = whitened.norm()
    return whitened / norm if norm > 0 else whitened


def log10_p(z: float) -> float:
    """Return the logarithm of the one-sided p-value of a standard normal z."""
    return float(torch.special.log_ndtr(torch.tensor(-z, dtype=torch.float64))) / math.log(10)


def _of_round(entry: Entry, fingerprint: Fingerprint) -> Iterator[Lineup]:
    flat = [torch.cat([c[n].float().reshape(-1) for n in fingerprint.names]) for c in entry.copies]
    receivers = sorted((copy, client) for client, copy in entry.assignment.items())
    for copy, group in groupby(receivers, key=lambda item: item[0]):
        clients = tuple(client for _, client in group)
        weights = entry.copies[copy]
        # No client has a number below 0.
        everyone = [*clients, *(-1 - len(flat) * i - copy for i in range(_DECOYS))]
        patterns = [
            fingerprint.pattern(len(flat[copy]), round_number=entry.round, client=client)
            for client in everyone
        ]
        others = [other - flat[copy] for i, other in enumerate(flat) if i != copy]
        yield Lineup(
            round=entry.round,
            clients=clients,
            reference=flat[copy],
            scale=_scales(weights, fingerprint.layers),
            directions=torch.stack(others) if others else torch.empty(0, len(flat[copy])),
            patterns=torch.stack(patterns),
            fingerprint=fingerprint,
            sizes=tuple(weights[name].numel() for name in fingerprint.names),
        )


def _scales(weights: Weights, layers: Sequence[Sequence[str]]) -> Tensor:
    return torch.cat(
        [
            torch.full((weights[name].numel(),), root_mean_square(weights, layer))
            for layer in layers
            for name in layer
        ]
    )


def _flat(leaked: Weights, lineup: Lineup) -> Tensor:
    parts = []
    for name, size in zip(lineup.fingerprint.names, lineup.sizes, strict=True):
        value = leaked.get(name)
        if value is None or value.numel() != size:
            value = torch.full((size,), math.nan)
        parts.append(value.float().reshape(-1))
    return torch.cat(parts)


def _without(residual: Tensor, directions: Tensor) -> Tensor:
    """Return the part of ``residual`` that is orthogonal to all ``directions``."""
    unit = directions.double()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    gram = unit @ unit.T
    share = torch.linalg.lstsq(gram, (unit @ residual.double())[:, None]).solution[:, 0]
    rest: Tensor = residual.double() - share @ unit
    return rest.float()


def _whitened(values: Tensor, kept: Tensor) -> Tensor:
    """Clip at twice the median size, which fine-tuning's few large steps pass, and whiten."""
    if not kept.any():
        return values
    bound = _CLIP * values[kept].abs().median()
    clipped = values.clamp(-bound, bound)
    square = clipped.square().sum() / kept.sum()
    return clipped / square if square > 0 else clipped


def _suspect(client: int, scores: Mapping[int, float], tests: int, alpha: float) -> Suspect:
    together = sum(scores.values()) / math.sqrt(len(scores))
    z = max(together, *scores.values())
    rounds = [r for r, score in scores.items() if _corrected(score, tests) <= math.log10(alpha)]
    return Suspect(client, z, _corrected(z, tests), tuple(sorted(rounds)), dict(scores))


def _corrected(z: float, tests: int) -> float:
    return min(0.0, log10_p(z) + math.log10(tests))
