"""What else a server could make of noisy sums of a backbone's features, on training images alone.

    python benchmarks/analytic_noise.py --out docs/results

CIFAR-10's training images as clients' (42,000), the server's (2,000) and those that are asked
(6,000). For several numbers of components: the penalty from a tenth of what ``noisy_ridge`` takes
to the whole, the server's own sums added several times over, its images' G in place of the noisy
one, and its labels fitted to what the noisy ridge leaves. Features as of analytic_partitions.py.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from analytic_partitions import CLIENTS, Features, features_of_set
from torch import Tensor
from torch.nn import functional as F
from written import write_result

from fedveil.analytic.privacy import GaussianRelease, noise_sharers
from fedveil.data import load_dataset
from fedveil.features import EfficientNetLite0

CLIENTS_IMAGES, OWN_IMAGES = 42_000, 2_000
EXCESS = CLIENTS / noise_sharers(CLIENTS)
COMPONENTS = (204, 400, 800, 1_500)
EPSILONS = (2.0, 8.0)
PENALTIES = (1.0, 0.5, 0.25, 0.1)
TIMES = (0, 1, 3)
FITTED = (1.0, 3.0, 10.0, 30.0)


def projected(data: Features, own: Features, count: int) -> Tensor:
    """Return float64 [N, D'] of norm 1: components of the server's images."""
    mean = own.inputs.double().mean(0)
    directions = torch.linalg.svd(own.inputs.double() - mean, full_matrices=False)[2][:count]
    return F.normalize((data.inputs.double() - mean) @ directions.T, dim=1)


def solved(gram: Tensor, moments: Tensor, penalty: float) -> Tensor:
    """Return the ridge's weights [D', K], eigenvalues below nought taken for nought."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ ((vectors.T @ moments) / (values.clamp(min=0)[:, None] + penalty))


def heads(
    clients: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], noise: float
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield each variant and its weights.

    Args:
        clients: Noisy G and H.
        own: Rows and targets of the server's images.
        noise: σ of the noise on H and on G's diagonal.
    """
    (gram, moments), (rows, targets) = clients, own
    penalty = math.sqrt(2 * len(gram)) * noise
    own_gram, own_moments = rows.T @ rows, rows.T @ targets
    for share in PENALTIES:
        for times in TIMES:
            told = {"variant": "penalty and own sums", "penalty": share, "own_times": times}
            both = gram + times * own_gram, moments + times * own_moments
            yield told, solved(*both, share * penalty)
        plain = solved(gram, moments, share * penalty)
        for fitted in FITTED:
            told = {"variant": "own labels on the rest", "penalty": share, "own_penalty": fitted}
            yield told, plain + solved(own_gram, rows.T @ (targets - rows @ plain), fitted)
        public = own_gram * (CLIENTS_IMAGES / OWN_IMAGES)
        told = {"variant": "own G", "penalty": share}
        yield told, solved(public, moments, share * penalty)


def rows_of_components(data: Features, count: int) -> Iterator[dict[str, Any]]:
    """Yield every variant's accuracy, and those without noise and of the server alone."""
    first, second = CLIENTS_IMAGES, CLIENTS_IMAGES + OWN_IMAGES
    own = data.of(torch.arange(first, second))
    every, targets = projected(data, own, count), F.one_hot(data.labels, 10).double() - 0.1
    rows = every[:first]
    gram, moments = rows.T @ rows, rows.T @ targets[:first]

    def right(weight: Tensor) -> float:
        scores = every[second:] @ weight
        return float((scores.argmax(1) == data.labels[second:]).double().mean())

    beside = every[first:second], targets[first:second]
    alone = solved(beside[0].T @ beside[0], beside[0].T @ beside[1], 1.0)
    yield {
        "components": count,
        "epsilon": None,
        "variant": "clients",
        "accuracy": right(solved(gram, moments, 3.0)),
    }
    yield {"components": count, "epsilon": None, "variant": "own", "accuracy": right(alone)}
    for epsilon in EPSILONS:
        noise = GaussianRelease(epsilon).scale(1) * math.sqrt(EXCESS)
        generator = torch.Generator().manual_seed(count)
        drawn = torch.randn(count, count, generator=generator, dtype=torch.float64) * noise
        # σ on the diagonal and σ/√2 beside it, as of ``GaussianRelease.scale``.
        symmetric = (drawn.triu(1) + drawn.triu(1).T) / math.sqrt(2) + drawn.diagonal().diag()
        noisy = moments + noise * torch.randn(count, 10, generator=generator, dtype=torch.float64)
        for told, weight in heads((gram + symmetric, noisy), beside, noise):
            yield {"components": count, "epsilon": epsilon, **told, "accuracy": right(weight)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=176)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    dataset = load_dataset("cifar10", seed=0)
    features = EfficientNetLite0(dataset.shape, arguments.resolution, arguments.stages)
    data = features_of_set(features, dataset.train)
    found = []
    for count in COMPONENTS:
        for row in rows_of_components(data, count):
            found.append(row)
            print(json.dumps(row), flush=True)
    write_result(arguments.out / "analytic-noise.json", arguments, clients=CLIENTS, rows=found)


if __name__ == "__main__":
    main()
