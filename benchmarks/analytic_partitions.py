"""Features in closed form, beside FedAvg of the same head, by partition.

    python benchmarks/analytic_partitions.py --out docs/results
    python benchmarks/analytic_partitions.py --dataset mnist --out docs/results
    python benchmarks/analytic_partitions.py --dataset cifar100 --out docs/results

For three partitions: the sums of all clients, and the same with ``--balanced``; FedAvg of a softmax
on the same features, standardised by the server's images, 50 rounds of ten clients, an epoch of
batches of 10, the learning rate chosen on a tenth of the training images; the server's images
alone; one client alone. The server has some of the test images; accuracies are of the others.

- cifar10: 100 clients, EfficientNet-Lite0 on images and their mirror images; the server's 2,000
  images are drawn by the seed.
- mnist: 100 clients, a dictionary of 512 filters from the server's 2,000 images.
- cifar100: 10 clients, as cifar10, 139 principal components on the server's 229 images, since the
  rule about a sum's size allows no more.

Where the map is made of the server's images these are the same for all seeds. Features of the
backbone are kept between runs (``FEDVEIL_CACHE``): CIFAR-10's take three hours of one core.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from written import write_result

from fedveil.analytic import FRACTION_BITS, Layout, Statistics, balanced, ridge, rows_of
from fedveil.analytic.ridge import Head
from fedveil.data import Dataset, Images, load_dataset
from fedveil.data.partition import parse_partition, partition
from fedveil.features import (
    EfficientNetLite0,
    FeatureMap,
    Mirrored,
    blocks_of_features,
    default_options,
    learn_dictionary,
    project,
)

CLIENTS, OWN, ROUNDS, A_ROUND, BATCH = 100, 2_000, 50, 10, 10
PARTITIONS = ("iid", "shards:2", "dirichlet:0.1")
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
    classes: int = 10

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
        return Statistics.of(self.rows, self.labels, classes=self.classes, dimension=self.dimension)

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


def features_of_set(features: FeatureMap, images: Images, classes: int = 10) -> Features:
    rows = rows_of(features, images.raw, on_block=lambda done: print(f"\r{done}", end=""))
    print()
    return Features(rows, images.labels, features.views, classes)


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
    head = torch.zeros(train.classes, inputs.shape[1])
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
        error = torch.softmax(some @ own.T, 1) - F.one_hot(labels[batch], len(head))
        own.sub_(error.T @ some, alpha=rate / len(batch))
    return own


def chosen_rate(train: Features, own: Features, scheme: str, clients: int) -> float:
    """Return the rate that does best on every tenth training image, trained on the others."""
    held = torch.arange(len(train.labels)) % 10 == 0
    inside, outside = train.of(~held), train.of(held)
    parts = partition(inside.labels, clients=clients, scheme=parse_partition(scheme), seed=99)
    found = {r: accuracy(fedavg(inside, parts, own, rate=r, seed=99), outside) for r in RATES}
    return max(found, key=lambda rate: found[rate])


@dataclass(frozen=True)
class Case:
    """One data set.

    Attributes:
        clients: How many share the training images.
        own: How many test images the server has.
        makes: Returns the map, of the data set and the server's images.
        by_seed: Whether the server's images differ from seed to seed, which nothing of the map may
            then hang on.
    """

    clients: int
    own: int
    makes: Callable[[Dataset, Images, argparse.Namespace], FeatureMap]
    by_seed: bool

    def split(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return which test images are the server's, and which are reported on."""
        generator = torch.Generator().manual_seed(seed if self.by_seed else 0)
        return torch.randperm(count, generator=generator).tensor_split([self.own])


def _mirrored_backbone(data: Dataset, _own: Images, arguments: argparse.Namespace) -> Mirrored:
    return Mirrored(EfficientNetLite0(data.shape, arguments.resolution, arguments.stages))


def _components(data: Dataset, own: Images, arguments: argparse.Namespace) -> Mirrored:
    backbone = EfficientNetLite0(data.shape, arguments.resolution, arguments.stages)
    public = torch.cat(list(blocks_of_features(backbone, own.raw)))
    return Mirrored(project(backbone, public, len(data.train) // 8))


def _dictionary(data: Dataset, own: Images, _arguments: argparse.Namespace) -> FeatureMap:
    return learn_dictionary(own.raw, default_options(data.shape, 512, mirrored=False), seed=0)


CASES = {
    "cifar10": Case(CLIENTS, OWN, _mirrored_backbone, by_seed=True),
    "mnist": Case(CLIENTS, OWN, _dictionary, by_seed=False),
    "cifar100": Case(10, 229, _components, by_seed=False),
}


def partition_rows(
    case: Case,
    train: Features,
    test: Features,
    scheme: str,
    seeds: int,
    solved: list[tuple[Statistics, Head]],
) -> Iterator[dict[str, Any]]:
    """Yield a partition's rows; sums that are those of an earlier one, bit for bit, are solved."""

    def parts_of(seed: int) -> tuple[Tensor, ...]:
        how = parse_partition(scheme)
        return partition(train.labels, clients=case.clients, scheme=how, seed=seed)

    first, _ = case.split(len(test.labels), 0)
    rate = chosen_rate(train, test.of(first), scheme, case.clients)
    # Whole numbers: whatever the seed shares out, all clients together have these very sums.
    parts = (train.of(part).sums for part in parts_of(0))
    whole = sum(parts, start=Statistics.nothing(Layout(train.dimension, train.classes)))
    if not solved or not torch.equal(solved[-1][0].words, whole.words):
        solved.append((whole, ridge(whole, views=train.views)))
    analytic = solved[-1][1]
    even = balanced(analytic, whole)
    alone = cache(lambda seed: test.of(case.split(len(test.labels), seed)[0]).head)
    for seed in range(seeds):
        own, asked = (test.of(some) for some in case.split(len(test.labels), seed))
        shared = parts_of(seed)
        generator = torch.Generator().manual_seed(seed)
        one = shared[int(torch.randint(case.clients, (1,), generator=generator))]
        yield {
            "seed": seed,
            "partition": scheme,
            "analytic": accuracy(analytic, asked),
            "balanced": accuracy(even, asked),
            "fedavg_of_the_head": accuracy(fedavg(train, shared, own, rate=rate, seed=seed), asked),
            "fedavg_rate": rate,
            "server_alone": accuracy(alone(seed if case.by_seed else 0), asked),
            "one_client_alone": accuracy(train.of(one).head, asked),
        }


def split(test: Features, seed: int) -> tuple[Features, Features]:
    """Return the server's images, and those that are reported on."""
    own, asked = CASES["cifar10"].split(len(test.labels), seed)
    return test.of(own), test.of(asked)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=CASES, default="cifar10")
    parser.add_argument("--resolution", type=int, default=176)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    name, case = arguments.dataset, CASES[arguments.dataset]
    data = load_dataset(name, seed=0)
    own, _ = case.split(len(data.test), 0)
    features = case.makes(data, data.test[own], arguments)
    train, test = (
        features_of_set(features, some, len(data.classes)) for some in (data.train, data.test)
    )
    about = {"dimension": features.dimension, "clients": case.clients, "images": len(data.train)}
    partitions = []
    solved: list[tuple[Statistics, Head]] = []
    for scheme in PARTITIONS:
        for row in partition_rows(case, train, test, scheme, arguments.seeds, solved):
            partitions.append(row)
            print(json.dumps(row), flush=True)
    suffix = "" if name == "cifar10" else f"-{name}"
    path = arguments.out / f"analytic-partitions{suffix}.json"
    write_result(path, arguments, **about, partitions=partitions)


if __name__ == "__main__":
    main()
