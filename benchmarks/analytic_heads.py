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

The published code of two runs beside them where a clone is named:

    git clone https://github.com/Erosinho13/Fed3R
    git clone https://github.com/ZHUANGHP/Analytic-federated-learning
    python benchmarks/analytic_heads.py --fed3r Fed3R --afl Analytic-federated-learning \
        --out docs/results

Fed3R's has an intercept, which is penalised, and scales each class's weights to norm 1. AFL's is
given four clients, since it inverts two matrices of D × D for each, with the penalty of its
``run.sh``, which it takes out again where it can; it would move all to a GPU, and is kept from it.
"""

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from analytic_partitions import Features, accuracy, features_of_set, split
from torch import Tensor
from torch.nn import functional as F
from written import write_result

from fedveil.analytic import Statistics, ridge
from fedveil.analytic.ridge import Head
from fedveil.data import load_dataset
from fedveil.features import EfficientNetLite0

SHRINKAGES = (0.001, 0.01, 0.1)
AFL_CLIENTS, BATCH = 4, 512


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


def functions_of(file: Path) -> SimpleNamespace:
    """Return the functions of a file, without what it imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [part for part in tree.body if isinstance(part, ast.FunctionDef)]
    old = SimpleNamespace(eye=np.eye, mat=np.asmatrix)  # NumPy 2 has no np.mat
    found: dict[str, Any] = {"torch": torch, "np": old, "F": F}
    exec(compile(tree, str(file), "exec"), found)
    return SimpleNamespace(**found)


def batches(train: Features, client: int = 0, clients: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return features and labels of one of so many clients."""
    inputs, labels = train.inputs[client::clients], train.labels[client::clients]
    return list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True))


def by_fed3r(clone: Path, train: Features) -> Head:
    """Return the head that the published code of Fed3R makes."""
    code, size = functions_of(clone / "src/fed3r.py"), train.dimension + 1
    gram, moments = 0.01 * torch.eye(size), torch.zeros(size, train.classes)

    def model(rows: Tensor, *, return_feats: bool) -> tuple[Tensor, None]:
        return rows, None

    code.fed3r_step(gram, moments, batches(train), model, train.classes, "cpu")
    weight, bias = code.normalize_W(*code.calc_ridge_params(gram, moments))
    return Head(weight.T.double(), bias.double(), 0.01, 0.0)


def by_afl(clone: Path, train: Features) -> Head:
    """Return the head that the published code of AFL makes of four clients.

    Where no image has some feature the penalty cannot be taken out, and is left in.
    """
    code = functions_of(clone / "afl.py")
    told = SimpleNamespace(
        feat_size=train.dimension,
        num_classes=train.classes,
        num_clients=AFL_CLIENTS,
        rg=1.0,
        gpu=None,
    )
    with patch.object(Tensor, "cuda", lambda tensor, *_, **__: tensor):
        parts = [
            code.local_update(
                batches(train, client, AFL_CLIENTS), lambda rows: rows, lambda x: (x, x), told
            )
            for client in range(AFL_CLIENTS)
        ]
        summed, _, gram = code.aggregation(*map(list, zip(*parts, strict=True)), told)
        try:
            weight, penalty = code.clean_regularization(summed, gram, told).T, 0.0
        except torch.linalg.LinAlgError:
            weight, penalty = summed.T, AFL_CLIENTS * told.rg
    return Head(weight, torch.zeros(len(weight), dtype=torch.float64), penalty, 0.0)


def rows_of(
    train: Features, test: Features, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    seeds = arguments.seeds
    found_heads = list(heads(train.sums))
    if arguments.fed3r:
        found_heads.append(("Fed3R, its published code", by_fed3r(arguments.fed3r, train)))
    if arguments.afl:
        head = by_afl(arguments.afl, train)
        left = ", its penalty left in" if head.penalty else ""
        found_heads.append((f"AFL, its published code{left}", head))
    for name, head in found_heads:
        found = [accuracy(head, split(test, seed)[1]) for seed in range(seeds)]
        yield {"head": name, "accuracy": found, "penalty": head.penalty}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fed3r", type=Path, help="a clone of its repository")
    parser.add_argument("--afl", type=Path, help="a clone of its repository")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = load_dataset("cifar10", seed=0)
    backbone = EfficientNetLite0(data.shape, 176, 4)
    train, test = features_of_set(backbone, data.train), features_of_set(backbone, data.test)
    rows = []
    for row in rows_of(train, test, arguments):
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
