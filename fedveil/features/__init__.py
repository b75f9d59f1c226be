"""Feature maps that nobody's secret is in: public, the user's own, or made of unlabelled images."""

import json
from collections.abc import Callable, Mapping

from torch import Tensor

from fedveil.errors import FedveilError
from fedveil.features.dictionary import (
    Dictionary,
    DictionaryOptions,
    default_options,
    learn_dictionary,
    tells_mirror_images,
)
from fedveil.features.efficientnet import EfficientNetLite0
from fedveil.features.own import OwnFeatures
from fedveil.features.protocol import (
    FeatureMap,
    MapDescription,
    Options,
    Shape,
    features_of,
)

Rebuild = Callable[[Shape, Options, Mapping[str, Tensor]], FeatureMap]

MAPS: Mapping[str, Rebuild] = {
    Dictionary.name: Dictionary.rebuild,
    EfficientNetLite0.name: EfficientNetLite0.rebuild,
}
"""How a client makes the map that it is told of, by name."""


def rebuild(description: MapDescription, tensors: Mapping[str, Tensor]) -> FeatureMap:
    """Return the map that a description is of, number for number.

    Args:
        description: What the server told.
        tensors: What it sent: ``FeatureMap.sent``.

    Raises:
        FedveilError: The name is unknown, or what this machine makes is another map.
    """
    name = description.name
    make = MAPS.get(name) or (OwnFeatures.rebuild if ":" in name else None)
    if make is None:
        raise FedveilError(
            f"feature map {name!r} is unknown; known: {', '.join(MAPS)}, or package.module:factory"
        )
    try:
        options = json.loads(description.options)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise FedveilError(f"the options of feature map {name!r} are no JSON object")
    made = make(description.shape, options, tensors)
    if (own := MapDescription.of(made).digest) != description.digest:
        raise FedveilError(
            f"feature map {name!r} is another one here than on the server: SHA-256 {own}, told "
            f"{description.digest}; install the same weights and the same versions on both sides"
        )
    return made


__all__ = [
    "MAPS",
    "Dictionary",
    "DictionaryOptions",
    "EfficientNetLite0",
    "FeatureMap",
    "MapDescription",
    "OwnFeatures",
    "default_options",
    "features_of",
    "learn_dictionary",
    "rebuild",
    "tells_mirror_images",
]
