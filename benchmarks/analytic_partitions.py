"""A public backbone's features in closed form, beside FedAvg of the same head, and under noise.

    python benchmarks/analytic_partitions.py --out docs/results

CIFAR-10, 100 clients, EfficientNet-Lite0 on images and their mirror images. For three partitions:
the sums of all clients; FedAvg of a softmax on the same features, standardised by the server's
images, 50 rounds of ten clients, an epoch of batches of 10, the learning rate chosen on a tenth of
the training images; the server's images alone; one client alone. Then sums under noise for several
epsilon. The server has 2,000 test images, drawn by the seed; accuracies are of the other 8,000.

Features are kept between runs (``FEDVEIL_CACHE``): the first takes three hours of one core.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional as F
from written import write_result

from fedveil.analytic import FRACTION_BITS, Layout, Statistics, ridge, rows_of
from fedveil.analytic.privacy import GaussianRelease, noise_sharers
from fedveil.analytic.ridge import Head, noisy_ridge
from fedveil.data import Images, load_dataset
from fedveil.data.partition import parse_partition, partition
from fedveil.features import EfficientNetLite0, FeatureMap, Mirrored, blocks_of_features, project
from fedveil.federation.feature_choice import private_components
from fedveil.runs.config import TrainConfig
from fedveil.secure_random import SecureGenerator

CLIENTS, OWN, ROUNDS, A_ROUND, BATCH = 100, 2_000, 50, 10, 10
PARTITIONS = ("iid", "shards:2", "dirichlet:0.1")
EXCESS = round(CLIENTS / noise_sharers(CLIENTS))
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
RATES = (10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Features:
    """Rows of int16 [N, 2·D] and labels of one set of images.

    The two halves of a row are half sum and half difference of what an image and its mirror image
    give; ``views`` is 1 where there is no second half.
    """

    rows: Tensor
    labels: Tensor
    views: int = 1

    def of(self, chosen: Tensor) -> "Features":
        """Return some of them."""
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen])

    @property
    def dimension(self) -> int:
        """D."""
        return self.rows.shape[1] // self.views

    @property
    def sums(self) -> Statistics:
        """What a client that has them returns."""
        return Statistics.of(self.rows, self.labels, classes=10, dimension=self.dimension)

    @property
    def head(self) -> Head:
        """The ridge of their sums."""
        return ridge(self.sums, views=self.views)

    @property
    def inputs(self) -> Tensor:
        """What an image is told by, float32 [N, D]."""
        return self.rows[:, : self.dimension].float() * 2.0**-FRACTION_BITS

    @property
    def difference(self) -> Tensor:
        """By how much the image itself differs from that, float32 [N, D]; zeros of one view."""
        rest = self.rows[:, self.dimension :].float() * 2.0**-FRACTION_BITS
        return rest if self.views > 1 else torch.zeros(len(self.rows), self.dimension)


def features_of_set(features: FeatureMap, images: Images) -> Features:
    rows = rows_of(features, images.raw, on_block=lambda done: print(f"\r{done}", end=""))
    print()
    return Features(rows, images.labels, features.views)


def accuracy(head: Head, asked: Features) -> float:
    scores = asked.inputs.double() @ head.weight.T + head.bias
    return float((scores.argmax(1) == asked.labels).double().mean())


def fedavg(
    train: Features, parts: tuple[Tensor, ...], own: Features, *, rate: float, seed: int
) -> Head:
    """Return a softmax of the features, averaged over rounds, with an intercept.

    A batch has of each image one of its views, drawn anew every time.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = own.inputs.mean(0)
    scale = 1 / (own.inputs.std(0).clamp(min=1e-6) * math.sqrt(train.dimension))
    inputs = F.pad((train.inputs - mean) * scale, (0, 1), value=1.0)
    views = F.pad(train.difference * scale, (0, 1))
    head = torch.zeros(10, inputs.shape[1])
    for _ in range(ROUNDS):
        chosen = torch.randperm(len(parts), generator=generator)[:A_ROUND].tolist()
        learnt = [
            local(head, (inputs, views), train.labels, parts[c], rate, generator) for c in chosen
        ]
        shares = torch.tensor([len(parts[client]) for client in chosen], dtype=torch.float)
        head = torch.einsum("c,ckd->kd", shares / shares.sum(), torch.stack(learnt))
    weight = (head[:, :-1] * scale).double()
    return Head(weight, head[:, -1].double() - weight @ mean.double(), 0.0, 0.0)


def local(
    head: Tensor,
    inputs: tuple[Tensor, Tensor],
    labels: Tensor,
    part: Tensor,
    rate: float,
    generator: torch.Generator,
) -> Tensor:
    own = head.clone()
    for batch in part[torch.randperm(len(part), generator=generator)].split(BATCH):
        sides = torch.randint(2, (len(batch), 1), generator=generator) * 2.0 - 1
        some = inputs[0][batch] + sides * inputs[1][batch]
        error = torch.softmax(some @ own.T, 1) - F.one_hot(labels[batch], 10)
        own.sub_(error.T @ some, alpha=rate / len(batch))
    return own


