"""What a server's unlabelled images are worth beside noisy sums, on training images alone.

    python benchmarks/analytic_prior.py --out docs/results

CIFAR-10's training images as clients' (42,000), the server's (2,000) and those that are asked
(6,000), EfficientNet-Lite0 on an image and its mirror image. For several numbers of components and
shares of whitening, under noise that half of the clients could make alone:

- ``noisy G``: the ridge of the sums, as AdaSSP regularises it;
- ``both``: each entry of G a mean with that of the server's images, weighed by precision, and the
  same with the noise of G and of H in other proportions;
- ``both, and labels``: so with H, too, by the server's labels, as ``noisy_ridge`` has it;
- ``own``: the ridge of the server's images alone;
- ``own G`` and ``true G``: noise on H alone, whose sensitivity is 1, with G of the server's images
  or, which nobody has, of the clients' without noise: what no better G could pass.

``own`` and the last two have the penalty that does best on the asked images, the others one that
nothing is asked for. Features as of analytic_partitions.py.
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

from fedveil.analytic import Statistics, quantised
from fedveil.analytic.privacy import GaussianRelease, noise_sharers
from fedveil.analytic.ridge import length_of_noise, ridge
from fedveil.data import load_dataset
from fedveil.features import EfficientNetLite0, Mirrored

CLIENTS_IMAGES, OWN_IMAGES = 42_000, 2_000
EXCESS = CLIENTS / noise_sharers(CLIENTS)
COMPONENTS = (200, 400, 1_000)
WHITENINGS = (0.0, 0.3, 0.5)
EPSILONS = (0.5, 2.0, 8.0)
PROPORTIONS = (0.5, 1.0, 2.0)  # of H's weight to G's in what is released
PENALTIES = tuple(2.0**power for power in range(-10, 12))


def views_on_components(data: Features, own: slice, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return both views of every image on components of the server's, float32, and variances."""
    served = data.of(torch.arange(own.start, own.stop))
    mean = served.inputs.mean(0)
    sides = torch.cat([served.inputs + served.difference, served.inputs - served.difference]) - mean
    values, vectors = torch.linalg.eigh((sides.T @ sides).double())
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most].float()
    found = [torch.empty(len(data.labels), most) for _ in range(2)]
    for start in range(0, len(data.labels), 2_000):
        some = slice(start, start + 2_000)
        part = data.of(torch.arange(start, min(start + 2_000, len(data.labels))))
        for side, sign in zip(found, (1, -1), strict=True):
            side[some] = (part.inputs + sign * part.difference - mean) @ vectors
    return found[0], found[1], values.float()


def gram(*sides: Tensor) -> Tensor:
    """Return Σ φφᵀ of views that count half, float64."""
    size = sides[0].shape[1]
    found = torch.zeros(size, size, dtype=torch.float64)
    for side in sides:
        for block in side.split(4_000):
            found += (block.T @ block).double() / len(sides)
    return found


