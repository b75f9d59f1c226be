"""What secure aggregation costs: messages, bytes and processor time of a round, and accuracy.

Clients of the first part return what they were sent, so that all that is left is what a round
costs besides training; both arms take turns, and medians are kept. Processor time is that of all
processes together, on a busy machine the only clock that says anything. The second part trains
with and without, by the same seeds and noise keys.

    python benchmarks/secure_aggregation.py cost --out docs/results
    python benchmarks/secure_aggregation.py accuracy --out docs/results
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from torch import nn
from written import write_result

from fedveil.copies.noise import NoiseKey
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.secagg.client import secure_aggregation_mod
from fedveil.federation.secagg.server import SecureAggregation
from fedveil.federation.strategies.fedavg import SeededFedAvg
from fedveil.federation.training_run import run_to_completion
from fedveil.models import build_model
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory

IMAGES = 600
ROUNDS = 2

echo = ClientApp(mods=[secure_aggregation_mod])


@echo.query()
def who(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    metrics = MetricRecord({"partition-id": client, "num-examples": IMAGES})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@echo.train()
def nothing(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"num-examples": IMAGES, "loss": 0.0})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content, reply_to=message)


class CountingGrid(LocalGrid):
    """Counts training messages and their bytes as they would travel, there and back."""

    messages = 0
    bytes_down = 0
    bytes_up = 0

    def send_and_receive(  # noqa: D102
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        sent = list(messages)
        replies = super().send_and_receive(sent, timeout=timeout)
        if sent and sent[0].metadata.message_type == "train":
            self.messages += len(sent) + len(replies)
            self.bytes_down += sum(map(size, sent))
            self.bytes_up += sum(map(size, replies))
        return replies


def size(message: Message) -> int:
    return int(message_to_proto(message).ByteSize())


def clock() -> float:
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def traffic(model: nn.Module, clients: int, secure: SecureAggregation | None) -> dict[str, float]:
    with CountingGrid(echo, nodes=clients, workers=2) as grid:
        run_rounds(grid, model, secure, rounds=1)
    return {"messages": grid.messages, "bytes_down": grid.bytes_down, "bytes_up": grid.bytes_up}


def seconds(model: nn.Module, clients: int, secure: SecureAggregation | None) -> dict[str, float]:
    cpu, wall = clock(), time.perf_counter()
    with LocalGrid(echo, nodes=clients, workers=2) as grid:
        run_rounds(grid, model, secure, rounds=ROUNDS)
    return {
        "cpu_seconds": (clock() - cpu) / ROUNDS,
        "wall_seconds": (time.perf_counter() - wall) / ROUNDS,
    }


def run_rounds(
    grid: LocalGrid, model: nn.Module, secure: SecureAggregation | None, rounds: int
) -> None:
    strategy = SeededFedAvg()
    strategy.secure = secure
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds)


def cost(clients: int, shares: int | None, turns: int) -> dict[str, Any]:
    model = build_model("mnist-cnn", (1, 28, 28), 10, seed=0)
    arms: dict[str, SecureAggregation | None] = {
        "plain": None,
        "secure": SecureAggregation(shares=shares),
    }
    runs = [
        {name: seconds(model, clients, arm) for name, arm in arms.items()} for _ in range(turns)
    ]
    row: dict[str, Any] = {"clients": clients, "key_shares": shares or clients}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    for name, arm in arms.items():
        median = {k: statistics.median(run[name][k] for run in runs) for k in runs[0][name]}
        row[name] = traffic(model, clients, arm) | median
    return row


def accuracies(dataset: str, seeds: int, rounds: int) -> Iterator[dict[str, Any]]:
    for strategy in ("fedavg", "noise-pair", "noise-delta"):
        for seed in range(seeds):
            arms = {arm: accuracy(dataset, strategy, seed, rounds, arm) for arm in (False, True)}
            row = {"strategy": strategy, "seed": seed, "plain": arms[False], "secure": arms[True]}
            print(json.dumps(row), flush=True)
            yield row


def accuracy(dataset: str, strategy: str, seed: int, rounds: int, secure: bool) -> dict[str, Any]:
    settings = {
        "dataset": dataset,
        "clients": 10,
        "fraction": 1.0,
        "rounds": rounds,
        "deliver": "last",
        "learning_rate": 0.1,
        "clip": 5.0,
        "sigma_factor": 1.5,
        "strategy": strategy,
        "seed": seed,
        "secure_aggregation": secure,
    }
    with tempfile.TemporaryDirectory() as place:
        key = NoiseKey(seed.to_bytes(32, "big"))
        config = TrainConfig.check(settings)
        directory = RunDirectory.create(Path(place) / "run", config, noise_key=key)
        summary = run_to_completion(directory)
    return {name: summary[name] for name in ("accuracy", "copies_max", "rounds_over_cap")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["cost", "accuracy"])
    parser.add_argument("--turns", type=int, default=3, help="of cost")
    parser.add_argument("--dataset", default="digits", help="of accuracy")
    parser.add_argument("--seeds", type=int, default=3, help="of accuracy")
    parser.add_argument("--rounds", type=int, default=10, help="of accuracy")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.part == "cost":
        sizes = ((10, None), (50, None), (50, 15))
        rows = [cost(clients, shares, args.turns) for clients, shares in sizes]
    else:
        rows = list(accuracies(args.dataset, args.seeds, args.rounds))
    print(json.dumps(rows, indent=1))
    if args.out:
        write_result(args.out / f"secure-aggregation-{args.part}.json", args, rows=rows)


if __name__ == "__main__":
    main()
