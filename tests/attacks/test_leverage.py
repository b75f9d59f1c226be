"""Leverage tells who is in a sum of few images; public images trace who is in far larger ones."""

import pytest
import torch

from fedveil.analytic import Statistics, quantised
from fedveil.analytic.privacy import GaussianRelease, traceable
from fedveil.attacks.membership.leverage import Column, Leverage, Tracing
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
    # Of 42 members one release's area is uncertain by 0.05.
    areas = [told(0.7, GaussianRelease(1.0)) for _ in range(8)]
    assert sum(areas) / len(areas) < 0.64


def traced(count, public, release=None):
    """The area and the share found at 1 % by whoever has public images."""
    rows, labels = images(count, 0)
    sums = Statistics.of(rows, labels, classes=CLASSES)
    noise = 0.0
    if release:
        sums = release.noised(sums, SecureGenerator(), most_images=1, sharers=1)
        noise = release.scale(1)
    known = Statistics.of(*images(public, 2), classes=CLASSES)
    attack = Tracing(noise=noise)

    def scores(rows, labels):
        return attack(sums, rows, labels, images=count, public=known)

    found = roc_of_one(scores(rows[:1000], labels[:1000]), scores(*images(1000, 1)))
    return found.auc.value, found.found[0].value


@pytest.mark.parametrize(("count", "public"), [(240, 240), (600, 600), (600, 3000), (2400, 2400)])
def test_public_images_trace_who_is_in_a_sum_as_far_as_the_formula_says(count, public):
    area, found = traceable(DIMENSION, images=count, public=public)
    got = traced(count, public)
    assert got[0] == pytest.approx(area, abs=0.06)
    assert got[1] == pytest.approx(found, abs=0.15)
    if count == 600:
        assert got[0] > told(count / DIMENSION) + 0.1


@pytest.mark.parametrize(
    ("classes", "count", "public"), [(200, 2400, 2400), (200, 6000, 6000), (600, 600, 600)]
)
def test_of_many_classes_each_ones_sum_is_of_few_images(monkeypatch, classes, count, public):
    """The sum of all images hides them from tracing, and the sums of classes show them."""
    monkeypatch.setattr("tests.attacks.test_leverage.CLASSES", classes)
    rows, labels = images(count, 0)
    others = images(1000, 1)
    sums = Statistics.of(rows, labels, classes=classes)
    known = Statistics.of(*images(public, 2), classes=classes)
    attack = Column()
    found = roc_of_one(
        attack(sums, rows[:1000], labels[:1000], public=known), attack(sums, *others, public=known)
    )
    area, share = traceable(DIMENSION, images=count, public=public, classes=classes)
    assert found.auc.value == pytest.approx(area, abs=0.05)
    assert found.found[0].value == pytest.approx(share, abs=0.1)
    assert area > traceable(DIMENSION, images=count, public=public)[0] + 0.1
    assert found.auc.value > traced(count, public)[0] + 0.1


def test_an_image_of_a_class_that_no_sum_has_is_in_none():
    rows, labels = images(200, 0)
    kept = labels != 2
    sums = Statistics.of(rows[kept], labels[kept], classes=CLASSES)
    known = Statistics.of(*images(200, 2), classes=CLASSES)
    scores = Column()(sums, *images(50, 1), public=known)
    assert bool((scores[images(50, 1)[1] == 2] == -torch.inf).all())
    assert not bool(scores.isnan().any())


def test_noise_hides_members_from_whoever_has_public_images():
    assert traced(600, 3000)[0] > 0.85
    for epsilon in (1.0, 4.0):
        release = GaussianRelease(epsilon)
        assert traced(600, 3000, release)[0] < release.allows[0] + 0.04
    # Noise far below what any promise needs leaves something to trace.
    assert traced(600, 3000, GaussianRelease(1000.0))[0] > 0.7
