"""FedAvg that fine-tunes the whole backbone, round by round, beside the sums of its features.

    python benchmarks/analytic_finetuning.py --work WORK --out docs/results

CIFAR-10, 100 clients x 500, ten of them a round, one local epoch, EfficientNet-Lite0 with a new
linear head that starts at zero; all weights learn, the statistics of batch normalisation stay. The
rate is the one that is best on 1,000 training images after a round of three clients on others. The
server's 2,000 images and the 8,000 that are reported on are those of analytic_partitions.py; rounds
before the last are told on the first 2,000 of these.

Beside it stand, with --sums, sums at the same resolution, of one view of an image; and what a
client's part costs in either, once: processor seconds, and bytes. A round at 96 pixels takes two
minutes of one core. The state after each round is kept in WORK, so that a run that was killed goes
on; --rounds 0 measures costs alone.
"""

import argparse
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from analytic_partitions import A_ROUND, CASES, CLIENTS, accuracy, features_of_set
from torch import Tensor, nn
from written import write_result

from fedveil.analytic import Statistics, quantised
from fedveil.data import Dataset, Images, load_dataset
from fedveil.data.partition import parse_partition, partition
from fedveil.features import EfficientNetLite0, features_of
from fedveil.federation.evaluation import count_correct
from fedveil.federation.training import LocalTraining, train_locally
from fedveil.files import write_atomically
from fedveil.types import Shape

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
OF_SUMS = 176  # pixels, of analytic_partitions.py
_TRIED, _HELD, _TOLD = 3, 1_000, 2_000
State = dict[str, Tensor]


