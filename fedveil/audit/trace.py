"""Which clients a leaked model came from, by the fingerprints in the copies they were sent.

The test. ``residual`` explains the leaked model by the shared copies of all rounds and returns a
unit vector u of what is left. For a client k of round r with the pattern f (independent standard
normal values that only the server's key gives), z = <u, f>. Whatever the leaked model is, as long
as it was made without knowledge of f, and u from it and from copies without f, z is standard
normal: the false-accusation rate needs no assumption about innocent models.

Why all rounds may be used. Copies up to round r are independent of its f. Later ones are not quite:
fingerprints leave the mean of what clients return, but training from a fingerprinted copy undoes a
little of it, so the base of round r + 1 is d = e - b f for some b >= 0, with e free of f. The
projection off d takes the multiple of d that is in the leak out, and with it puts b f back: by
t b |f|, if t is how far the leak lies along e for each unit that it lies off d. Had training undone
nothing, or did the leak come from d itself, as w and later copies do, that would be 0. It is
measured: z of each fingerprint along its own round's d is -b |f| / |d| on average, and every z is
lowered by that mean, which covers t <= 1; one client's own update is about as far along the sum of
ten as off it.

Why several passes may be used. Once a client is named, its fingerprints explain the leak as copies
do. For an innocent k, suppose it were never named: then the others' passes, and u in each, do not
depend on its f. With that k named falsely in pass s has probability alpha 2^-s / tests a test, and
the sum over passes is below alpha.

Source: Cox, Kilian, Leighton, Shamoon 1997 (correlation detector for Gaussian marks); Wu, Trappe,
Wang, Liu, "Collusion-resistant fingerprinting for multimedia", IEEE Signal Processing Magazine 21
(2004) (one mark a user, correlated after subtracting the host, against averaging); Verdu,
"Multiuser Detection", 1998, section 7.1 (successive cancellation: who is found is subtracted).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from fedveil.audit.align import aligned, mean_state
from fedveil.audit.hosts import Hosts
from fedveil.audit.leaked_names import as_in_the_run, shared_values
from fedveil.audit.residual import residual
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
_UNNAMED_SHOWN = 3
_LEAST = -99  # a smaller power of ten is printed as this
# Training, pruning or quantising w moves it by more than this part of a layer's root mean square.
_SAME = 1e-3
_TINY = 1e-12
_MOST = 0.9  # of a model's values
_OF_THE_RUN = 0.25  # of their variance; shares fitted to noise explain a sixteenth at most
_PART = (
    "Only {:.0%} of the values of the run's model have a counterpart of the same name and shape in "
    "this file: of the others nothing is told, and who is not named is not cleared by them."
)
_IS_W = (
    "The file is w itself, which no client was ever sent: look for the leak at the server, or at "
    "the party w was delivered to."
)
_NOTHING = (
    "No copy of this run is found in it, which clears nobody: it is another model, or one in which "
    "training, distillation, rounding or a rearrangement of its neurons has left nothing of the "
    "copies' values."
)
_WHOSE = (
    "What this run sent to all explains {:.0%} of its values' variance: it was made from models of "
    "this run, or from the weights that they began with. Whose copy it was CANNOT BE TOLD, and "
    "nobody is cleared: w of any round, and the mean of many copies after damage, show no "
    "fingerprint."
)


@dataclass(frozen=True)
class Lineup:
    """The clients that got one shared copy in one round, beside keys that nobody got.

    Attributes:
        round: The round, from 1.
        clients: Partitions of the clients.
        patterns: float32 [clients + decoys, n], of the clients, then of keys nobody got.
        moved: z of each client along what its round moved the base by; empty for the last round.
    """

    round: int
    clients: tuple[int, ...]
    patterns: Tensor
    moved: tuple[float, ...]


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

    def named_at(self, alpha: float) -> bool:
        """Whether it is named where anybody innocent is with this chance at most."""
        return self.log10_p <= math.log10(alpha)


@dataclass(frozen=True)
class Trace:
    """The outcome for one leaked model.

    Attributes:
        suspects: All clients that were ever sent a copy, the most suspect first.
        alpha: Chance to name anybody innocent.
        tests: Number of tests that the p-values are corrected for.
        decoys: z of keys that nobody got; standard normal if all is well.
        values: How many values of the leaked model could be compared.
        compared: Share of the run's fingerprinted values that are of a tensor the leaked model has.
        explained: Share of their variance that the run's copies without fingerprints explain.
    """

    suspects: tuple[Suspect, ...]
    alpha: float
    tests: int
    decoys: tuple[float, ...]
    values: int
    compared: float
    explained: float

    @cached_property
    def named(self) -> tuple[int, ...]:
        """Partitions of the clients that the leak came from, ascending."""
        return tuple(sorted(s.client for s in self.suspects if s.named_at(self.alpha)))

    def as_json(self) -> dict[str, Any]:
        """Return the trace as plain values."""
        return {
            "named": list(self.named),
            "alpha": self.alpha,
            "tests": self.tests,
            "values_compared": self.values,
            "compared": self.compared,
            "explained": self.explained,
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
            told = self.explained > _OF_THE_RUN
            lines.append(_WHOSE.format(self.explained) if told else _NOTHING)
        if self.compared <= _MOST:
            lines.append(_PART.format(self.compared))
        return "\n".join(lines)


@dataclass(frozen=True)
class Lineups:
    """Who was sent a copy, round by round, with what identifies each; read anew each time.

    Attributes:
        archive: Of the run.
        on_round: Called as ``on_round("rounds", rounds read, rounds in all)``.
    """

    archive: Archive
    on_round: Callable[[str, int, int], None] | None = None

    def __iter__(self) -> Iterator[Lineup]:
        """Yield the rounds that carry fingerprints; raises FedveilError at a damaged file."""
        rounds = len(self.archive.rounds)
        ahead = itertools.pairwise(itertools.chain(self.archive, [None]))
        for number, (entry, following) in enumerate(ahead):
            if self.on_round:
                self.on_round("rounds", number, rounds)
            if entry and entry.fingerprint:
                yield from _of_round(entry, entry.fingerprint, following)


def trace(leaked: Weights, hosts: Hosts, among: Iterable[Lineup], *, alpha: float = ALPHA) -> Trace:
    """Name the clients whose copies a leaked model was made from.

    Clients are tested round by round, and those of several rounds once more by the sum of their z
    over the square root of their number. The fingerprints of those who are named are then part of
    what explains the leak, and the others are tested again with what is left, until nobody else is
    named. Bonferroni's correction over all tests of a pass, and 1/2, 1/4, … of ``alpha`` for the
    passes bound the chance that anybody innocent is named.

    Args:
        leaked: State by name. Tensors of other names or sizes than the run's are left out, and
            what is not finite.
        hosts: What the run sent.
        among: Who was sent it; not an iterator, since each pass goes through it.
        alpha: Chance to name anybody innocent, in (0, 1).

    Raises:
        FedveilError: No tensor of the leaked model fits the run's, or a file is damaged.
    """
    named: dict[int, Suspect] = {}
    first = left = residual(leaked, hosts)
    if not left.values:
        raise FedveilError(
            "no tensor of the leaked model has the name and size of one of the run's model and a "
            "value that is finite and not 0; rename its tensors as the run's model.safetensors "
            "names them"
        )
    for number in itertools.count(1):
        suspects, decoys, tests = _tested(left.direction, among, alpha, number)
        found = {s.client: s for s in suspects if s.named_at(alpha) and s.client not in named}
        named |= found
        if not found or len(named) == len(suspects):
            break
        hosts = hosts.beside(_patterns(among, found))
        left = residual(leaked, hosts)
    final = [named.get(suspect.client, suspect) for suspect in suspects]
    ordered = sorted(final, key=lambda suspect: (-suspect.z, suspect.client))
    return Trace(
        tuple(ordered), alpha, tests, decoys, first.values, first.compared, first.explained
    )


def _tested(
    direction: Tensor, among: Iterable[Lineup], alpha: float, number: int
) -> tuple[list[Suspect], tuple[float, ...], int]:
    """Return what speaks against each client along a direction, decoys' z, and how many tests."""
    scores: dict[int, dict[int, float]] = {}
    decoys: list[float] = []
    moved: list[float] = []
    for lineup in among:
        z = (lineup.patterns @ direction).tolist()
        for client, score in zip(lineup.clients, z, strict=False):
            scores.setdefault(client, {})[lineup.round] = score
        decoys += z[len(lineup.clients) :]
        moved += lineup.moved
    undone = max(0.0, -fmean(moved)) if moved else 0.0
    tests = sum(len(of) + (len(of) > 1) for of in scores.values())
    suspects = [
        _suspect(client, {r: z - undone for r, z in of.items()}, tests * 2**number, alpha)
        for client, of in scores.items()
    ]
    return suspects, tuple(decoys), tests


