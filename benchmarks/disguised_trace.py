r"""Tracing copies whose hidden units were permuted and rescaled, alone and averaged.

Runs as of ``benchmarks/zero_labels.py``. Leaks: the last round's copies of three clients of each
run, and averages of the last copies of several, disguised after averaging and treatment; the single
ones also without alignment. Innocents: copies of the other runs, treated and disguised alike.

    python benchmarks/disguised_trace.py --run runs/delta0 --run runs/delta1 --run runs/delta2 \
        --innocents 38 --out docs/results
"""

import argparse
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from written import write_result

from fedveil.attacks.theft.observation import mean_of
from fedveil.audit.hosts import Hosts
from fedveil.audit.trace import Lineup, Lineups, Trace, trace
from fedveil.federation.server_app import load_job
from fedveil.runs.archive import Archive, Entry
from fedveil.runs.directory import RunDirectory
from fedveil.studies.trace import Disguiser, pruned, quantised

LAYERS = ("body.0", "body.3", "hidden", "output")
ALONE = 3
State = dict[str, Tensor]


def disguised(state: Mapping[str, Tensor], seed: int, *, permute: bool, rescale: bool) -> State:
    """Return the same function of the same shape, its hidden units moved and scaled."""
    generator, state = torch.Generator().manual_seed(seed), dict(state)
    for layer, after in itertools.pairwise(LAYERS):
        units = len(state[f"{layer}.weight"])
        order = torch.randperm(units, generator=generator) if permute else torch.arange(units)
        scale = torch.exp(torch.randn(units, generator=generator) * rescale)
        for kind in ("weight", "bias"):
            own = state[f"{layer}.{kind}"][order]
            state[f"{layer}.{kind}"] = own * scale.reshape(-1, *[1] * (own.ndim - 1))
        fed = state[f"{after}.weight"]
        grouped = fed.reshape(len(fed), units, -1)[:, order] / scale[:, None]
        state[f"{after}.weight"] = grouped.reshape(fed.shape)
    return state


Treatment = Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]]


def treatments(thief: Disguiser) -> dict[str, Treatment]:
    """Return what is done to a leaked model, by name."""

    def tuned(state: Mapping[str, Tensor], seed: int) -> Mapping[str, Tensor]:
        return thief.fine_tuned(1)(state, torch.Generator().manual_seed(seed))

    before: dict[str, Treatment] = {
        "both": lambda state, seed: state,
        "pruned 50 %, both": lambda state, seed: pruned(state, 0.5),
        "8 bits, both": lambda state, seed: quantised(state, 8),
        "4 bits, both": lambda state, seed: quantised(state, 4),
        "fine-tuned, both": tuned,
    }
    both = partial(disguised, permute=True, rescale=True)
    return {
        "as it is": lambda state, seed: state,
        "permuted": partial(disguised, permute=True, rescale=False),
        "rescaled": partial(disguised, permute=False, rescale=True),
        **{
            name: lambda state, seed, change=change: both(change(state, seed), seed)
            for name, change in before.items()
        },
        "both, 4 bits": lambda state, seed: quantised(both(state, seed), 4),
    }


@dataclasses.dataclass(frozen=True)
class Traced:
    """A run whose copies leak.

    Attributes:
        name: Of its directory.
        entries: What it sent.
        hosts: That, before fingerprints.
        among: Its fingerprints.
        thief: What can be done to a model, with the run's data.
    """

    name: str
    entries: Sequence[Entry]
    hosts: Hosts
    among: Sequence[Lineup]
    thief: Disguiser

    @classmethod
    def of(cls, path: Path) -> "Traced":
        """Read a run."""
        run = RunDirectory.open(path)
        archive = Archive.open(run.path, run.noise_key())
        thief = Disguiser(load_job(run.config))
        return cls(path.name, list(archive), Hosts.of(archive), list(Lineups(archive)), thief)

    def coalitions(self, size: int, count: int) -> list[list[int]]:
        """Return who colludes: of one, clients of the last round, as in earlier versions."""
        if size == 1:
            return [[client] for client in sorted(self.entries[-1].assignment)[:count]]
        everyone = sorted({client for entry in self.entries for client in entry.assignment})
        draw = random.Random(f"{self.name} {size}")
        return [sorted(draw.sample(everyone, size)) for _ in range(count)]

    def leak(self, clients: Sequence[int]) -> Mapping[str, Tensor]:
        """Return the mean of the last copies of these clients."""
        return mean_of(
            [
                [e for e in self.entries if client in e.assignment][-1].received(client).weights
                for client in clients
            ]
        )

    def copies(self) -> list[Mapping[str, Tensor]]:
        """Return one client's copy of each round and kind, the last rounds first."""
        return [
            entry.received(min(c for c in entry.assignment if entry.assignment[c] == copy)).weights
            for entry in reversed(self.entries)
            for copy in sorted(set(entry.assignment.values()))
        ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, action="append", required=True)
    parser.add_argument("--colluders", default="1,3,8")
    parser.add_argument("--innocents", type=int, default=38, help="of each run and treatment")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in arguments.colluders.split(",")]
    rows = list(measured([Traced.of(path) for path in arguments.run], sizes, arguments.innocents))
    write_result(arguments.out / "trace-disguised.json", arguments, rows=rows)


def measured(runs: Sequence[Traced], sizes: Sequence[int], innocents: int) -> Iterator[Any]:
    """Yield one row a run, treatment and size of coalition, and one of its innocents."""
    for run in runs:
        others = [copy for other in runs if other is not run for copy in other.copies()]
        # Rounds apart, so that they are different models.
        step = max(1, len(others) // innocents)
        for name, treat in treatments(run.thief).items():
            for size in sizes:
                found = [
                    (clients, treat(run.leak(clients), seed))
                    for seed, clients in enumerate(run.coalitions(size, ALONE))
                ]
                row = {"run": run.name, "treatment": name, "colluders": size}
                row |= _named(run, found, aligned=True)
                row["accuracy"] = fmean(run.thief.accuracy(state) for _, state in found)
                if size == 1:
                    row |= {
                        f"{key}_before": value
                        for key, value in _named(run, found, aligned=False).items()
                    }
                print(row, flush=True)
                yield row
            traced = [
                trace(treat(state, seed), run.hosts, run.among)
                for seed, state in enumerate(others[::step][:innocents])
            ]
            row = {"run": run.name, "treatment": name, "colluders": 0, **_accused(traced)}
            print(row, flush=True)
            yield row


def _named(
    run: Traced, leaks: Sequence[tuple[list[int], Mapping[str, Tensor]]], *, aligned: bool
) -> dict[str, Any]:
    # A base of another shape aligns nothing.
    hosts = run.hosts if aligned else dataclasses.replace(run.hosts, bases=({"": torch.zeros(1)},))
    found = [(set(clients), trace(state, hosts, run.among)) for clients, state in leaks]
    return {
        "guilty": sum(len(clients) for clients, _ in found),
        "named": sum(len(clients & set(of.named)) for clients, of in found),
        "falsely": sum(len(set(of.named) - clients) for clients, of in found),
        "least_z": min(s.z for clients, of in found for s in of.suspects if s.client in clients),
    }


def _accused(traced: Sequence[Trace]) -> dict[str, Any]:
    z = [score for of in traced for suspect in of.suspects for score in suspect.scores.values()]
    return {
        "innocents": len(traced),
        "naming": sum(bool(of.named) for of in traced),
        "largest_z": max(of.suspects[0].z for of in traced),
        "mean_z": fmean(z),
        "sd_z": stdev(z),
    }


if __name__ == "__main__":
    main()