class FineTuned(nn.Module):
    """EfficientNet-Lite0 whose every weight learns, and a linear head that starts at zero."""

    def __init__(self, shape: Shape, classes: int, resolution: int) -> None:
        super().__init__()
        self.backbone = EfficientNetLite0(shape, resolution)
        self.backbone.requires_grad_(True)
        self.head = nn.Linear(self.backbone.dimension, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        logits: Tensor = self.head(self.backbone(pixels))
        return logits


def averaged(states: list[State], images: list[int]) -> State:
    """Return the mean of clients' weights, by their images."""
    whole = sum(images)
    return {
        name: torch.stack([s[name] * (n / whole) for s, n in zip(states, images, strict=True)]).sum(
            0
        )
        for name in states[0]
    }


def one_round(
    model: nn.Module, clients: dict[int, Images], rate: float, seed: int
) -> tuple[float, float]:
    """Let clients train from the model and average them into it; return loss and their seconds."""
    start = {name: value.clone() for name, value in model.named_parameters()}
    training = LocalTraining(batch_size=20, learning_rate=rate, momentum=0.9)
    states, losses, began = [], [], time.process_time()
    for client, images in clients.items():
        model.load_state_dict(start, strict=False)
        generator = torch.Generator().manual_seed(seed * CLIENTS + client)
        losses.append(train_locally(model, images, training, generator=generator))
        states.append({name: value.detach().clone() for name, value in model.named_parameters()})
    spent = time.process_time() - began
    model.load_state_dict(averaged(states, [len(some) for some in clients.values()]), strict=False)
    return fmean(losses), spent


def right(model: nn.Module, images: Images) -> float:
    """Return the accuracy."""
    return count_correct(model, images.pixels, images.labels) / len(images)


def chosen_rate(data: Dataset, resolution: int, scheme: str) -> float:
    """Return the rate that is best on held training images after a round of a few clients."""
    inside, held = data.train[:-_HELD], data.train[-_HELD:]
    how = parse_partition(scheme)
    parts = partition(inside.labels, clients=CLIENTS, scheme=how, seed=99)[:_TRIED]
    clients = {client: inside[part] for client, part in enumerate(parts)}
    found = {}
    for rate in RATES:
        model = FineTuned(data.shape, len(data.classes), resolution)
        one_round(model, clients, rate, 99)
        found[rate] = right(model, held)
        print(json.dumps({"partition": scheme, "rate": rate, "held": found[rate]}), flush=True)
    return max(found, key=lambda rate: found[rate])


def trained(data: Dataset, scheme: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each round; those that were kept are read."""
    seed, resolution = arguments.seed, arguments.resolution
    path = arguments.work / f"{scheme.replace(':', '-')}-{resolution}-{seed}.pt"
    model = FineTuned(data.shape, len(data.classes), resolution)
    rows: list[dict[str, Any]] = []
    if path.exists():
        kept = torch.load(path, weights_only=True)
        model.load_state_dict(kept["model"])
        rows = kept["rows"]
        yield from rows
    if arguments.rounds <= len(rows):
        return
    rate = rows[0]["rate"] if rows else arguments.rate or chosen_rate(data, resolution, scheme)
    parts = partition(data.train.labels, clients=CLIENTS, scheme=parse_partition(scheme), seed=seed)
    asked = data.test[CASES["cifar10"].split(len(data.test), seed)[1]]
    for number in range(len(rows), arguments.rounds):
        own = seed * 1_000 + number
        drawn = torch.randperm(CLIENTS, generator=torch.Generator().manual_seed(own))[:A_ROUND]
        clients = {client: data.train[parts[client]] for client in drawn.tolist()}
        loss, spent = one_round(model, clients, rate, own)
        told = asked if number + 1 == arguments.rounds else asked[:_TOLD]
        rows.append(
            {
                "partition": scheme,
                "seed": seed,
                "rate": rate,
                "round": number + 1,
                "loss": loss,
                "client_seconds": spent,
                "accuracy": right(model, told),
                "of": len(told),
            }
        )
        content = io.BytesIO()
        torch.save({"model": model.state_dict(), "rows": rows}, content)
        write_atomically(path, content.getvalue())
        yield rows[-1]


def client_costs(data: Dataset, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the processor seconds and bytes of one client, once: in a round, and for sums."""
    share = data.train[: len(data.train) // CLIENTS]
    model = FineTuned(data.shape, len(data.classes), arguments.resolution)
    right(model, share[:100])  # what is made once in a process is no client's
    _, trained_for = one_round(model, {0: share}, RATES[0], 0)
    summed_for = {}
    for side in dict.fromkeys((arguments.resolution, OF_SUMS)):
        backbone = EfficientNetLite0(data.shape, side, arguments.stages)
        began = time.process_time()
        rows = quantised(features_of(backbone, share.raw))
        sums = Statistics.of(rows, share.labels, classes=len(data.classes))
        summed_for[str(side)] = time.process_time() - began
    return {
        "images": len(share),
        "fine_tuning_seconds": trained_for,
        "fine_tuning_bytes": 2 * 4 * sum(value.numel() for value in model.parameters()),
        "sums_seconds": summed_for,
        "sums_bytes": sums.words.numel() * 8,
    }


def sums_beside(data: Dataset, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what sums at the same resolution give."""
    backbone = EfficientNetLite0(data.shape, arguments.resolution, arguments.stages)
    train, test = (features_of_set(backbone, some) for some in (data.train, data.test))
    asked = test.of(CASES["cifar10"].split(len(data.test), arguments.seed)[1])
    return {
        "accuracy": accuracy(train.head, asked),
        "of": len(asked.labels),
        "dimension": backbone.dimension,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--partition", action="append", dest="partitions")
    parser.add_argument("--resolution", type=int, default=96)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, help="instead of choosing it")
    parser.add_argument("--sums", action="store_true", help="sums at the same resolution, too")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    data = load_dataset("cifar10", seed=0)
    rows = []
    for scheme in arguments.partitions or ["iid"]:
        for row in trained(data, scheme, arguments):
            rows.append(row)
            print(json.dumps(row), flush=True)
    costs = client_costs(data, arguments)
    print(json.dumps(costs), flush=True)
    beside = sums_beside(data, arguments) if arguments.sums else None
    write_result(
        arguments.out / "analytic-finetuning.json",
        arguments,
        clients=CLIENTS,
        a_round=A_ROUND,
        a_client=costs,
        sums=beside,
        rows=rows,
    )


if __name__ == "__main__":
    main()
