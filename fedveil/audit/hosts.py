"""What a server sent in all rounds, before fingerprints: what a leaked model is explained by.

A coalition averages copies of different rounds, which training and noise have driven apart, and
next to that drift its fingerprints are small. Every mean of shared copies lies in their affine
span, so what is left of a leak after its projection on that span is fingerprints and damage.

Source: Cox, Miller, Bloom, Fridrich, Kalker, "Digital Watermarking and Steganography", 2nd edition,
2007, section 3.2 (informed detection: the *host* signal is known, and subtracted).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fedveil.audit.align import mean_state
from fedveil.copies.noise import root_mean_square
from fedveil.errors import FedveilError
from fedveil.runs.archive import Archive, Entry
from fedveil.types import Weights

_FLOATS = 1 << 26
_MOST_COPIES = 1_024
_LEAST_VALUES = 16  # to each direction, or its share would be fitted to noise
_COARSE = 4
_COARSE_FROM = 256  # values to each direction
_RIDGE = 1e-10


@dataclass(frozen=True)
class Hosts:
    """The affine span of a run's shared copies.

    All values are in units of the root mean square of their layer in the last round's base, and in
    the fingerprint's order. Shares are fitted to as many values, evenly spaced in each tensor, as
    ``floats`` allows; of more than 1,024 copies, or more than a sixteenth of the values, those of
    evenly spaced rounds are taken. Both cost power, never validity: neither looks at a fingerprint.

    Attributes:
        archive: Of the run.
        rounds: Whose copies are taken.
        tensors: Name and number of values of each parameter.
        unit: float32 [n], one over the root mean square of each value's layer; 0 where that is 0.
        origin: float32 [n], the first copy.
        every: Shares are fitted to every so manieth value of each tensor, s in all.
        directions: float32 [m, s], differences of successive copies at those values.
        bases: Means of the copies of the last, the middle and the first round, by name in the order
            of ``tensors``.
        named: float32 [k, n], fingerprints that were found, the last k of the directions.
    """

    archive: Archive = field(repr=False)
    rounds: tuple[int, ...]
    tensors: tuple[tuple[str, int], ...]
    unit: Tensor
    origin: Tensor
    every: int
    directions: Tensor
    bases: tuple[Weights, ...]
    named: Tensor

    @classmethod
    def of(cls, archive: Archive, *, floats: int = _FLOATS) -> "Hosts":
        """Read what was sent in all rounds that carry fingerprints.

        Args:
            archive: Of the run.
            floats: How many values of directions are held in memory, about; 2^26 are 256 MiB.

        Raises:
            FedveilError: No round of the archive carries fingerprints, or a file is damaged.
        """
        last, counts = _marked(archive)
        mark = last.fingerprint
        assert mark is not None
        tensors = tuple((name, last.copies[0][name].numel()) for name in mark.names)
        sizes = [size for _, size in tensors]
        copies_taken = max(1, min(_MOST_COPIES, sum(sizes) // _LEAST_VALUES))
        # The last round is always among them.
        rounds = tuple(counts)[::-1][:: -(-sum(counts.values()) // copies_taken)][::-1]
        directions = sum(counts[number] for number in rounds) - 1
        most = max(floats // max(1, directions), _LEAST_VALUES * directions)
        every = math.ceil(sum(sizes) / most)
        bases = tuple(
            mean_state(archive.read(number).copies, mark.names)
            for number in dict.fromkeys((rounds[-1], rounds[len(rounds) // 2], rounds[0]))
        )
        unit = _units(bases[0], mark.layers)
        copies = _copies(archive, rounds, mark.names, unit)
        origin = next(copies)
        rows = [_thinned(copy, sizes, every) for copy in itertools.chain([origin], copies)]
        moves = torch.stack(rows).diff(dim=0)
        none = torch.empty(0, len(origin))
        return cls(archive, rounds, tensors, unit, origin, every, moves, bases, none)

    def beside(self, named: Tensor) -> "Hosts":
        """Return what explains a leaked model once fingerprints were found in it.

        Args:
            named: float32 [k, n], the fingerprints, beside those found before.
        """
        directions = torch.cat([self.directions, torch.stack([*map(self.thinned, named)])])
        return replace(self, directions=directions, named=torch.cat([self.named, named]))

    @property
    def sizes(self) -> list[int]:
        """Number of values of each parameter."""
        return [size for _, size in self.tensors]

    @cached_property
    def coarse(self) -> "Hosts":
        """The same with every fourth value fitted, where those are enough: for a first fit."""
        step = _COARSE if self.directions.shape[1] >= _COARSE_FROM * len(self.directions) else 1
        lengths = [-(-size // self.every) for size in self.sizes]
        parts = [part[:, ::step] for part in torch.split(self.directions, lengths, dim=1)]
        return replace(self, every=step * self.every, directions=torch.cat(parts, dim=1))

    def values_of(self, state: Weights) -> Tensor:
        """Return a state's values in these units, float32 [n].

        They are 0 where a tensor is missing or has another size, and where one is not finite.
        """
        parts = []
        for name, size in self.tensors:
            value = state.get(name)
            if value is None or value.numel() != size:
                value = torch.zeros(size)
            parts.append(value.detach().float().reshape(-1))
        return torch.nan_to_num(torch.cat(parts) * self.unit, nan=0.0, posinf=0.0, neginf=0.0)

    def state_of(self, values: Tensor) -> dict[str, Tensor]:
        """Return [n] values in these units as a state in the shapes of the run's."""
        parts = torch.split(values, self.sizes)
        units = torch.split(self.unit, self.sizes)
        return {
            name: (part / unit.clamp_min(torch.finfo().tiny)).reshape(self.bases[0][name].shape)
            for (name, _), part, unit in zip(self.tensors, parts, units, strict=True)
        }

    def thinned(self, values: Tensor) -> Tensor:
        """Return those of [n] values to which shares are fitted, [s]."""
        return _thinned(values, self.sizes, self.every)

    def combined(self, shares: Tensor) -> Tensor:
        """Return the origin and so much of each direction, float32 [n].

        Raises:
            FedveilError: A file of the archive is damaged by now.
        """
        if self.every == 1:
            return self.origin + shares @ self.directions
        moves, found = torch.split(shares, [len(shares) - len(self.named), len(self.named)])
        total = found @ self.named
        ends = torch.cat([torch.ones(1), moves, torch.zeros(1)])
        names = [name for name, _ in self.tensors]
        copies = _copies(self.archive, self.rounds, names, self.unit)
        for weight, copy in zip(ends[:-1] - ends[1:], copies, strict=True):
            total += weight * copy
        return total

    def step(self, score: Tensor, information: Tensor) -> Tensor:
        """Return the step of Fisher scoring in the shares, float32 [m].

        Args:
            score: float32 [s], derivative of the log-likelihood by each fitted value's host.
            information: float32 [s], what each tells of its host; at least 0.
        """
        if not len(self.directions):
            return torch.empty(0)
        gram = ((self.directions * information) @ self.directions.T).double()
        size = gram.diagonal().clamp_min(torch.finfo().tiny).rsqrt()
        scaled = gram * size * size[:, None] + _RIDGE * torch.eye(len(gram), dtype=gram.dtype)
        right = (self.directions @ score).double() * size
        shares: Tensor = torch.linalg.solve(scaled, right) * size
        return shares.float()


def _marked(archive: Archive) -> tuple[Entry, dict[int, int]]:
    """Return the last round with fingerprints, and the number of copies of each such round."""
    last: Entry | None = None
    counts = {}
    for entry in archive:
        if entry.fingerprint:
            last, counts[entry.round] = entry, len(entry.copies)
    if last is None:
        raise FedveilError(
            f"the copies in {archive.folder} carry no fingerprints, so nothing tells one client's "
            "from another's; train with --fingerprint"
        )
    return last, counts


def _copies(
    archive: Archive, rounds: Sequence[int], names: Sequence[str], unit: Tensor
) -> Iterator[Tensor]:
    for number in rounds:
        for copy in archive.read(number).copies:
            yield torch.cat([copy[name].float().reshape(-1) for name in names]) * unit


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


def _thinned(values: Tensor, sizes: list[int], every: int) -> Tensor:
    if every == 1:
        return values
    return torch.cat([part[::every] for part in torch.split(values, sizes)])
