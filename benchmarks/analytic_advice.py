"""Whether a run's advice on ``--balanced`` is right, on training images that no table reports on.

    python benchmarks/analytic_advice.py --out docs/results

CIFAR-10 with fewer images from class to class (as analytic_imbalance.py), and CIFAR-100's slice:
EfficientNet-Lite0's last stage at 176 pixels. Of the training images some are the server's labelled
ones, by which the advice is given, some are asked about, and the others are the clients'.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from analytic_imbalance import RATIOS, kept
from torch import Tensor
from torch.nn import functional as F
from written import write_result

from fedveil.analytic import FRACTION_BITS, Statistics, balanced, quantised, ridge
from fedveil.data import load_dataset
from fedveil.features import EfficientNetLite0, blocks_of_features
from fedveil.federation.gains import gain_of

LAST = 1_280
CIFAR100_COMPONENTS = 100


def rows(name: str) -> tuple[Tensor, Tensor]:
    """Return the last stage's features of training images, scaled to norm 1, and labels."""
    data = load_dataset(name, seed=0)
    backbone = EfficientNetLite0(data.shape, 176, 4)
    blocks = blocks_of_features(backbone, data.train.raw)
    return torch.cat([F.normalize(block[:, -LAST:], dim=1) for block in blocks]), data.train.labels


def projected(features: Tensor, own: Tensor, count: int) -> Tensor:
    """Return principal components on the server's images."""
    mean = features[own].mean(0)
    _, _, directions = torch.linalg.svd(features[own] - mean, full_matrices=False)
    return (features - mean) @ directions[:count].T


def advised(features: Tensor, labels: Tensor, parts: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return what the server's images say of ``--balanced``, and what comes of it."""
    own, asked, clients = parts
    told = quantised(features)
    classes = int(labels.max()) + 1
    sums = Statistics.of(told[clients], labels[clients], classes=classes)
    plain = ridge(sums)

    def right(head: Any, where: Tensor) -> Tensor:
        scores = told[where].double() * 2.0**-FRACTION_BITS @ head.weight.T + head.bias
        return scores.argmax(1) == labels[where]

    even = balanced(plain, sums)
    seen, real = (gain_of(right(even, where), right(plain, where)) for where in (own, asked))
    return {
        "images": len(clients),
        "own_images": len(own),
        "gain_on_own": [seen.gain, seen.gain_low, seen.gain_high],
        "advised": seen.gain_low > 0,
        "gain": real.gain,
    }


def main() -> None:
    """Measure and print, and with --out keep, the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name, counts, ratios in (
        ("cifar10", (2_000, 8_000), RATIOS),
        ("cifar100", (200, 400), (1.0,)),
    ):
        features, labels = rows(name)
        for seed in range(arguments.seeds):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            own, asked, rest = order.split([*counts, len(order) - sum(counts)])
            some = projected(features, own, CIFAR100_COMPONENTS) if name == "cifar100" else features
            for ratio in ratios:
                clients = rest[kept(labels[rest], ratio, seed)] if ratio < 1 else rest
                row = advised(some, labels, (own, asked, clients))
                found.append({"dataset": name, "seed": seed, "rarest": ratio, **row})
                print(json.dumps(found[-1]), flush=True)
    if arguments.out:
        write_result(arguments.out / "analytic-advice.json", arguments, rows=found)


if __name__ == "__main__":
    main()
