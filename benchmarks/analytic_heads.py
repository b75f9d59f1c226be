r"""Every head that the same sums determine, on the same features: what the ridge's choice is worth.

    python benchmarks/analytic_heads.py --out docs/results

CIFAR-10's 50,000 training images, EfficientNet-Lite0 at 176 pixels, four stages, one view; accuracy
on the test images but for the server's 2,000, three draws. Heads from G, H and counts alone:

- class means, by cosine (FedNCM: Legate et al., "Guiding The Last Layer in Federated Learning with
  Pre-Trained Models", NeurIPS 2023);
- linear discriminants of the pooled covariance, shrunk towards a multiple of the identity (GH-OFL:
  Turazza et al., "The Gaussian-Head OFL Family", ICLR 2026);
- ridge without an intercept, a penalty of 0.01 (Fed3R: Fanì et al., ICML 2024);
- least squares without a penalty (AFL: He et al., CVPR 2025, whose penalty is taken out again);
- ours: ridge with an intercept, its penalty by generalised cross-validation.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from analytic_partitions import Features, accuracy, features_of_set, split
from torch.nn import functional as F
from written import write_result

from fedveil.analytic import Statistics, ridge
from fedveil.analytic.ridge import Head
from fedveil.data import load_dataset
from fedveil.features import EfficientNetLite0

SHRINKAGES = (0.001, 0.01, 0.1)


def class_means(sums: Statistics) -> Head:
    """Return the head whose scores are products with the classes' means, of norm 1."""
    means = F.normalize(sums.moments.T, dim=1)
    return Head(means, torch.zeros(len(means), dtype=torch.float64), 0.0, 0.0)


def discriminants(sums: Statistics, shrinkage: float) -> Head:
    """Return the linear discriminants of normal classes with one covariance."""
    counts = sums.counts.double()
    means = (sums.moments / counts).T
    pooled = (sums.gram - (means.T * counts) @ means) / counts.sum()
    size = len(pooled)
    shrunk = (1 - shrinkage) * pooled + shrinkage * pooled.trace() / size * torch.eye(
        size, dtype=torch.float64
    )
    weight = torch.linalg.solve(shrunk, means.T).T
    bias = (counts / counts.sum()).log() - (weight * means).sum(1) / 2
    return Head(weight, bias, shrinkage, 0.0)


def through_the_origin(sums: Statistics, penalty: float) -> Head:
    """Return the ridge without an intercept; without a penalty the least squares."""
    gram = sums.gram
    if penalty:
        gram.diagonal().add_(penalty)
        weight = torch.linalg.solve(gram, sums.moments).T
    else:
        weight = torch.linalg.lstsq(gram, sums.moments, driver="gelsd").solution.T
    return Head(weight, torch.zeros(len(weight), dtype=torch.float64), penalty, 0.0)


def heads(sums: Statistics) -> Iterator[tuple[str, Head]]:
    """Yield each head with its name."""
    yield "class means (FedNCM)", class_means(sums)
    for shrinkage in SHRINKAGES:
        yield f"LDA, shrinkage {shrinkage:g} (GH-OFL)", discriminants(sums, shrinkage)
    yield "ridge, penalty 0.01 (Fed3R)", through_the_origin(sums, 0.01)
    yield "least squares (AFL)", through_the_origin(sums, 0.0)
    yield "ridge by GCV (ours)", ridge(sums)


def rows_of(train: Features, test: Features, seeds: int) -> Iterator[dict[str, Any]]:
    for name, head in heads(train.sums):
        found = [accuracy(head, split(test, seed)[1]) for seed in range(seeds)]
        yield {"head": name, "accuracy": found, "penalty": head.penalty}


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
    for row in rows_of(train, test, arguments.seeds):
        rows.append(row)
        print(json.dumps(row), flush=True)
    write_result(
        arguments.out / "analytic-heads.json",
        arguments,
        dimension=backbone.dimension,
        rows=rows,
    )


if __name__ == "__main__":
    main()