def drawn(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noise for G, of 1 on the diagonal and 1/√2 beside it, and for H."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    symmetric = (square.triu(1) + square.triu(1).T) / math.sqrt(2) + square.diagonal().diag()
    return symmetric, torch.randn(size, 10, generator=generator, dtype=torch.float64)


def spectrum(matrix: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0)[:, None], vectors, vectors.T @ moments


def mixed(noisy: Tensor, public: Tensor, noise: float) -> tuple[Tensor, float]:
    """Return a mean of both by their precisions, and the length of what noise is left in it."""
    spread = torch.outer(public.diagonal(), public.diagonal()) / OWN_IMAGES
    weights = spread / (spread + noise**2 / 2)
    return torch.lerp(public, noisy, weights), noise * length_of_noise(weights)


def shares_of_noisy(powers: Tensor, noise: float) -> Tensor:
    """Return how much rows of noisy H count beside the server's; ten classes are as large."""
    spread = powers * (0.1 - 0.02 + 0.01) * CLIENTS_IMAGES / OWN_IMAGES
    return spread / (spread + noise**2)


def rows_of_map(
    sides: tuple[Tensor, Tensor], labels: Tensor, told: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield every variant's accuracy on one map."""
    first, second = CLIENTS_IMAGES, CLIENTS_IMAGES + OWN_IMAGES
    targets = F.one_hot(labels, 10).double() - 0.1
    rows = (sides[0] + sides[1]) / 2
    asked, right = rows[second:].double(), labels[second:]
    true = gram(*(side[:first] for side in sides))
    public = gram(*(side[first:second] for side in sides)) * (first / OWN_IMAGES)
    moments = rows[:first].double().T @ targets[:first]
    served = rows[first:second].double().T @ targets[first:second] * (first / OWN_IMAGES)
    size = len(true)
    halves = torch.cat([rows, (sides[0] - sides[1]) / 2], 1)[first:second]
    named = labels[first:second]
    alone = ridge(Statistics.of(quantised(halves), named, classes=10, dimension=size), views=2)

    def accuracy(weight: Tensor) -> float:
        return float(((asked @ weight).argmax(1) == right).double().mean())

    def solved(matrix: Tensor, sums: Tensor, penalty: float) -> float:
        values, vectors, along = spectrum(matrix, sums)
        return accuracy(vectors @ (along / (values + penalty)))

    def best(matrix: Tensor, sums: Tensor) -> float:
        values, vectors, along = spectrum(matrix, sums)
        return max(accuracy(vectors @ (along / (values + some))) for some in PENALTIES)

    yield {**told, "variant": "no noise", "accuracy": best(true, moments)}
    yield {**told, "variant": "own", "accuracy": best(public, served)}
    for epsilon in EPSILONS:
        unit = GaussianRelease(epsilon).multiplier * math.sqrt(EXCESS)
        on_gram, on_moments = drawn(size, seed=size)
        with_epsilon = {**told, "epsilon": epsilon}
        for share in PROPORTIONS:
            each = unit * math.sqrt(1 + share**2)
            sums, noisy = moments + each / share * on_moments, true + each * on_gram
            both, length = mixed(noisy, public, each)
            found = {"both": solved(both, sums, length)}
            if share == 1.0:
                shares = shares_of_noisy(public.diagonal(), each)
                counted = torch.lerp(served, sums, shares[:, None])
                more = float(1 - shares.mean()) * first / OWN_IMAGES * alone.penalty
                found["both, and labels"] = solved(both, counted, length + more)
                found["noisy G"] = solved(noisy, sums, math.sqrt(2 * size) * each)
            for variant, value in found.items():
                yield {**with_epsilon, "variant": variant, "proportion": share, "accuracy": value}
        sums = moments + unit * on_moments
        for variant, matrix in (("own G", public), ("true G", true)):
            yield {**with_epsilon, "variant": variant, "accuracy": best(matrix, sums)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=176)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    dataset = load_dataset("cifar10", seed=0)
    backbone = EfficientNetLite0(dataset.shape, arguments.resolution, arguments.stages)
    data = features_of_set(Mirrored(backbone), dataset.train)
    own = slice(CLIENTS_IMAGES, CLIENTS_IMAGES + OWN_IMAGES)
    one, other, variances = views_on_components(data, own, max(COMPONENTS))
    found = []
    for count in COMPONENTS:
        for whitening in WHITENINGS:
            scale = variances[:count] ** (-whitening / 2)
            sides = (
                F.normalize(one[:, :count] * scale, dim=1),
                F.normalize(other[:, :count] * scale, dim=1),
            )
            told = {"components": count, "whitening": whitening}
            for row in rows_of_map(sides, data.labels, told):
                found.append(row)
                print(json.dumps(row), flush=True)
    write_result(
        arguments.out / "analytic-prior.json",
        arguments,
        clients=CLIENTS,
        rows=found,
    )


if __name__ == "__main__":
    main()
