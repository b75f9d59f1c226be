r"""What attackers make of sums: columns inverted, maps that single out, a lower bound of epsilon.

    python benchmarks/analytic_attacks.py --out docs/results

*column*: a column of H is the sum of so many images' features; it is inverted, and the best
correlation with any of them is told beside that of the public image with the nearest features.
*gate*: the server adds to every feature one that passes only where a weighted mean of an image's
pixels lies in a narrow interval, chosen on its own images so that one of the sum is expected in it.
*detector*: it adds one number that says how near an image is to one that the server knows.
*epsilon*: sums of two neighbouring data sets are told apart as well as can be, so many times, which
bounds epsilon from below (Clopper-Pearson, at 95 %); the same of sums with half of the noise.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor
from torch.nn import functional as F
from written import write_result

from fedveil.analytic import FRACTION_BITS, Statistics, quantised
from fedveil.analytic.privacy import GaussianRelease
from fedveil.attacks.inversion.feature_maps import FeatureInversion
from fedveil.audit.metrics import roc_of_one
from fedveil.data import Dataset, Images, load_dataset
from fedveil.features import Dictionary, FeatureMap, default_options, features_of, learn_dictionary
from fedveil.secure_random import SecureGenerator

COLUMNS = (1, 2, 3, 5, 10, 50)
FILTERS = {"digits": 22, "cifar10": 32}
TRIALS = {"digits": 16, "cifar10": 8}
GATES = 40
EPSILONS = (0.5, 1.0, 2.0, 4.0)
DELTA = 1e-5
RELEASES = 20_000


def dictionary_of(data: Dataset, filters: int) -> Dictionary:
    """Return the server's map, of 500 test images."""
    options = default_options(data.shape, filters, mirrored=False)
    return learn_dictionary(data.test.raw[:500], options, seed=0)


def correlations(images: Tensor, others: Tensor) -> Tensor:
    """Return those of pixels, [N, M]."""
    one, other = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (images, others))
    return F.normalize(one, dim=1) @ F.normalize(other, dim=1).T


def column_rows(name: str) -> Iterator[dict[str, Any]]:
    """Invert the features of several images of a class together."""
    data, trials = load_dataset(name, seed=0), TRIALS[name]
    features, public = dictionary_of(data, FILTERS[name]), data.test[:500].pixels
    generator = torch.Generator().manual_seed(0)
    near = F.normalize(features_of(features, public), dim=1)
    for count in COLUMNS:
        groups = [_of_a_class(data.train, count, generator) for _ in range(trials)]
        told = torch.stack(
            [F.normalize(features_of(features, g.raw), dim=1).mean(0) for g in groups]
        )
        found = FeatureInversion()(features, told, public, generator)
        nearest = public[(near @ F.normalize(told, dim=1).T).argmax(0)]
        best = [
            float(correlations(f[None], g.pixels).max()) for f, g in zip(found, groups, strict=True)
        ]
        floor = [
            float(correlations(f[None], g.pixels).max())
            for f, g in zip(nearest, groups, strict=True)
        ]
        yield {
            "attack": "column",
            "dataset": name,
            "dimension": features.dimension,
            "images_of_the_class": count,
            "trials": trials,
            "correlation": sum(best) / trials,
            "floor": sum(floor) / trials,
        }


def _of_a_class(images: Images, count: int, generator: torch.Generator) -> Images:
    label = int(torch.randint(int(images.labels.max()) + 1, (1,), generator=generator))
    own = (images.labels == label).nonzero().flatten()
    return images[own[torch.randperm(len(own), generator=generator)[:count]]]


