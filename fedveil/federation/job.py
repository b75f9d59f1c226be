"""What one run is made of: its settings, images, model, and how its test images are divided."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedveil.data import Dataset, Images, parse_partition
from fedveil.data.partition import partition
from fedveil.federation.evaluation import correct
from fedveil.federation.roster import Sampling, round_size
from fedveil.runs.config import TrainConfig
from fedveil.types import Weights

_EVALUATION_BLOCK = 1_000


@dataclass(frozen=True)
class Evaluation:
    """The test split, divided: no report image is ever used to calibrate.

    Attributes:
        calibration: Images σ is calibrated on.
        report: Images every reported accuracy is measured on.
    """

    calibration: Images
    report: Images


@dataclass(frozen=True)
class Job:
    """Everything one run is made of, built once from the configuration.

    Attributes:
        config: The settings.
        dataset: The images.
        evaluation: The test split, divided.
        model: Freshly built; evaluating weights means taking them on.
        notes: What the trial step found that hinders nothing.
    """

    config: TrainConfig
    dataset: Dataset
    evaluation: Evaluation
    model: nn.Module
    notes: tuple[str, ...] = ()

    def accuracy(self, weights: Weights, *, images: int | None = None) -> float:
        """Return the accuracy of a model on the first ``images`` report images (or on all)."""
        return _share(self._right(weights, self.evaluation.report[:images]))

    def right(self, weights: Weights) -> Tensor:
        """Return which report images a model is right on, bool [N]."""
        return self._right(weights, self.evaluation.report)

    def calibration_accuracy(self, weights: Weights) -> float:
        """Return the accuracy of a model on the calibration images, on which nothing is reported.

        A round is chosen by it, and the report images stay what no choice has seen.
        """
        return _share(self._right(weights, self.evaluation.calibration))

    def _right(self, weights: Weights, images: Images) -> Tensor:
        self.model.load_state_dict(dict(weights))
        return torch.cat(
            [
                correct(self.model, block.pixels, block.labels)
                for start in range(0, len(images), _EVALUATION_BLOCK)
                for block in [images[start : start + _EVALUATION_BLOCK]]
            ]
        )

    @property
    def sampling(self) -> Sampling:
        """How each round chooses its clients."""
        config = self.config
        return Sampling(config.fraction, config.seed, config.clients, config.timeout)


def _share(right: Tensor) -> float:
    return int(right.sum()) / len(right)


def shares_of(config: TrainConfig, dataset: Dataset) -> list[int]:
    """Return how many images each client has; empty where nodes have images of their own."""
    if config.engine == "deployed":
        return []
    scheme = parse_partition(config.partition)
    labels = dataset.train.labels
    parts = partition(labels, clients=config.clients, scheme=scheme, seed=config.seed)
    return [len(part) for part in parts]


def smallest_sum(config: TrainConfig, dataset: Dataset) -> int:
    """Return of how many images a round's sum is at least, by the server's own data elsewhere."""
    shares = shares_of(config, dataset) or [len(dataset.train) // config.clients] * config.clients
    return sum(sorted(shares)[: round_size(config.clients, config.fraction)])
