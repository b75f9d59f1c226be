"""A new linear output on the copy's features, in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.attacks.theft.holdout import Score, predict, score_folds
from fedveil.attacks.theft.observation import Stolen, TheftObservation
from fedveil.errors import FedveilError
from fedveil.models import output_layer

_RIDGES = tuple(10.0**power for power in range(-4, 3))
_VIEWS = 3


@dataclass(frozen=True)
class Probe:
    """Replace the output layer by ridge regression on the features beneath it.

    It has no learning rate and cannot diverge: if the features are worth anything, this shows it.
    The ridge is chosen on the holdout.

    Sources: Alain & Bengio, "Understanding intermediate layers using linear classifier probes",
    2016; Hoerl & Kennard, "Ridge Regression", Technometrics 1970.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether the model ends in one linear layer with a bias, and there are labels."""
        return observation.has_labels and head_of(observation) is not None

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Return the copy with a new output layer."""
        layer = head_of(observation)
        assert layer is not None
        features, answers = _features(observation, layer), _answers(observation, layer)
        best, ridge = max((_checked(observation, features, answers, r), r) for r in _RIDGES)
        weight, bias = regress(features, answers, ridge)
        head = {f"{layer}.weight": weight, f"{layer}.bias": bias}
        return Stolen({**observation.start, **head}, best)


def head_of(observation: TheftObservation) -> str | None:
    """Return the linear layer with a bias whose output is the logits; None where there is none."""
    channels, height, width = observation.labelled.raw.shape[1:]
    try:
        layer = output_layer(observation.architecture, (channels, height, width))
    except FedveilError:
        return None
    module = observation.architecture.get_submodule(layer)
    return layer if layer and module.bias is not None else None


def _features(observation: TheftObservation, layer: str) -> Tensor:
    """Return what reaches the output layer: [N, 1 + views, D], the image as it is first."""
    model = observation.model(observation.start)
    # The logits of a model that hands its features through are the features.
    model.set_submodule(layer, nn.Identity())
    pixels, generator = observation.labelled.pixels, observation.generator()
    views = [pixels, *(observation.augmentation(pixels, generator) for _ in range(_VIEWS))]
    return torch.stack([predict(model, view) for view in views], dim=1)


def _answers(observation: TheftObservation, layer: str) -> Tensor:
    module = observation.architecture.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    return F.one_hot(observation.labelled.labels, module.out_features).double()


def _checked(
    observation: TheftObservation, features: Tensor, answers: Tensor, ridge: float
) -> Score:
    logits = []
    for fold in observation.folds:
        weight, bias = regress(features[fold.train], answers[fold.train], ridge)
        logits.append(features[fold.held_out, 0] @ weight.T + bias)
    return score_folds(observation.folds, observation.labelled.labels, logits)


def regress(features: Tensor, answers: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Regress answers on features.

    Args:
        features: Float [N, views, D].
        answers: Float [N, classes].
        ridge: In the features' variance.

    Returns:
        Weight [classes, D] and bias [classes].
    """
    x = features.double().flatten(0, 1)
    y = answers.repeat_interleave(features.shape[1], dim=0)
    mean, middle = x.mean(0), y.mean(0)
    x, y = x - mean, y - middle
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, x.T @ y).T
    bias = middle - weight @ mean
    return weight.to(features.dtype), bias.to(features.dtype)
