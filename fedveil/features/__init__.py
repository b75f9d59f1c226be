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
)
from fedveil.features.efficientnet import EfficientNetLite0
from fedveil.features.kept import blocks_of_features
from fedveil.features.own import OwnFeatures
from fedveil.features.projected import Projected, inner_tensors, project
from fedveil.features.protocol import (
    FeatureMap,
    MapDescription,
    Options,
    features_of,
)
from fedveil.types import Shape

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
    made = _made(name, description.shape, description.options, tensors)
    if (own := MapDescription.of(made).digest) != description.digest:
        raise FedveilError(
            f"feature map {name!r} is another one here than on the server: SHA-256 {own}, told "
            f"{description.digest}; install the same weights and the same versions on both sides"
        )
    return made


def names_of(description: MapDescription) -> tuple[str, ...]:
    """Return the names of all maps that a description is made of, the outer one first."""
    options = _options(description.name, description.options)
    inner = str(options.get("name", "")) if description.name == Projected.name else ""
    return (description.name, inner) if inner else (description.name,)


def _made(name: str, shape: Shape, options: str, tensors: Mapping[str, Tensor]) -> FeatureMap:
    make = _MAKERS.get(name) or (OwnFeatures.rebuild if ":" in name else None)
    if make is None:
        raise FedveilError(
            f"feature map {name!r} is unknown; known: {', '.join(MAPS)}, or package.module:factory"
        )
    return make(shape, _options(name, options), tensors)


def _options(name: str, text: str) -> Options:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise FedveilError(f"the options of feature map {name!r} are no JSON object")
    return options


def _projected(shape: Shape, options: Options, tensors: Mapping[str, Tensor]) -> FeatureMap:
    name, inner = str(options.get("name")), str(options.get("options"))
    if name == Projected.name or not {"mean", "components"} <= set(tensors):
        raise FedveilError("the projection that came cannot be read")
    made = _made(name, shape, inner, inner_tensors(tensors))
    return Projected(made, tensors["mean"], tensors["components"])


_MAKERS: Mapping[str, Rebuild] = {**MAPS, Projected.name: _projected}


__all__ = [
    "MAPS",
    "Dictionary",
    "DictionaryOptions",
    "EfficientNetLite0",
    "FeatureMap",
    "MapDescription",
    "OwnFeatures",
    "Projected",
    "Shape",
    "blocks_of_features",
    "default_options",
    "features_of",
    "learn_dictionary",
    "names_of",
    "project",
    "rebuild",
]
