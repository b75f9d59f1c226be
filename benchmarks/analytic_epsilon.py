"""What w is worth under noise, and who is traced in its sums, against epsilon.

    python benchmarks/analytic_epsilon.py --out docs/results

CIFAR-10's 50,000 training images, EfficientNet-Lite0 on an image and its mirror image, on as many
principal components of the server's 2,000 images as ``fedveil train --epsilon`` takes. The server's
images are test images drawn by the seed; accuracies are of the other 8,000. Tracing
(``fedveil.attacks.membership.leverage``) tells 2,000 training images from 2,000 of those 8,000 by
the released sums and the other 6,000; beside it stands what noise allows any attack.

Features are kept between runs (``FEDVEIL_CACHE``), as of analytic_partitions.py.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from analytic_partitions import CASES, CLIENTS, OWN, Features, accuracy
from torch import Tensor
from written import write_result

from fedveil.analytic import Statistics, quantised, ridge
from fedveil.analytic.privacy import GaussianRelease, noise_sharers
from fedveil.analytic.ridge import noisy_ridge
from fedveil.attacks.membership.leverage import Tracing
from fedveil.audit.metrics import roc_of_one
from fedveil.data import Images, load_dataset
from fedveil.defenses import parse_defense
from fedveil.features import EfficientNetLite0, Projected, blocks_of_features, project
from fedveil.features.mirrored import of_views
from fedveil.federation.feature_choice import WHITENING
from fedveil.secure_random import SecureGenerator

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
EXCESS = round(CLIENTS / noise_sharers(CLIENTS))
_SCORED, _BLOCK = 2_000, 2_000
_DP_SGD = "dp-sgd:noise=1"


@dataclass(frozen=True)
class Sides:
    """The backbone's features of images and of their mirror images, float32 [N, D]."""

    upright: Tensor
    mirrored: Tensor
    labels: Tensor

    @classmethod
    def of(cls, backbone: EfficientNetLite0, images: Images) -> "Sides":
        """Make them, or read what is kept."""
        raw = images.raw
        views = (torch.cat(list(blocks_of_features(backbone, some))) for some in (raw, raw.flip(3)))
        return cls(*views, images.labels)

    def on(self, projection: Projected) -> Features:
        """Return the rows that clients make of them."""
        blocks = zip(self.upright.split(_BLOCK), self.mirrored.split(_BLOCK), strict=True)
        rows = [quantised(of_views(*map(projection.of_inner, pair))) for pair in blocks]
        return Features(torch.cat(rows), self.labels, views=2)


def traced(sums: Statistics, noise: float, members: Features, others: Features) -> dict[str, Any]:
    """Return what tracing finds; the first of ``others`` are strangers, the rest public."""
    strangers = others.of(torch.arange(_SCORED))
    public = others.of(torch.arange(_SCORED, len(others.labels))).sums
    some = members.of(torch.arange(_SCORED))
    size = members.dimension
    rows = torch.cat([some.rows[:, :size], strangers.rows[:, :size]])
    labels = torch.cat([some.labels, strangers.labels])
    counted = len(members.labels)
    score = Tracing(noise=noise)(sums, rows, labels, images=counted, public=public)
    return roc_of_one(score[:_SCORED], score[_SCORED:]).as_json()


def rows_of_seed(
    backbone: EfficientNetLite0, train: Sides, test: Sides, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each epsilon, and one without noise on the same components."""
    own, asked = CASES["cifar10"].split(len(test.labels), seed)
    public = torch.cat([test.upright[own], test.mirrored[own]])
    projection = project(backbone, public, OWN // 2, whitening=WHITENING)
    members, others = train.on(projection), test.on(projection)
    plain, served, counted = members.sums, others.of(own).sums, len(train.labels)
    for epsilon in (*EPSILONS, None):
        sums, noise, allowed = plain, 0.0, None
        if epsilon is None:
            head = ridge(sums, views=2)
        else:
            release, generator = GaussianRelease(epsilon), SecureGenerator()
            # Half of the clients make noise enough: all of them make twice its variance.
            for _ in range(EXCESS):
                sums = release.noised(sums, generator, most_images=1, sharers=1)
            noise, allowed = release.scale(1) * EXCESS**0.5, release.allows
            head = noisy_ridge(sums, noise=noise, images=counted, public=served)
        yield {
            "seed": seed,
            "epsilon": epsilon,
            "components": projection.dimension,
            "accuracy": accuracy(head, others.of(asked)),
            "tracing": traced(sums, noise, members, others.of(asked)),
            "allowed": allowed,
        }


def dp_sgd(results: Path) -> tuple[float, float]:
    """Return epsilon and accuracy of the frontier's DP-SGD, a small network from scratch."""
    study = json.loads((results / "frontier.json").read_text())
    settings = study["settings"]
    (accuracy,) = {row["accuracy"] for row in study["rows"] if row["defense"] == _DP_SGD}
    images, batch = 50_000 // settings["clients"], settings["private_batch_size"]
    privacy = parse_defense(_DP_SGD).privacy
    steps = settings["rounds"] * images // batch
    return privacy.epsilon(images=images, batch_size=batch, steps=steps), accuracy


def draw(
    rows: list[dict[str, Any]], plain: float, private: tuple[float, float], path: Path
) -> None:
    """Draw accuracy against epsilon.

    Args:
        rows: Of every seed.
        plain: Accuracy of all features without noise.
        private: Epsilon and accuracy of DP-SGD.
        path: The picture's.
    """
    figure, axes = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for seed in sorted({row["seed"] for row in rows}):
        noisy = [row for row in rows if row["seed"] == seed and row["epsilon"]]
        heights = [100 * row["accuracy"] for row in noisy]
        axes.plot([row["epsilon"] for row in noisy], heights, "o-", color="#2563eb", alpha=0.6)
    axes.axhline(100 * plain, color="#555", ls="--")
    axes.annotate(
        "all features, no noise", (EPSILONS[0], 100 * plain), (0, -12), textcoords="offset points"
    )
    axes.plot(*(private[0], 100 * private[1]), "s", color="#b45309")
    axes.annotate(
        "DP-SGD, a small network from scratch, 20 rounds",
        (private[0], 100 * private[1]),
        (-8, 8),
        textcoords="offset points",
        ha="center",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.set(xlabel="ε of one image, δ = 10⁻⁵", ylabel="accuracy of w in %")
    axes.set_title("CIFAR-10, 50,000 images, one round of sums", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=176)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = load_dataset("cifar10", seed=0)
    backbone = EfficientNetLite0(data.shape, arguments.resolution, arguments.stages)
    train, test = Sides.of(backbone, data.train), Sides.of(backbone, data.test)
    found = []
    for seed in range(arguments.seeds):
        for row in rows_of_seed(backbone, train, test, seed):
            found.append(row)
            print(json.dumps(row), flush=True)
    write_result(
        arguments.out / "analytic-epsilon.json",
        arguments,
        features=backbone.dimension,
        scored=_SCORED,
        rows=found,
    )
    whole = json.loads((arguments.out / "analytic-partitions.json").read_text())["partitions"]
    plain = sum(row["analytic"] for row in whole) / len(whole)
    draw(found, plain, dp_sgd(arguments.out), arguments.out / "analytic-epsilon.png")


if __name__ == "__main__":
    main()