def _patterns(among: Iterable[Lineup], found: Mapping[int, Suspect]) -> Tensor:
    """Return the fingerprints that speak against those who were found, float32 [k, n]."""
    return torch.stack(
        [
            pattern
            for lineup in among
            for client, pattern in zip(lineup.clients, lineup.patterns, strict=False)
            if client in found and lineup.round in (found[client].rounds or found[client].scores)
        ]
    )


def log10_p(z: float) -> float:
    """Return the logarithm of the one-sided p-value of a standard normal z."""
    return float(torch.special.log_ndtr(torch.tensor(-z, dtype=torch.float64))) / math.log(10)


def _of_round(entry: Entry, fingerprint: Fingerprint, following: Entry | None) -> Iterator[Lineup]:
    moved = _moved(entry, following, fingerprint) if following else None
    count = sum(entry.copies[0][name].numel() for name in fingerprint.names)
    receivers = sorted((copy, client) for client, copy in entry.assignment.items())
    for copy, group in groupby(receivers, key=lambda item: item[0]):
        clients = tuple(client for _, client in group)
        # No client has a number below 0.
        everyone = [*clients, *(-1 - len(entry.copies) * i - copy for i in range(_DECOYS))]
        patterns = [
            fingerprint.pattern(count, round_number=entry.round, client=client)
            for client in everyone
        ]
        stacked = torch.stack(patterns)
        along = () if moved is None else (stacked[: len(clients)] @ moved).tolist()
        yield Lineup(entry.round, clients, stacked, tuple(along))


