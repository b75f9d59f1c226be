r"""Who is in the sums of an analytic federation, against how many images they are of.

    python benchmarks/analytic_membership.py --dataset cifar10 --filters 32 --out docs/results

Leverage in the joint sums (``fedveil.attacks.membership.leverage``), the strongest attack on them
that we know, for dictionaries of the test images. Members and strangers are training images, drawn
anew for every seed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from written import write_result

from fedveil.analytic import Statistics, quantised
from fedveil.analytic.privacy import GaussianRelease
from fedveil.attacks.membership.leverage import Leverage
from fedveil.audit.metrics import roc_of_one
from fedveil.data import load_dataset
from fedveil.features import default_options, features_of, learn_dictionary
from fedveil.secure_random import SecureGenerator

RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
EPSILONS = (2.0, 8.0)
_SCORED = 2_000


def told(
    rows: torch.Tensor, labels: torch.Tensor, count: int, classes: int, epsilon: float | None
) -> dict[str, Any]:
    sums = Statistics.of(
        rows[_SCORED : _SCORED + count], labels[_SCORED : _SCORED + count], classes=classes
    )
    if epsilon is not None:
        release = GaussianRelease(epsilon)
        sums = release.noised(sums, SecureGenerator(), most_images=1, sharers=1)
    attack, members = Leverage(), slice(_SCORED, _SCORED + min(count, _SCORED))
    inside = attack(sums, rows[members], labels[members])
    outside = attack(sums, rows[:_SCORED], labels[:_SCORED])
    return roc_of_one(inside, outside).as_json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--filters", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = load_dataset(arguments.dataset, seed=0)
    classes, found = len(data.classes), []
    options = default_options(data.shape, arguments.filters, mirrored=True)
    needed = _SCORED + int(max(RATIOS) * options.dimension)
    for seed in range(arguments.seeds):
        features = learn_dictionary(data.test.raw[:2000], options, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(data.train), generator=generator)[:needed]
        rows = quantised(features_of(features, data.train.raw[chosen]))
        labels = data.train.labels[chosen]
        for ratio in RATIOS:
            count = int(ratio * options.dimension)
            for epsilon in (None, *EPSILONS):
                one = told(rows, labels, count, classes, epsilon)
                row = {"seed": seed, "ratio": ratio, "images": count, "epsilon": epsilon, **one}
                found.append(row)
                print(json.dumps(row), flush=True)
    write_result(
        arguments.out / "analytic-membership.json",
        f"python benchmarks/analytic_membership.py --dataset {arguments.dataset} "
        f"--filters {arguments.filters} --seeds {arguments.seeds} --out docs/results",
        dimension=options.dimension,
        scored=_SCORED,
        rows=found,
    )


if __name__ == "__main__":
    main()