class Gated(FeatureMap):
    """A map's features, and once more for images whose weighted mean lies in an interval."""

    name = "gated"

    def __init__(self, inner: Dictionary, weights: Tensor, low: float, high: float) -> None:
        super().__init__(inner.shape, 2 * inner.dimension)
        self.inner, self.weights, self.low, self.high = inner, weights, low, high

    def passes(self, pixels: Tensor) -> Tensor:
        """Return whose weighted mean lies in the interval, bool [N]."""
        level = (pixels * self.weights).mean((1, 2, 3))
        return (level >= self.low) & (level < self.high)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float [N, 2 D]."""
        found = F.normalize(self.inner(pixels), dim=1)
        return torch.cat([found, found * self.passes(pixels)[:, None]], 1)


def gate_row(name: str = "digits") -> dict[str, Any]:
    """Single out images of a sum that satisfies the rule of eight images a feature."""
    data = load_dataset(name, seed=0)
    features = dictionary_of(data, FILTERS[name] // 2)
    images, public = data.train, data.test[:500].pixels
    generator = torch.Generator().manual_seed(0)
    alone, correlation = 0, []
    for _ in range(GATES):
        # An interval that one of all the clients' images is expected in.
        weights = torch.rand(data.shape, generator=generator)
        levels = (public * weights).mean((1, 2, 3))
        start = float(torch.rand(1, generator=generator)) * (1 - 1 / len(images))
        low, high = torch.quantile(levels, torch.tensor([start, start + 1 / len(images)])).tolist()
        gated = Gated(features, weights, low, high)
        sums = Statistics.of(
            quantised(features_of(gated, images.raw)), images.labels, classes=len(data.classes)
        )
        told = sums.moments[features.dimension :].sum(1)
        inside = gated.passes(images.pixels).nonzero().flatten()
        if len(inside) != 1:
            continue
        alone += 1
        found = FeatureInversion()(features, told[None], public, generator)
        correlation.append(float(correlations(found, images[inside].pixels)))
    return {
        "attack": "gate",
        "dataset": name,
        "images": len(images),
        "dimension": 2 * features.dimension,
        "images_per_feature": len(images) / (2 * features.dimension),
        "gates": GATES,
        "singled_out": alone / GATES,
        "correlation": sum(correlation) / max(len(correlation), 1),
    }


class Detecting(FeatureMap):
    """A map's features, and one number for how near an image is to a known one."""

    name = "detecting"

    def __init__(self, inner: Dictionary, known: Tensor) -> None:
        super().__init__(inner.shape, inner.dimension + 1)
        self.inner, self.known = inner, known

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float [N, D + 1]."""
        far = (pixels - self.known).square().mean((1, 2, 3))
        near = (1 - far / 1e-4).clamp(min=0)
        return torch.cat([F.normalize(self.inner(pixels), dim=1), near[:, None]], 1)


def detector_rows(name: str = "digits", asked: int = 100) -> Iterator[dict[str, Any]]:
    """Ask of each of 100 members and 100 strangers whether it is in the sums of all clients."""
    data = load_dataset(name, seed=0)
    features, images = dictionary_of(data, FILTERS[name]), data.train
    for epsilon in (None, 8.0, 2.0):
        scores = []
        for known in torch.cat([images.pixels[:asked], data.test.pixels[-asked:]]):
            detecting = Detecting(features, known)
            sums = Statistics.of(
                quantised(features_of(detecting, images.raw)), images.labels, classes=10
            )
            if epsilon is not None:
                release = GaussianRelease(epsilon)
                sums = release.noised(sums, SecureGenerator(), most_images=1, sharers=1)
            scores.append(float(sums.gram[-1, -1] + sums.moments[-1].sum()))
        told = torch.tensor(scores)
        yield {
            "attack": "detector",
            "dataset": name,
            "images": len(images),
            "dimension": features.dimension + 1,
            "epsilon": epsilon,
            **roc_of_one(told[:asked], told[asked:]).as_json(),
        }


@dataclass(frozen=True)
class Counted:
    """How often each of two kinds was called the first."""

    right: int
    wrong: int
    trials: int

    def epsilon(self, delta: float) -> float:
        """Return the least ε that these counts allow at 95 %."""
        low = float(beta.ppf(0.025, self.right, self.trials - self.right + 1)) if self.right else 0
        high = float(beta.ppf(0.975, self.wrong + 1, self.trials - self.wrong))
        return max(0.0, math.log((low - delta) / high)) if low > delta else 0.0


def epsilon_bound(epsilon: float, *, share: float, releases: int = RELEASES) -> float:
    """Return the ε that releases with and without one image show to be spent.

    Args:
        epsilon: What is promised.
        share: Of the noise that is added.
        releases: Of either data set, half of which choose the threshold.
    """
    generator = torch.Generator().manual_seed(0)
    rows = quantised(torch.randn(5, 4, generator=generator))
    labels = torch.tensor([0, 1, 0, 1, 1])
    with_one, without = (Statistics.of(rows[:n], labels[:n], classes=2) for n in (5, 4))
    difference = (with_one - without).words[:-2].double()
    # Beside the diagonal an entry stands for two, and has half of the variance.
    diagonal = torch.tensor([place.start for _, place in with_one.layout.rows()])
    weight = torch.full_like(difference, 2.0)
    weight[diagonal] = 1.0
    weight[with_one.layout.triangle :] = 1.0
    weight[: with_one.layout.triangle] *= 2.0 ** (-4 * FRACTION_BITS)
    weight[with_one.layout.triangle :] *= 2.0 ** (-2 * FRACTION_BITS)
    release, fresh = GaussianRelease(epsilon, DELTA), SecureGenerator()

    def scores(sums: Statistics) -> Tensor:
        noisy = [
            release.noised(sums, fresh, most_images=1, sharers=1).words[:-2] - sums.words[:-2]
            for _ in range(releases)
        ]
        seen = sums.words[:-2].double() + share * torch.stack(noisy).double()
        return (seen * weight * difference).sum(1)

    told, untold = scores(with_one), scores(without)
    half = releases // 2
    thresholds = torch.cat([told[:half], untold[:half]]).quantile(
        torch.linspace(0.02, 0.999, 60).double()
    )

    def counted(threshold: Tensor, part: slice) -> Counted:
        right, wrong = (int((some[part] > threshold).sum()) for some in (told, untold))
        return Counted(right, wrong, half)

    best = max(thresholds, key=lambda t: counted(t, slice(0, half)).epsilon(DELTA))
    return counted(best, slice(half, 2 * half)).epsilon(DELTA)


def epsilon_rows() -> Iterator[dict[str, Any]]:
    for epsilon in EPSILONS:
        yield {
            "attack": "epsilon",
            "epsilon": epsilon,
            "delta": DELTA,
            "releases": RELEASES,
            "at_least": epsilon_bound(epsilon, share=1.0),
            "at_least_with_half_the_noise": epsilon_bound(epsilon, share=0.5),
        }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for row in (
        *epsilon_rows(),
        gate_row(),
        *detector_rows(),
        *column_rows("digits"),
        *column_rows("cifar10"),
    ):
        rows.append(row)
        print(json.dumps(row), flush=True)
    write_result(arguments.out / "analytic-attacks.json", arguments, rows=rows)


if __name__ == "__main__":
    main()