def _moved(entry: Entry, following: Entry, fingerprint: Fingerprint) -> Tensor:
    """Return the direction from a round's base to the next one's, each layer by its size."""
    before, after = (mean_state(of.copies, fingerprint.names) for of in (entry, following))
    parts = [
        (after[name] - before[name]).flatten() / max(_TINY, root_mean_square(before, layer))
        for layer in fingerprint.layers
        for name in layer
    ]
    return torch.nn.functional.normalize(torch.cat(parts), dim=0).float()


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
    hosts = Hosts.of(archive)
    with ProgressBars(transient=True) as bars:
        lineups = Lineups(archive, bars)
        found = trace(state, hosts, lineups, alpha=settings.alpha)
    is_w = _is_delivered(state, directory, [name for name, _ in hosts.tensors])
    if out:
        described = {"leaked": str(leaked), "run": str(run), **found.as_json(), "is_w": is_w}
        try:
            write_atomically(out, json_bytes(described), mode=0o600)
        except OSError as error:
            raise FedveilError(f"--out {out}: {error.strerror}") from None
    return found.table(is_w=is_w)


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


def _is_delivered(state: Weights, run: RunDirectory, names: Sequence[str]) -> bool:
    """Whether a state is w, whatever the order and the scale of its hidden units are."""
    if not run.secrets.path(MODEL).is_file():
        return False
    whole = run.model()
    delivered = {name: whole[name] for name in names if name in whole}
    # What a part of w is, a part of a copy may be, too.
    return any(
        shared_values(own, delivered) > _MOST
        and all(
            _close(own[name].float(), value)
            for name, value in delivered.items()
            if name in own and own[name].shape == value.shape
        )
        for own in (state, aligned(state, delivered))
    )


def _close(value: Tensor, wanted: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(value - wanted) <= _SAME * wanted.norm())
