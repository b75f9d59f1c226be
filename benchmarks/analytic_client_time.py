"""How much less a client computes for sums than for FedAvg, by filters of the dictionary.

    python benchmarks/analytic_client_time.py --out docs/results

CIFAR-10, 100 clients × 500 images, in one run: processor seconds of all clients together until w is
what it is, for FedAvg of the small network after 20 rounds of ten, and for sums of fewer and fewer
filters. Beside them stands what a single forward pass of FedAvg's network over the same images
takes: sums need one pass of their map at least.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",
}

import torch
from timed import cpu_seconds
from written import write_result

from fedveil import train
from fedveil.analytic import Statistics, rows_of
from fedveil.data import load_dataset
from fedveil.features import default_options, learn_dictionary
from fedveil.federation.evaluation import count_correct
from fedveil.federation.training import LocalTraining, train_locally
from fedveil.models import build_model

ROUNDS, CLIENTS, REPEATS = 20, 100, 5
COMMON = {"dataset": "cifar10", "secure_aggregation": False, "seed": 0}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filters", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    client = load_dataset("cifar10", seed=0).train[:500]
    model = build_model("cnn", (3, 32, 32), 10, seed=0)
    steps = LocalTraining(epochs=1, batch_size=10, learning_rate=0.05, clip=5.0)
    generator = torch.Generator().manual_seed(0)
    epoch = cpu_seconds(lambda: train_locally(model, client, steps, generator=generator), REPEATS)
    forward = cpu_seconds(lambda: count_correct(model, client.pixels, client.labels), REPEATS)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        averaged = train(
            out / "fedavg", **COMMON, strategy="fedavg", rounds=ROUNDS, archive=False, clip=5.0
        )
        spent = ROUNDS * CLIENTS // 10 * epoch
        rows = []
        for filters in arguments.filters:
            options = default_options((3, 32, 32), filters, mirrored=True)
            dictionary = learn_dictionary(client.raw, options, seed=0)

            def sums(dictionary=dictionary) -> Statistics:  # type: ignore[no-untyped-def]
                return Statistics.of(rows_of(dictionary, client.raw), client.labels, classes=10)

            seconds = CLIENTS * cpu_seconds(sums, REPEATS)
            closed = train(out / str(filters), **COMMON, filters=filters, archive=False)
            rows.append(
                {
                    "filters": filters,
                    "accuracy": closed["accuracy"],
                    "client_seconds": seconds,
                    "times_less_client_time": spent / seconds,
                }
            )
            print(rows[-1], flush=True)
    write_result(
        arguments.out / "analytic-client-time.json",
        arguments,
        fedavg={"rounds": ROUNDS, "accuracy": averaged["accuracy"], "client_seconds": spent},
        one_forward_pass_seconds=CLIENTS * forward,
        most_times_by_one_forward_pass=spent / (CLIENTS * forward),
        rows=rows,
    )


if __name__ == "__main__":
    main()
