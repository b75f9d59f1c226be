"""Who is told in the sums and in w, at low false-positive rates, with noise and without.

    python benchmarks/analytic_released.py --out docs/results

CIFAR-10, EfficientNet-Lite0 on the principal components that ``fedveil train --epsilon`` takes, as
analytic_epsilon.py. Of 20,000 training images each of six federations has half, every second the
half that the one before lacks, so that each image is in three of them. Each w is attacked in its
turn, by what the other w's say (but that of the other half, which has what it lacks): loss,
calibrated loss, likelihood ratio and RMIA, as ``fedveil audit egress`` has them. The sums of some
are traced (``fedveil.attacks.membership.leverage``) by the 8,000 test images that are not the
server's. All members are told from all strangers; intervals are Student's over federations.

Features are kept between runs (``FEDVEIL_CACHE``), as of analytic_partitions.py.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analytic_epsilon import EXCESS, Sides
from analytic_partitions import CASES, OWN, Features
from scipy import stats
from torch import Tensor
from written import write_result

from fedveil.analytic import Statistics, ridge, steepness_for
from fedveil.analytic.privacy import GaussianRelease
from fedveil.analytic.ridge import Head, noisy_ridge
from fedveil.attacks.membership.leverage import Tracing
from fedveil.attacks.membership.released import calibrated, likelihood_ratio, loss, relative
from fedveil.audit.metrics import roc_of_one
from fedveil.data import load_dataset
from fedveil.features import EfficientNetLite0, project
from fedveil.federation.feature_choice import WHITENING
from fedveil.secure_random import SecureGenerator

EPSILONS = (None, 8.0, 2.0)


def halves(count: int, federations: int) -> Tensor:
    """Return which images each federation has, bool [F, N]."""
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(federations, count, dtype=torch.bool)
    for number in range(0, federations, 2):
        held[number, torch.randperm(count, generator=generator)[: count // 2]] = True
        held[number + 1] = ~held[number]
    return held


def released(sums: Statistics, epsilon: float | None) -> tuple[Statistics, float]:
    """Return what leaves of sums, and the noise on their diagonal."""
    if epsilon is None:
        return sums, 0.0
    release, generator = GaussianRelease(epsilon), SecureGenerator()
    # Half of the clients make noise enough: all of them make twice its variance.
    for _ in range(EXCESS):
        sums = release.noised(sums, generator, most_images=1, sharers=1)
    return sums, release.scale(1) * EXCESS**0.5


def scores_of(head: Head, images: Features) -> Tensor:
    """Return the scores, float64 [N, K]."""
    return images.inputs.double() @ head.weight.T + head.bias


def confidences(head: Head, images: Features, own: Features) -> Tensor:
    """Return log(p / (1 - p)) of each image's class, float64 [N]; p is fitted to the server's."""
    steepness = steepness_for(scores_of(head, own), own.labels)
    scores = steepness * scores_of(head, images)
    own_class = scores.gather(1, images.labels[:, None])[:, 0]
    return own_class - scores.scatter(1, images.labels[:, None], -torch.inf).logsumexp(1)


def by_w(known: Tensor, held: Tensor) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield what each attack on each w tells of all images."""
    count = len(known)
    for number in range(count):
        # Its own other half has what it lacks: to know it would be to know the answer.
        others = torch.tensor([n for n in range(count) if n // 2 != number // 2])
        shadows, with_ = known[others], held[others]
        members = held[number]
        scores = {
            "loss": loss(known[number]),
            "calibrated": calibrated(known[number], shadows),
            "lira": likelihood_ratio(known[number], shadows, with_),
            "rmia": relative(known[number], shadows, ~members, with_),
        }
        for name, score in scores.items():
            yield name, number, roc_of_one(score[members], score[~members]).as_json()


def by_sums(
    sums: Statistics, noise: float, train: Features, members: Tensor, test: Features
) -> dict[str, Any]:
    """Return what tracing tells."""
    images, rows = int(members.sum()), train.rows[:, : train.dimension]
    tracing = Tracing(noise=noise)
    score = tracing(sums, rows, train.labels, images=images, public=test.sums)
    return roc_of_one(score[members], score[~members]).as_json()


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over federations with Student's intervals."""
    told: dict[str, Any] = {"federations": len(found)}
    for name in ("auc", "tpr_at_1", "tpr_at_01"):
        values = np.array([row[name] for row in found])
        low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        told[name] = [float(values.mean()), float(low), float(high)]
    return told


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=176)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--federations", type=int, default=6)
    parser.add_argument("--traced", type=int, default=6, help="federations whose sums are traced")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = load_dataset("cifar10", seed=0)
    backbone = EfficientNetLite0(data.shape, arguments.resolution, arguments.stages)
    sides = Sides.of(backbone, data.test)
    own, asked = CASES["cifar10"].split(len(data.test), 0)
    public = torch.cat([sides.upright[own], sides.mirrored[own]])
    projection = project(backbone, public, OWN // 2, whitening=WHITENING)
    test = sides.on(projection)
    train = Sides.of(backbone, data.train[: arguments.images]).on(projection)
    held, whole, served = (
        halves(len(train.labels), arguments.federations),
        train.sums,
        test.of(own).sums,
    )
    firsts = [train.of(some).sums for some in held[::2]]
    plain = [sums for first in firsts for sums in (first, whole - first)]
    rows = []
    for epsilon in EPSILONS:
        known, traced = [], []
        for number, sums in enumerate(plain):
            seen, noise = released(sums, epsilon)
            images = int(held[number].sum())
            head = (
                ridge(seen, views=2)
                if epsilon is None
                else noisy_ridge(seen, noise=noise, images=images, public=served)
            )
            known.append(confidences(head, train, test.of(own)))
            if number < arguments.traced:
                traced.append(by_sums(seen, noise, train, held[number], test.of(asked)))
        found: dict[tuple[str, str], list[dict[str, Any]]] = {("sums", "tracing"): traced}
        for attack, _, row in by_w(torch.stack(known), held):
            found.setdefault(("w", attack), []).append(row)
        for (seen_by, attack), told in found.items():
            about = {"epsilon": epsilon, "seen": seen_by, "attack": attack}
            rows.append({**about, **summary(told), "each": told})
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "each"}), flush=True)
    write_result(
        arguments.out / "analytic-released.json",
        arguments,
        images=int(held[0].sum()),
        components=projection.dimension,
        rows=rows,
    )


if __name__ == "__main__":
    main()
