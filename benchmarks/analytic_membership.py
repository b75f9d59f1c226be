r"""Who is in the sums of an analytic federation, against how many images they are of.

    python benchmarks/analytic_membership.py --dataset cifar10 --filters 32 --out docs/results

Leverage in the joint sums, which asks for nothing but them, and tracing by as many public images
as are in them (``fedveil.attacks.membership.leverage``), for dictionaries of the test images.
Members, public images and strangers are training images, drawn anew for every seed. What the
formula of tracing expects stands beside it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from written import write_result

from fedveil.analytic import Statistics, quantised
from fedveil.analytic.privacy import GaussianRelease, traceable
from fedveil.attacks.membership.leverage import Leverage, Tracing
from fedveil.audit.metrics import roc_of_one
from fedveil.data import load_dataset
from fedveil.features import default_options, features_of, learn_dictionary
from fedveil.secure_random import SecureGenerator

RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 90.0)
EPSILONS = (2.0, 8.0)
_SCORED = 2_000


def told(
    rows: torch.Tensor, labels: torch.Tensor, count: int, classes: int, epsilon: float | None
) -> Iterator[dict[str, Any]]:
    """Yield what each attack finds of so many images; the first are strangers, the last public."""
    inside, outside = slice(_SCORED, _SCORED + count), slice(_SCORED + count, _SCORED + 2 * count)
    sums = Statistics.of(rows[inside], labels[inside], classes=classes)
    public = Statistics.of(rows[outside], labels[outside], classes=classes)
    noise = 0.0
    if epsilon is not None:
        release = GaussianRelease(epsilon)
        sums = release.noised(sums, SecureGenerator(), most_images=1, sharers=1)
        noise = release.scale(1)
    members = min(count, _SCORED)
    asked = torch.cat([torch.arange(_SCORED, _SCORED + members), torch.arange(_SCORED)])
    own, names = rows[asked], labels[asked]
    scores = {
        "leverage": Leverage()(sums, own, names),
        "tracing": Tracing(noise=noise)(sums, own, names, images=count, public=public),
    }
    for attack, score in scores.items():
        found = roc_of_one(score[:members], score[members:]).as_json()
        yield {"attack": attack, "epsilon": epsilon, **found}


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
    needed = _SCORED + 2 * int(max(RATIOS) * options.dimension)
    for seed in range(arguments.seeds):
        features = learn_dictionary(data.test.raw[:2000], options, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(data.train), generator=generator)[:needed]
        rows = quantised(features_of(features, data.train.raw[chosen]))
        labels = data.train.labels[chosen]
        for ratio in RATIOS:
            count = int(ratio * options.dimension)
            area, rate = traceable(options.dimension, images=count, public=count)
            expected = {"expected_auc": area, "expected_tpr_at_1": rate}
            for epsilon in (None, *EPSILONS):
                for one in told(rows, labels, count, classes, epsilon):
                    row = {"seed": seed, "ratio": ratio, "images": count, **one, **expected}
                    found.append(row)
                    print(json.dumps(row), flush=True)
    write_result(
        arguments.out / "analytic-membership.json",
        arguments,
        dimension=options.dimension,
        scored=_SCORED,
        rows=found,
    )


if __name__ == "__main__":
    main()
