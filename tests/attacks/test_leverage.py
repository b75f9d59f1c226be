"""Leverage tells who is in a sum of few images, and ever less of larger ones."""

import pytest
import torch

from fedveil.analytic import Statistics, quantised
from fedveil.analytic.privacy import GaussianRelease
from fedveil.attacks.membership.leverage import Leverage
from fedveil.audit.metrics import roc_of_one
from fedveil.secure_random import SecureGenerator

DIMENSION, CLASSES = 60, 4


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(3, 0.1, DIMENSION)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    features = torch.randn(count, DIMENSION, generator=generator) * scale + 0.5
    return quantised(features), labels


def told(ratio, release=None):
    """The area under the ROC of members of a sum with so many images a feature."""
    count = int(ratio * DIMENSION)
    rows, labels = images(count, 0)
    sums = Statistics.of(rows, labels, classes=CLASSES)
    if release:
        sums = release.noised(sums, SecureGenerator(), most_images=1, sharers=1)
    strangers = images(1000, 1)
    attack = Leverage()
    members = attack(sums, rows[:1000], labels[:1000])
    return roc_of_one(members, attack(sums, *strangers)).auc.value


def test_of_fewer_images_than_features_every_member_is_certain():
    assert told(0.7) == 1.0


def test_the_larger_the_sum_the_less_it_tells():
    areas = [told(ratio) for ratio in (1.5, 4, 16, 64)]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > 0.95
    assert areas[-1] < 0.6


def test_a_member_has_a_leverage_of_one_at_most():
    rows, labels = images(200, 0)
    sums = Statistics.of(rows, labels, classes=CLASSES)
    assert float(Leverage(ridge=1e-12)(sums, rows, labels).min()) >= -1 - 1e-6


def test_noise_hides_members_even_of_small_sums():
    assert told(0.7, GaussianRelease(1.0)) == pytest.approx(0.5, abs=0.15)
