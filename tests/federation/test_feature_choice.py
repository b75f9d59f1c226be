"""What an analytic run's map is made as, where nothing is asked for."""

import pytest
import torch

from fedveil.data import Images, load_dataset
from fedveil.features import Dictionary
from fedveil.federation.feature_choice import choose_features, suits_mirroring
from fedveil.runs.config import TrainConfig


def corners(count=80, side=16):
    """Four classes: a bright square in one of four corners."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 60, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    for image, label in zip(raw, labels.tolist(), strict=True):
        row, column = ((side - 4) * (label // 2), (side - 4) * (label % 2))
        image[:, row : row + 4, column : column + 4] = 220
    return Images(raw, labels)


def stripes(count=80, side=16):
    """Two classes: stripes that rise or lie, wherever they begin."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 200, (count, 1, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    for image, label in zip(raw, labels.tolist(), strict=True):
        start = int(torch.randint(4, (1,), generator=generator))
        (image.mT if label else image)[:, start::4] = 220
    return Images(raw, labels)


def test_mirror_images_are_alike_where_no_class_hangs_on_the_side():
    assert suits_mirroring(stripes(), seed=0)
    assert not suits_mirroring(load_dataset("digits", seed=0).test, seed=0)
    # As a whole these are what their mirror images are; each class is not.
    assert not suits_mirroring(corners(), seed=0)


@pytest.mark.parametrize(("images", "filters"), [(3_200, 50), (50, 1), (10**6, 512)])
def test_there_are_as_many_filters_as_leave_eight_images_a_feature(images, filters):
    features = choose_features(TrainConfig(), corners(), images=images)
    assert isinstance(features, Dictionary)
    assert features.settings.filters == filters
    assert not features.settings.mirrored


@pytest.mark.parametrize(
    ("images", "settings", "dimension"),
    [
        (100, {}, 1280),
        (8 * 3584, {}, 3584),
        (8 * 3584 - 1, {}, 3104),
        (10**6, {}, 4064),
        (10**6, {"stages": 2}, 2432),
        (16 * 3584, {"images_per_feature": 16}, 3584),
    ],
)
def test_as_many_stages_of_the_backbone_are_looked_at_as_images_allow(images, settings, dimension):
    config = TrainConfig.check({"backbone": "efficientnet-lite0", **settings})
    assert choose_features(config, corners(4), images=images).dimension == dimension


def test_a_backbone_looks_at_mirror_images_where_they_are_told_as_well_or_it_is_asked_for():
    def width(images, **settings):
        config = TrainConfig.check({"backbone": "efficientnet-lite0", **settings})
        features = choose_features(config, images, images=100)
        return features.width // features.dimension

    assert width(stripes()) == 2
    assert width(stripes(), mirrored=False) == 1
    assert width(corners()) == 1
    assert width(corners(), mirrored=True) == 2
