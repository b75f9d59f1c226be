"""What equally likely classes are worth where clients have few images of some.

    python benchmarks/analytic_imbalance.py --out docs/results

CIFAR-10's training images, of which class c keeps 5,000·r^(c/9) drawn by the seed, for several r;
EfficientNet-Lite0 at 176 pixels, four stages, one view. Accuracy is of the test images but for the
server's 2,000, of which there are as many of each class; so it is the mean over classes, too.

Features are kept between runs (``FEDVEIL_CACHE``), as of analytic_partitions.py.
"""

import argparse
import json
from pathlib import Path

import torch
from analytic_partitions import accuracy, features_of_set, split
from torch import Tensor
from written import write_result

from fedveil.analytic import balanced, ridge
from fedveil.data import load_dataset
from fedveil.features import EfficientNetLite0

RATIOS = (1.0, 0.1, 0.01)


def kept(labels: Tensor, ratio: float, seed: int) -> Tensor:
    """Return which images are left."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name in range(10):
        of_class = (labels == name).nonzero()[:, 0]
        count = round(len(of_class) * ratio ** (name / 9))
        found.append(of_class[torch.randperm(len(of_class), generator=generator)[:count]])
    return torch.cat(found)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = load_dataset("cifar10", seed=0)
    backbone = EfficientNetLite0(data.shape, 176, 4)
    train, test = features_of_set(backbone, data.train), features_of_set(backbone, data.test)
    rows = []
    for ratio in RATIOS:
        for seed in range(arguments.seeds if ratio < 1 else 1):
            some = kept(train.labels, ratio, seed)
            sums = train.of(some).sums
            plain = ridge(sums)
            even = balanced(plain, sums)
            _, asked = split(test, seed)
            rare = asked.of(asked.labels >= 5)
            rows.append(
                {
                    "ratio": ratio,
                    "seed": seed,
                    "images": len(some),
                    "plain": accuracy(plain, asked),
                    "balanced": accuracy(even, asked),
                    "plain_of_the_rarer_half": accuracy(plain, rare),
                    "balanced_of_the_rarer_half": accuracy(even, rare),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    write_result(
        arguments.out / "analytic-imbalance.json",
        arguments,
        dimension=backbone.dimension,
        rows=rows,
    )


if __name__ == "__main__":
    main()
