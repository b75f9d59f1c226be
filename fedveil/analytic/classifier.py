"""Feature map and linear head in one module: what an analytic federation delivers."""

import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.analytic.ridge import Head
from fedveil.analytic.rows import rows_of
from fedveil.analytic.statistics import FRACTION_BITS, Statistics, quantised
from fedveil.data import Images
from fedveil.errors import FedveilError
from fedveil.features import FeatureMap, MapDescription, rebuild

_FEATURES, _ABOUT = "features.", "about"
_STEEPEST = 1e4


class AnalyticClassifier(nn.Module):
    """Scores W·φ(x) + b of an image's features, times what makes their softmax probabilities.

    Its state holds a description of the map besides, so that ``load_classifier`` makes the module
    anew from nothing but the state.

    Args:
        features: The map.
        classes: K.

    Shape: float [N, C, H, W] in [0, 1] to float32 [N, K].
    """

    weight: Tensor
    bias: Tensor
    steepness: Tensor
    about: Tensor

    def __init__(self, features: FeatureMap, classes: int) -> None:
        super().__init__()
        self.features = features
        self.classes = classes
        self.register_buffer("weight", torch.zeros(classes, features.dimension))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("steepness", torch.ones(()))
        told = json.dumps(asdict(MapDescription.of(features)), sort_keys=True).encode()
        self.register_buffer(_ABOUT, torch.tensor(list(told), dtype=torch.uint8))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits."""
        told = quantised(self.features(pixels))[:, : self.features.dimension]
        rows = told.float() * 2.0**-FRACTION_BITS
        return F.linear(rows, self.weight, self.bias) * self.steepness

    def with_head(self, head: Head, *, steepness: float = 1.0) -> dict[str, Tensor]:
        """Return this module's state with another head; the module is left as it is."""
        return {
            **{name: value.clone() for name, value in self.state_dict().items()},
            "weight": head.weight.float(),
            "bias": head.bias.float(),
            "steepness": torch.tensor(steepness),
        }


def load_classifier(state: Mapping[str, Tensor]) -> AnalyticClassifier:
    """Return the classifier whose state ``model.safetensors`` of an analytic run holds.

    Args:
        state: As ``safetensors.torch.load_file`` reads it.

    Raises:
        FedveilError: It is none, or the map cannot be made here.
    """
    try:
        about = json.loads(bytes(state[_ABOUT].tolist()))
        description = MapDescription(**about | {"shape": tuple(about["shape"])})
        classes = len(state["bias"])
    except (KeyError, TypeError, ValueError) as error:
        raise FedveilError(f"this state is no analytic classifier's ({error})") from None
    tensors = {
        name.removeprefix(_FEATURES): value
        for name, value in state.items()
        if name.startswith(_FEATURES)
    }
    module = AnalyticClassifier(rebuild(description, tensors), classes)
    module.load_state_dict(dict(state))
    return module.eval()


def sums_of(classifier: AnalyticClassifier, images: Images) -> Statistics:
    """Return the sums of images on a classifier's map.

    Args:
        classifier: Its head is not looked at.
        images: Any number.

    Raises:
        FedveilError: As ``rows_of``, or a label is out of range.
    """
    features = classifier.features
    rows = rows_of(features, images.raw)
    return Statistics.of(
        rows, images.labels, classes=classifier.classes, dimension=features.dimension
    )


def steepness_for(scores: Tensor, labels: Tensor) -> float:
    """Return the factor of scores whose softmax gives labels the greatest likelihood.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.

    Args:
        scores: Float [N, K].
        labels: int64 [N].
    """
    from scipy.optimize import minimize_scalar

    doubles = scores.double()

    def loss(exponent: float) -> float:
        return float(F.cross_entropy(doubles * 2**exponent, labels))

    found = minimize_scalar(loss, bounds=(-10, 14), method="bounded")
    return min(float(2**found.x), _STEEPEST)
