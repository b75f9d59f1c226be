"""Which feature map an analytic run has, from its settings and the server's unlabelled images."""

import math
from dataclasses import asdict
from hashlib import sha256

import torch
from torch import Tensor

from fedveil.analytic import Statistics, quantised, ridge
from fedveil.data import Images, cache
from fedveil.features import (
    Dictionary,
    DictionaryOptions,
    EfficientNetLite0,
    FeatureMap,
    Mirrored,
    OwnFeatures,
    Shape,
    blocks_of_features,
    default_options,
    features_of,
    learn_dictionary,
    project,
)
from fedveil.features.efficientnet import STAGE_FEATURES
from fedveil.runs.config import TrainConfig

_MOST_FILTERS = 512  # unless asked for: 4,096 features, whose sums are 67 MB
_FEATURES_A_FILTER = 8
_MOST_COMPONENTS = 1_024  # whose sums are 4 MB

WHITENING = 0.3
"""Share of whitening of the components under noise: benchmarks/analytic_prior.py."""

MIRRORED_ERROR = 1.03
"""How many times greater mirroring may make the error: benchmarks/mirroring.py."""
# Part of the key of what is kept: raise it whenever the same settings make another dictionary.
_FORMAT = 1


def choose_features(config: TrainConfig, own: Images, *, images: int) -> FeatureMap:
    """Return the map that a configuration names, or a dictionary where it names none.

    Args:
        config: The run's settings.
        own: The server's images; of their labels hangs only whether mirror images are alike.
        images: Images of the smallest sum there will be, as far as is known.

    Raises:
        FedveilError: The map cannot be made.
    """
    channels, height, width = own.raw.shape[1:]
    inner = _inner(config, (channels, height, width), own, images)
    mirrored = config.backbone is not None and _mirrors(config, own)
    components = config.components
    if components is None and config.epsilon is not None:
        # Of fewer images for each component what whitening goes by is chance.
        components = max(1, min(_MOST_COMPONENTS, len(own) // 2))
    if components is not None:
        views = (own.raw, own.raw.flip(3)) if mirrored else (own.raw,)
        features = torch.cat([block for view in views for block in blocks_of_features(inner, view)])
        count = min(components, inner.dimension, len(own) - 1)
        inner = project(inner, features, count, whitening=WHITENING if config.epsilon else 0.0)
    return Mirrored(inner) if mirrored else inner


def _inner(config: TrainConfig, shape: Shape, own: Images, images: int) -> FeatureMap:
    if config.backbone is None:
        return _dictionary(config, shape, own, images)
    if config.backbone == EfficientNetLite0.name:
        return EfficientNetLite0(shape, config.resolution, config.stages or _stages(config, images))
    return OwnFeatures(shape, config.backbone)


def _stages(config: TrainConfig, images: int) -> int:
    """Return how many of the network's stages leave enough images for each feature."""
    if config.components or config.epsilon:
        return len(STAGE_FEATURES)  # what is sent are the components
    fitting = images / config.images_per_feature
    return max([1, *(stages for stages, count in STAGE_FEATURES.items() if count <= fitting)])


def _dictionary(config: TrainConfig, shape: Shape, own: Images, images: int) -> Dictionary:
    fitting = int(images / config.images_per_feature / _FEATURES_A_FILTER)
    if config.components or config.epsilon:
        fitting = _MOST_FILTERS  # what is sent are the components
    filters = config.filters or max(1, min(_MOST_FILTERS, fitting))
    options = default_options(shape, filters, mirrored=_mirrors(config, own))
    return _kept(own.raw, options, seed=config.seed)


def _mirrors(config: TrainConfig, own: Images) -> bool:
    if config.mirrored is not None:
        return config.mirrored
    return suits_mirroring(own, seed=config.seed)


def suits_mirroring(images: Images, *, seed: int) -> bool:
    """Return whether classes are told as well where an image and its mirror image are alike.

    So it is with photographs, and not with digits or classes that only a side tells apart.

    Args:
        images: The server's, at least 2, with their labels.
        seed: Seeds the dictionaries.
    """
    return mirroring_error(images, seed=seed) < MIRRORED_ERROR


def mirroring_error(images: Images, *, seed: int) -> float:
    """Return how many times greater the error is where mirror images are alike.

    By the generalised cross-validation errors of the ridges on two small dictionaries.

    Args:
        images: The server's, at least 2, with their labels.
        seed: Seeds the dictionaries.
    """
    some = images[:_MIRRORED_IMAGES]
    channels, height, width = some.raw.shape[1:]
    classes = int(some.labels.max()) + 1

    def error(*, mirrored: bool) -> float:
        options = default_options((channels, height, width), _MIRRORED_FILTERS, mirrored=mirrored)
        rows = quantised(features_of(learn_dictionary(some.raw, options, seed=seed), some.raw))
        return ridge(Statistics.of(rows, some.labels, classes=classes)).error

    plain = error(mirrored=False)
    return error(mirrored=True) / plain if plain else math.inf


_MIRRORED_IMAGES = 2_000
_MIRRORED_FILTERS = 8


def _kept(unlabelled: Tensor, options: DictionaryOptions, *, seed: int) -> Dictionary:
    """Return the dictionary of an earlier process, or make and keep it."""
    channels, height, width = unlabelled.shape[1:]
    content = sha256(unlabelled.contiguous().numpy().tobytes()).hexdigest()
    settings = asdict(options)
    key = cache.digest("dictionary", _FORMAT, content, settings, seed, torch.__version__)
    if found := cache.read(key):
        return Dictionary.rebuild((channels, height, width), settings, found[0])
    made = learn_dictionary(unlabelled, options, seed=seed)
    cache.write(key, made.sent(), [])
    return made
