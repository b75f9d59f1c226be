"""A small network from scratch on Dirichlet shares, which the study of theft does not have.

    python benchmarks/analytic_beside.py --runs RUNS --out docs/results

FedAvg and noise-delta as ``fedveil reproduce theft`` trains them on two classes a client, with
nothing chosen anew: the arms of partition shards:2, on dirichlet:0.1. A run is kept in RUNS and
goes on where it was killed.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from written import write_result

from fedveil.studies.comparison import Arm, finals
from fedveil.studies.theft import THEFT

PARTITION = "dirichlet:0.1"
ARMS = ("fedavg", "noise-delta")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", action="append", dest="datasets")
    parser.add_argument("--arm", choices=ARMS, action="append", dest="arms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for training in THEFT.trainings:
        if arguments.datasets and training.common["dataset"] not in arguments.datasets:
            continue
        common = {**training.common, "workers": arguments.workers}
        chosen = replace(training, common=common, seeds=tuple(range(arguments.seeds)))
        for arm in chosen.on(["shards:2"]).arms:
            if arm.name not in (arguments.arms or ARMS):
                continue
            other = Arm(arm.name, PARTITION, arm.settings)
            found = [chosen.run(other, seed, arguments.runs) for seed in chosen.seeds]
            rows.append(
                {
                    "dataset": chosen.common["dataset"],
                    "partition": PARTITION,
                    "arm": arm.name,
                    "settings": dict(arm.settings),
                    **finals(found),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    write_result(
        arguments.out / "analytic-beside.json",
        arguments,
        common=[dict(training.common) for training in THEFT.trainings],
        rows=rows,
    )


if __name__ == "__main__":
    main()