def chosen_rate(train: Features, own: Features, scheme: str) -> float:
    """Return the rate that does best on every tenth training image, trained on the others."""
    held = torch.arange(len(train.labels)) % 10 == 0
    inside, outside = train.of(~held), train.of(held)
    parts = partition(inside.labels, clients=CLIENTS, scheme=parse_partition(scheme), seed=99)
    found = {r: accuracy(fedavg(inside, parts, own, rate=r, seed=99), outside) for r in RATES}
    return max(found, key=lambda rate: found[rate])


def partition_rows(
    train: Features, test: Features, scheme: str, seeds: int
) -> Iterator[dict[str, Any]]:
    def parts_of(seed: int) -> tuple[Tensor, ...]:
        how = parse_partition(scheme)
        return partition(train.labels, clients=CLIENTS, scheme=how, seed=seed)

    rate = chosen_rate(train, split(test, 0)[0], scheme)
    # Whole numbers: whatever the seed shares out, all clients together have these very sums.
    parts = (train.of(part).sums for part in parts_of(0))
    whole = sum(parts, start=Statistics.nothing(Layout(train.dimension, 10)))
    analytic = ridge(whole, views=train.views)
    for seed in range(seeds):
        own, asked = split(test, seed)
        shared = parts_of(seed)
        generator = torch.Generator().manual_seed(seed)
        one = shared[int(torch.randint(CLIENTS, (1,), generator=generator))]
        yield {
            "seed": seed,
            "partition": scheme,
            "analytic": accuracy(analytic, asked),
            "fedavg_of_the_head": accuracy(fedavg(train, shared, own, rate=rate, seed=seed), asked),
            "fedavg_rate": rate,
            "server_alone": accuracy(own.head, asked),
            "one_client_alone": accuracy(train.of(one).head, asked),
        }


def split(test: Features, seed: int) -> tuple[Features, Features]:
    """Return the server's images, and those that are reported on."""
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(seed))
    return test.of(order[:OWN]), test.of(order[OWN:])


def noise_rows(
    features: Mirrored, data: tuple[Images, Images], seed: int
) -> Iterator[dict[str, Any]]:
    train, test = data
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    public = torch.cat(list(blocks_of_features(features.inner, test.raw)))[order[:OWN]]
    for epsilon in EPSILONS:
        config = TrainConfig.check({"dataset": "cifar10", "epsilon": epsilon, "clients": CLIENTS})
        count = private_components(config, len(train))
        told = Mirrored(project(features.inner, public, count))
        release = GaussianRelease(epsilon)
        sums, generator = features_of_set(told, train).sums, SecureGenerator()
        # Half of a sum's clients make noise enough, so that all of them make twice its variance.
        for _ in range(EXCESS):
            sums = release.noised(sums, generator, most_images=1, sharers=1)
        head = noisy_ridge(sums, noise=release.scale(1) * EXCESS**0.5)
        _, asked = split(features_of_set(told, test), seed)
        yield {
            "seed": seed,
            "epsilon": epsilon,
            "components": count,
            "accuracy": accuracy(head, asked),
        }


def draw(rows: list[dict[str, Any]], plain: list[float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for seed in sorted({row["seed"] for row in rows}):
        noisy = [row for row in rows if row["seed"] == seed]
        heights = [100 * row["accuracy"] for row in noisy]
        axes.plot([row["epsilon"] for row in noisy], heights, "o-", color="#2563eb", alpha=0.6)
    height = 100 * sum(plain) / len(plain)
    axes.axhline(height, color="#555", ls="--")
    axes.annotate("without noise", (EPSILONS[0], height), (0, -12), textcoords="offset points")
    axes.set_xscale("log", base=2)
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.set(xlabel="ε of one image, δ = 10⁻⁵", ylabel="accuracy of w in %")
    axes.set_title("CIFAR-10, 50,000 images, one round of sums", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=176)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = load_dataset("cifar10", seed=0)
    backbone = EfficientNetLite0(data.shape, arguments.resolution, arguments.stages)
    features = Mirrored(backbone)
    train, test = features_of_set(features, data.train), features_of_set(features, data.test)
    partitions, noise = [], []
    for scheme in PARTITIONS:
        for row in partition_rows(train, test, scheme, arguments.seeds):
            partitions.append(row)
            print(json.dumps(row), flush=True)
    for seed in range(arguments.seeds):
        for row in noise_rows(features, (data.train, data.test), seed):
            noise.append(row)
            print(json.dumps(row), flush=True)
    write_result(
        arguments.out / "analytic-partitions.json",
        f"python benchmarks/analytic_partitions.py --resolution {arguments.resolution} --stages "
        f"{arguments.stages} --seeds {arguments.seeds} --out docs/results",
        dimension=features.dimension,
        partitions=partitions,
        noise=noise,
    )
    draw(noise, [row["analytic"] for row in partitions], arguments.out / "analytic-epsilon.png")


if __name__ == "__main__":
    main()
