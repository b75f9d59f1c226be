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
from fedveil.features.kept import blocks_of_features, slow_beneath
from fedveil.features.mirrored import Mirrored
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
    names, options = [description.name], description.options
    while names[-1] in _OF_ANOTHER:
        found = _options(names[-1], options)
        names.append(str(found.get("name")))
        options = str(found.get("options"))
    return tuple(names)


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


def _inner(options: Options, tensors: Mapping[str, Tensor], shape: Shape) -> FeatureMap:
    name = str(options.get("name"))
    if name == Mirrored.name:
        raise FedveilError(f"feature map {name!r} is never beneath another; the server sent that")
    return _made(name, shape, str(options.get("options")), inner_tensors(tensors))


def _projected(shape: Shape, options: Options, tensors: Mapping[str, Tensor]) -> FeatureMap:
    if options.get("name") == Projected.name or not {"mean", "components"} <= set(tensors):
        raise FedveilError("the projection that came cannot be read")
    return Projected(_inner(options, tensors, shape), tensors["mean"], tensors["components"])


def _mirrored(shape: Shape, options: Options, tensors: Mapping[str, Tensor]) -> FeatureMap:
    return Mirrored(_inner(options, tensors, shape))


_OF_ANOTHER: Mapping[str, Rebuild] = {Projected.name: _projected, Mirrored.name: _mirrored}

_MAKERS: Mapping[str, Rebuild] = {**MAPS, **_OF_ANOTHER}


__all__ = [
    "MAPS",
    "Dictionary",
    "DictionaryOptions",
    "EfficientNetLite0",
    "FeatureMap",
    "MapDescription",
    "Mirrored",
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
    "slow_beneath",
]
