"""Exact sums and the ridge of them, against scikit-learn and plain numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from fedveil.analytic import FRACTION_BITS, Layout, Statistics, quantised, ridge
from fedveil.errors import FedveilError
from fedveil.features.mirrored import of_views

UNIT = 2.0**-FRACTION_BITS


def made(images, dimension, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    centres = torch.randn(classes, dimension, generator=generator)
    features = centres[labels] + 2 * torch.randn(images, dimension, generator=generator) + 1
    return features, labels


def sums(features, labels, classes):
    return Statistics.of(quantised(features), labels, classes=classes)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 700), st.integers(1, 40), st.floats(1e-20, 1e20), st.integers(0, 2**31 - 1))
def test_no_image_has_a_norm_above_one_after_rounding(dimension, images, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, dimension, generator=generator) * scale
    features[torch.rand(images, dimension, generator=generator) < 0.5] = 0
    rows = quantised(features).double() * UNIT
    assert float(rows.norm(dim=1).max()) <= 1
    assert int(torch.iinfo(torch.int16).max) >= 2**FRACTION_BITS


def test_sums_are_those_of_whole_numbers():
    features, labels = made(300, 600, 3)  # more columns than one block of the Gram
    rows = quantised(features).numpy().astype(np.int64)
    assert abs(rows).max() <= 2**15  # so that no sum of 300 products passes 63 bits
    unit = np.eye(3, dtype=np.int64)[labels.numpy()]
    gram, moments = rows.T @ rows, rows.T @ unit
    found = sums(features, labels, 3)
    upper = gram[np.triu_indices(600)]
    counts = labels.bincount(minlength=3).numpy()
    whole = np.concatenate([upper, moments.ravel(), counts])
    assert torch.equal(found.words, torch.from_numpy(whole))
    assert found.images == 300
    assert np.array_equal(found.gram.numpy(), gram.astype(np.float64) * UNIT**2)
    assert np.array_equal(found.moments.numpy(), moments.astype(np.float64) * UNIT)


def test_sums_of_images_and_mirror_images_are_those_of_both_at_half_weight():
    upright, labels = made(200, 7, 3)
    mirrored, _ = made(200, 7, 3, seed=1)
    found = Statistics.of(quantised(of_views(upright, mirrored)), labels, classes=3, dimension=7)
    both = torch.cat([F.normalize(some.double(), dim=1) for some in (upright, mirrored)])
    unit = F.one_hot(labels.repeat(2), 3).double()
    assert found.gram.numpy() == pytest.approx((both.T @ both / 2).numpy(), abs=0.02)
    assert found.moments.numpy() == pytest.approx((both.T @ unit / 2).numpy(), abs=0.02)
    assert found.images == 200
    assert found.fault(images=200) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**31 - 1))
def test_an_image_with_its_mirror_image_adds_no_more_to_the_sums_than_one(dimension, seed):
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2, 1, dimension, generator=generator)
    row = quantised(of_views(*views))
    one = Statistics.of(row, torch.tensor([0]), classes=1, dimension=dimension)
    assert float(one.gram.norm()) <= 1
    assert float(one.moments.norm()) <= 1
    assert one.fault(images=1) is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=60, max_size=60), st.randoms())
def test_any_partition_in_any_order_gives_the_same_bits(owners, shuffler):
    features, labels = made(60, 9, 4)
    owners = torch.tensor(owners)
    parts = [sums(features[owners == k], labels[owners == k], 4) for k in range(7)]
    shuffler.shuffle(parts)
    together = sum(parts, Statistics.nothing(Layout(9, 4)))
    whole = sums(features, labels, 4)
    assert torch.equal(together.words, whole.words)
    assert torch.equal(ridge(together).weight, ridge(whole).weight)


def test_who_leaves_was_never_there():
    features, labels = made(400, 50, 5)
    stays, leaves = slice(0, 330), slice(330, 400)
    without = sums(features[stays], labels[stays], 5)
    all_ = without + sums(features[leaves], labels[leaves], 5)
    after = all_ - sums(features[leaves], labels[leaves], 5)
    for name in ("weight", "bias", "penalty", "error"):
        one, other = getattr(ridge(after), name), getattr(ridge(without), name)
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert not torch.equal(ridge(all_).weight, ridge(without).weight)


def test_the_largest_sum_allowed_does_not_overflow():
    from fedveil.analytic import MOST_IMAGES

    assert MOST_IMAGES * 2 ** (2 * FRACTION_BITS) < 2**63
    one = Statistics.of(torch.tensor([[2**FRACTION_BITS]]).short(), torch.tensor([0]), classes=1)
    assert int(one.words[0]) * MOST_IMAGES == int(one.words[0] * MOST_IMAGES)


@pytest.mark.parametrize("penalty", [1e-3, 0.5, 20.0])
def test_the_ridge_is_that_of_pooled_features(penalty):
    features, labels = made(500, 30, 4)
    rows = quantised(features).double().numpy() * UNIT
    oracle = Ridge(alpha=penalty).fit(rows, np.eye(4)[labels.numpy()])
    head = ridge(sums(features, labels, 4), penalty=penalty)
    np.testing.assert_allclose(head.weight, oracle.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(head.bias, oracle.intercept_, rtol=1e-7, atol=1e-9)


def test_gcv_is_the_formula_with_the_hat_matrix():
    features, labels = made(80, 20, 3)
    head = ridge(sums(features, labels, 3))
    rows = quantised(features).double().numpy() * UNIT
    unit = np.eye(3)[labels.numpy()]

    def error(penalty):
        centred = rows - rows.mean(0)
        inner = centred.T @ centred + penalty * np.eye(20)
        hat = centred @ np.linalg.solve(inner, centred.T) + np.full((80, 80), 1 / 80)
        left = np.square(unit - hat @ unit).sum() / 80
        return left / (1 - np.trace(hat) / 80) ** 2

    assert head.error == pytest.approx(error(head.penalty), rel=1e-9)
    around = [error(head.penalty * 2 ** (step / 4)) for step in range(-12, 13)]
    assert head.error <= min(around) * (1 + 1e-9)


def test_a_class_that_nobody_has_is_never_the_best():
    features, labels = made(200, 10, 3)
    head = ridge(sums(features, labels, 4))
    rows = quantised(features).double() * UNIT
    assert int((rows @ head.weight.T + head.bias).argmax(1).max()) < 3


def test_honest_sums_have_no_fault_and_made_up_ones_do():
    features, labels = made(60, 8, 3)
    honest = sums(features, labels, 3)
    assert honest.fault(images=60) is None
    assert "says" in honest.fault(images=61)
    for place, value in ((0, -1), (0, 2**62), (1, 2**40), (40, 2**40), (36 + 24, -5), (-1, 2**62)):
        words = honest.words.clone()
        words[place] = value
        assert Statistics(honest.layout, words).fault(images=60)
    assert (honest + honest).fault(images=60)


def test_what_cannot_be_is_refused():
    features, labels = made(10, 4, 3)
    with pytest.raises(FedveilError, match="labels run from 0 to 2"):
        sums(features, labels, 2)
    with pytest.raises(FedveilError, match="at least 2"):
        ridge(Statistics.nothing(Layout(4, 3)))
    with pytest.raises(FedveilError, match="penalty"):
        ridge(sums(features, labels, 3), penalty=0.0)
    with pytest.raises(FedveilError, match="int64"):
        Statistics(Layout(4, 3), torch.zeros(5, dtype=torch.int64))
