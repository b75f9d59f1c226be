r"""Tracing copies whose hidden units were permuted and rescaled, with and without alignment.

Runs as of ``benchmarks/zero_labels.py``: the last round's copies of three clients of each run, and
as innocents the copies that every client of three rounds of the other runs was sent, disguised in
the same way.

    python benchmarks/disguised_trace.py --run runs/delta0 --run runs/delta1 --run runs/delta2 \
        --innocent-rounds 3 --out docs/results
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from written import write_result

from fedveil.audit.trace import lineups, trace
from fedveil.runs.archive import Archive
from fedveil.runs.directory import RunDirectory

LAYERS = ("body.0", "body.3", "hidden", "output")
TREATMENTS = ("as it is", "permuted", "rescaled", "both", "both, pruned 50 %", "both, 8 bits")
_APART = 5
State = dict[str, Tensor]


def disguised(state: State, seed: int, *, permute: bool, rescale: bool) -> State:
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


def treated(state: State, treatment: str, seed: int) -> State:
    """Return a leaked model after one treatment."""
    if treatment.endswith("50 %"):
        state = {n: torch.where(v.abs() < v.abs().median(), 0, v) for n, v in state.items()}
    if treatment.endswith("8 bits"):
        steps = {n: v.abs().max() / 127 for n, v in state.items()}
        state = {n: (v / steps[n]).round() * steps[n] for n, v in state.items()}
    both = treatment.startswith("both")
    return disguised(
        state,
        seed,
        permute=both or treatment == "permuted",
        rescale=both or treatment == "rescaled",
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, action="append", required=True)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--innocent-rounds", type=int, default=3, help="of each other run")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(measured(arguments.run, arguments.clients, arguments.innocent_rounds))
    write_result(arguments.out / "trace-disguised.json", arguments, rows=rows)


def measured(runs: list[Path], clients: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one row a run and treatment."""
    archives = [Archive.open(run, RunDirectory.open(run).noise_key()) for run in runs]
    last = [archive.read(archive.rounds[-1]) for archive in archives]
    # Rounds apart, so that innocents of one run are different models.
    kept = [
        [archive.read(number) for number in archive.rounds[::-_APART][:rounds]]
        for archive in archives
    ]
    for number, archive in enumerate(archives):
        among = [one for one in lineups(archive) if one.round > archive.rounds[-1] - 5]
        # A base of another shape aligns nothing: the trace as it was before there was one.
        plain = [dataclasses.replace(one, base={"none": torch.zeros(1)}) for one in among]
        guilty = sorted(last[number].assignment)[:clients]
        for treatment in TREATMENTS:
            row: dict[str, Any] = {"run": runs[number].name, "treatment": treatment}
            for name, lined in (("before", plain), ("aligned", among)):
                z, named, wrong = [], 0, 0
                for client in guilty:
                    state = dict(last[number].received(client).weights)
                    found = trace(treated(state, treatment, client), lined)
                    z += [
                        own.scores.get(last[number].round, 0.0)
                        for own in found.suspects
                        if own.client == client
                    ]
                    named += client in found.named
                    wrong += len(set(found.named) - {client})
                row |= {f"z_{name}": z, f"named_{name}": named, f"falsely_{name}": wrong}
            others = [e for place, own in enumerate(kept) if place != number for e in own]
            innocent = [
                trace(treated(dict(entry.received(client).weights), treatment, client), among)
                for entry in others
                for client in sorted(entry.assignment)
            ]
            row["innocents"] = len(innocent)
            row["innocents_naming"] = sum(bool(found.named) for found in innocent)
            row["largest_innocent_z"] = max(found.suspects[0].z for found in innocent)
            print(row, flush=True)
            yield row


if __name__ == "__main__":
    main()
