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
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from fedveil.audit.align import aligned, mean_state
from fedveil.audit.leaked_names import as_in_the_run, shared_values
from fedveil.audit.settings import TraceSettings
from fedveil.copies.fingerprint import Fingerprint
from fedveil.copies.noise import root_mean_square
from fedveil.errors import FedveilError
from fedveil.files import json_bytes, write_atomically
from fedveil.progress import ProgressBars
from fedveil.runs.archive import Archive, Entry
from fedveil.runs.directory import RunDirectory, origin
from fedveil.runs.secrets import MODEL
from fedveil.runs.state_files import read_state
from fedveil.types import Weights
from fedveil.wording import quantity

ALPHA = TraceSettings().alpha
"""Chance to accuse anybody innocent, over all tests of one leaked model."""

_DECOYS = 2  # keys that nobody got, a lineup
_CLIP = 2.0
_MEDIAN_OF = 4_096
_UNNAMED_SHOWN = 3
_LEAST = -99  # a smaller power of ten is printed as this
# Training, pruning or quantising w moves it by more than this part of a layer's root mean square.
_SAME = 1e-3
_MOST = 0.9  # of a model's values
_PART = (
    "Only {:.0%} of the values of the run's model have a counterpart of the same name and shape in "
    "this file: of the others nothing is told, and who is not named is not cleared by them."
)
_IS_W = (
    "The file is w itself, which no client was ever sent: look for the leak at the server, or at "
    "the party w was delivered to."
)
_NOTHING = (
    "No copy of this run is found in it: it is another model, or one in which training, "
    "distillation or a rearrangement of its neurons has left nothing of the copies' values."
)


@dataclass(frozen=True)
class Lineup:
    """The clients that got one shared copy in one round, beside keys that nobody got.

    Attributes:
        round: The round, from 1.
        clients: Partitions of the clients.
        reference: float32 [n], the shared copy, its parameters in the fingerprint's order.
        unit: float32 [n], one over the root mean square of each value's layer; 0 where that is 0.
        directions: float32 [m, n], differences to the round's other shared copies, times ``unit``.
        patterns: float32 [clients + decoys, n], of the clients, then of keys nobody got.
        tensors: Name and number of values of each parameter.
        base: Mean of the round's shared copies, by name in the order of ``tensors``.
    """

    round: int
    clients: tuple[int, ...]
    reference: Tensor
    unit: Tensor
    directions: Tensor
    patterns: Tensor
    tensors: tuple[tuple[str, int], ...]
    base: Weights


@dataclass(frozen=True)
class LeakedValues:
    """The comparable values of a leaked model, in the order of a lineup.

    Attributes:
        values: float32 [n]; 0 where there is nothing to compare.
        kept: bool [n], where there is; ``None``: everywhere.
    """

    values: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, leaked: Weights, tensors: Sequence[tuple[str, int]]) -> "LeakedValues":
        """Take what can be compared: finite values other than 0 in tensors of the right size."""
        parts = []
        for name, size in tensors:
            value = leaked.get(name)
            if value is None or value.numel() != size:
                value = torch.zeros(size)
            parts.append(value.detach().float().reshape(-1))
        values = torch.nan_to_num(torch.cat(parts), nan=0.0, posinf=0.0, neginf=0.0)
        kept = values != 0
        return cls(values, None if kept.all() else kept)


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

    def as_json(self) -> dict[str, Any]:
        """Return the trace as plain values."""
        return {
            "named": list(self.named),
            "alpha": self.alpha,
            "tests": self.tests,
            "values_compared": self.values,
            "decoys": _spread(self.decoys),
            "clients": [_described(suspect) for suspect in self.suspects],
            **origin(),
        }

    def table(self, *, is_w: bool) -> str:
        """Return the trace as lines of text: who is named, and on what grounds."""
        named = [s for s in self.suspects if s.client in self.named]
        others = [s for s in self.suspects if s.client not in self.named]
        decoys = _spread(self.decoys)
        lines = [
            f"{'client':>8}{'z':>9}{'p':>11}  {'verdict':9}rounds of the copies in the leak",
            *(_line(suspect, "named") for suspect in named),
            *(_line(suspect, "not named") for suspect in others[:_UNNAMED_SHOWN]),
            f"{len(named)} of {quantity(len(self.suspects), 'client')} named. The chance to name "
            f"anybody innocent is at most {self.alpha:g} ({quantity(self.tests, 'test')}). "
            f"Keys that nobody got: {decoys['keys']}, "
            f"z {decoys['mean']:+.2f} ± {decoys['sd']:.2f}, at most {decoys['max']:.1f}.",
        ]
        if is_w:
            lines.append(_IS_W)
        elif not named:
            lines.append(_NOTHING)
        return "\n".join(lines)


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
    over the square root of their number. Before each comparison the leaked model's hidden units are
    put into the order and the scale of the round's base, which no pattern has a part in.
    Bonferroni's correction over all these tests bounds the
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
    leak: LeakedValues | None = None
    for lineup in among:
        leak = LeakedValues.of(aligned(leaked, lineup.base), lineup.tensors)
        z = (lineup.patterns @ direction(leak, lineup)).tolist()
        for client, score in zip(lineup.clients, z, strict=False):
            scores.setdefault(client, {})[lineup.round] = score
        decoys += z[len(lineup.clients) :]
    values = 0 if leak is None else int(torch.count_nonzero(leak.values))
    if not values:
        raise FedveilError(
            "no tensor of the leaked model has the name and size of one of the run's model; "
            "rename its tensors as the run's model.safetensors names them"
        )
    tests = sum(len(of) + (len(of) > 1) for of in scores.values())
    suspects = (_suspect(client, of, tests, alpha) for client, of in scores.items())
    ordered = sorted(suspects, key=lambda suspect: (-suspect.z, suspect.client))
    return Trace(tuple(ordered), alpha, tests, tuple(decoys), values)


