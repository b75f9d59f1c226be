r"""What is rebuilt of a sum, by how many images it is of.

    python benchmarks/analytic_rebuilt.py --out docs/results

The sum of n clients with m images each is that of n x m images, whoever has them. The server sees
how many images of each class are in it, and asks for an image of the class of which there are
fewest. Two attacks:

*column*  the class's column of H, which is the sum of its images' features, is inverted
*span*    an image is searched whose features and label lie in the span of the sum, which has as
          many dimensions as there are images, from noise and from what *column* gave; of several
          searches the one that lies in it best counts

A picture is scored by its correlation with the nearest image of the class in the sum. The floor is
the same picture with the nearest of as many images of the class that are in no sum. Of the sums of
a size the interval is Student's.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analytic_attacks import FILTERS, correlations, dictionary_of
from scipy import stats
from torch import Tensor
from written import write_result

from fedveil.analytic import Statistics, quantised
from fedveil.attacks.inversion.feature_maps import FeatureInversion, SpanInversion
from fedveil.data import Images, load_dataset
from fedveil.features import Dictionary, features_of

IMAGES = {"digits": (1, 4, 16, 64, 128, 256), "cifar10": (1, 16, 256)}
TRIALS = {"digits": 12, "cifar10": 6}
STARTS = {"digits": 4, "cifar10": 2}
STEPS = {"digits": 800, "cifar10": 400}


@dataclass(frozen=True)
class Drawn:
    """One sum, and what the pictures of it are compared with.

    Attributes:
        sums: What the server sees.
        label: The class of which there are fewest.
        inside: The images of the class in it, [M, C, H, W].
        outside: As many of the class that are in no sum.
    """

    sums: Statistics
    label: int
    inside: Tensor
    outside: Tensor

    @classmethod
    def of(cls, features: Dictionary, images: Images, count: int, seed: int) -> "Drawn":
        """Draw the images of a sum."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        own, others = images[order[:count]], images[order[count:]]
        rows = quantised(features_of(features, own.raw))
        sums = Statistics.of(rows, own.labels, classes=int(images.labels.max()) + 1)
        held = sums.counts.nonzero().flatten()
        label = int(held[sums.counts[held].argmin()])
        inside, outside = (some[some.labels == label].pixels for some in (own, others))
        return cls(sums, label, inside, outside[: len(inside)])

    @property
    def column(self) -> Tensor:
        """The class's column of H, float64 [D]."""
        return self.sums.moments[:, self.label]

    def scores(self, picture: Tensor) -> tuple[float, float]:
        """Return the correlation with the nearest image of the class, and the floor."""
        inside, outside = (
            float(correlations(picture[None], some).max()) for some in (self.inside, self.outside)
        )
        return inside, outside


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each size of a sum and attack."""
    data, trials = load_dataset(name, seed=0), TRIALS[name]
    features, public = dictionary_of(data, FILTERS[name]), data.test[:500].pixels
    generator = torch.Generator().manual_seed(0)
    # The rule of four images a feature is the last size; as many others must be left to compare.
    rule = 4 * features.dimension
    for count in (*(n for n in IMAGES[name] if n < rule), rule):
        drawn = [Drawn.of(features, data.train, count, trial) for trial in range(trials)]
        labels = torch.tensor([one.label for one in drawn])
        told = torch.stack([one.column for one in drawn])
        inversion = FeatureInversion(starts=STARTS[name], steps=STEPS[name])
        column = inversion(features, told, public, generator)
        pictures = {"column": column}
        if count < features.dimension + len(data.classes):
            sums = [one.sums for one in drawn]
            search = SpanInversion(starts=STARTS[name], steps=STEPS[name])
            pictures["span"] = search(features, sums, labels, column, generator)
        for attack, found in pictures.items():
            scores = np.array([one.scores(p) for one, p in zip(drawn, found, strict=True)])
            over = scores[:, 0] - scores[:, 1]
            low, high = stats.t.interval(0.95, trials - 1, over.mean(), stats.sem(over))
            yield {
                "dataset": name,
                "dimension": features.dimension,
                "images": count,
                "attack": attack,
                "sums": trials,
                "of_the_class": float(np.mean([len(one.inside) for one in drawn])),
                "correlation": float(scores[:, 0].mean()),
                "floor": float(scores[:, 1].mean()),
                "over": [float(over.mean()), float(low), float(high)],
            }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=TRIALS, action="append", dest="datasets")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.datasets or TRIALS:
        for row in rows_of(name):
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_result(arguments.out / "analytic-rebuilt.json", arguments, rows=rows)


if __name__ == "__main__":
    main()