def direction(leak: LeakedValues, lineup: Lineup) -> Tensor:
    """Return the unit vector along which patterns are looked for.

    Returns:
        float32 [n]; all zeros where the leaked model is the reference itself.
    """
    kept, directions = leak.kept, lineup.directions
    residual = (leak.values - lineup.reference) * lineup.unit
    if kept is not None:
        residual, directions = residual * kept, directions * kept
    if len(directions):
        residual = _without(residual, directions)
    sizes = [size for _, size in lineup.tensors]
    masks = [None] * len(sizes) if kept is None else torch.split(kept, sizes)
    parts = zip(torch.split(residual, sizes), masks, strict=True)
    whitened = torch.cat([_whitened(part, mask) for part, mask in parts])
    norm = whitened.norm()
    return whitened / norm if norm > 0 else whitened


def log10_p(z: float) -> float:
    """Return the logarithm of the one-sided p-value of a standard normal z."""
    return float(torch.special.log_ndtr(torch.tensor(-z, dtype=torch.float64))) / math.log(10)


def _of_round(entry: Entry, fingerprint: Fingerprint) -> Iterator[Lineup]:
    flat = [torch.cat([c[n].float().reshape(-1) for n in fingerprint.names]) for c in entry.copies]
    base = mean_state(entry.copies, fingerprint.names)
    receivers = sorted((copy, client) for client, copy in entry.assignment.items())
    for copy, group in groupby(receivers, key=lambda item: item[0]):
        clients = tuple(client for _, client in group)
        # No client has a number below 0.
        everyone = [*clients, *(-1 - len(flat) * i - copy for i in range(_DECOYS))]
        patterns = [
            fingerprint.pattern(len(flat[copy]), round_number=entry.round, client=client)
            for client in everyone
        ]
        unit = _units(entry.copies[copy], fingerprint.layers)
        others = [(other - flat[copy]) * unit for i, other in enumerate(flat) if i != copy]
        yield Lineup(
            round=entry.round,
            clients=clients,
            reference=flat[copy],
            unit=unit,
            directions=torch.stack(others) if others else torch.empty(0, len(unit)),
            patterns=torch.stack(patterns),
            tensors=tuple((name, entry.copies[copy][name].numel()) for name in fingerprint.names),
            base=base,
        )


def _units(weights: Weights, layers: Sequence[Sequence[str]]) -> Tensor:
    """Return one over the root mean square of the layer each value belongs to, or 0."""
    sizes = [(root_mean_square(weights, layer), layer) for layer in layers]
    return torch.cat(
        [
            torch.full((weights[name].numel(),), 1 / size if size else 0.0)
            for size, layer in sizes
            for name in layer
        ]
    )


def _without(residual: Tensor, directions: Tensor) -> Tensor:
    """Return the part of ``residual`` that is orthogonal to all ``directions``."""
    unit = torch.nn.functional.normalize(directions)
    share = torch.linalg.lstsq(unit @ unit.T, (unit @ residual)[:, None]).solution[:, 0]
    rest: Tensor = residual - share @ unit
    return rest


def _whitened(values: Tensor, kept: Tensor | None) -> Tensor:
    """Clip at twice the median size, which fine-tuning's few large steps pass, and whiten."""
    compared = values if kept is None else values[kept]
    if not len(compared):
        return values
    # Some thousands tell the median of a large tensor well enough.
    stride = -(-len(compared) // _MEDIAN_OF)
    bound = float(_CLIP * compared[::stride].abs().median())
    clipped = values.clamp(-bound, bound)
    square = float(clipped.square().sum()) / len(compared)
    return clipped / square if square > 0 else clipped


def _suspect(client: int, scores: Mapping[int, float], tests: int, alpha: float) -> Suspect:
    together = sum(scores.values()) / math.sqrt(len(scores))
    z = max(together, *scores.values())
    rounds = [r for r, score in scores.items() if _corrected(score, tests) <= math.log10(alpha)]
    return Suspect(client, z, _corrected(z, tests), tuple(sorted(rounds)), dict(scores))


def _corrected(z: float, tests: int) -> float:
    return min(0.0, log10_p(z) + math.log10(tests))


def run_trace(leaked: Path, run: Path, settings: TraceSettings, *, out: Path | None) -> str:
    """Trace a leaked file and return what to tell the user.

    Args:
        leaked: File of the leaked model's tensors.
        run: Directory of the run it may have come from.
        settings: How surely whoever is named is named.
        out: JSON file to write; ``None``: none.

    Raises:
        FedveilError: A file is missing, damaged or does not fit, or copies carry no fingerprints.
    """
    state = read_state(leaked, option="LEAKED")
    directory = RunDirectory.open(run)
    archive = Archive.open(directory.path, directory.noise_key())
    sent = archive.read(archive.rounds[0]).copies[0]
    state = as_in_the_run(state, sent)
    found = trace(state, _watched(archive), alpha=settings.alpha)
    compared = shared_values(state, sent)
    is_w = _is_delivered(state, directory)
    if out:
        described = {"leaked": str(leaked), "run": str(run), **found.as_json(), "is_w": is_w}
        described["compared"] = compared
        try:
            write_atomically(out, json_bytes(described), mode=0o600)
        except OSError as error:
            raise FedveilError(f"--out {out}: {error.strerror}") from None
    told = found.table(is_w=is_w)
    return told if compared > _MOST else f"{told}\n{_PART.format(compared)}"


def _line(suspect: Suspect, verdict: str) -> str:
    rounds = ", ".join(map(str, suspect.rounds))
    if verdict == "named" and not rounds:
        rounds = "all together"
    return (
        f"{suspect.client:>8}{suspect.z:>9.1f}{_power(suspect):>11}  {verdict:9} {rounds}".rstrip()
    )


def _power(suspect: Suspect) -> str:
    exponent = suspect.log10_p
    if exponent < _LEAST:
        return f"<1e{_LEAST}"
    return f"{10**exponent:.2g}" if exponent > -4 else f"1e{math.floor(exponent)}"


def _described(suspect: Suspect) -> dict[str, Any]:
    return {
        "client": suspect.client,
        "rounds": list(suspect.rounds),
        "z": suspect.z,
        "p": 10**suspect.log10_p,
        "log10_p": suspect.log10_p,
        "scores": {str(number): score for number, score in sorted(suspect.scores.items())},
    }


def _spread(z: Sequence[float]) -> dict[str, float]:
    return {"keys": len(z), "mean": fmean(z), "sd": stdev(z), "max": max(z)}


def _watched(archive: Archive) -> Iterator[Lineup]:
    with ProgressBars(transient=True) as bars:
        for lineup in lineups(archive):
            bars.begin("rounds", archive.rounds.index(lineup.round), len(archive.rounds), "")
            yield lineup


def _is_delivered(state: Weights, run: RunDirectory) -> bool:
    if not run.secrets.path(MODEL).is_file():
        return False
    delivered = run.model()
    common = [
        (state[name].float(), value)
        for name, value in delivered.items()
        if name in state and state[name].shape == value.shape and value.is_floating_point()
    ]
    # What a part of w is, a part of a copy may be, too.
    return shared_values(state, delivered) > _MOST and all(_close(a, b) for a, b in common)


def _close(value: Tensor, wanted: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(value - wanted) <= _SAME * wanted.norm())
