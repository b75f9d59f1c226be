"""The noise of a release against an independent accountant, and what it is of."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedveil.analytic import FRACTION_BITS, Layout, Statistics, quantised
from fedveil.analytic.privacy import (
    GaussianRelease,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_sigma,
    noise_sharers,
    noisy_fault,
)
from fedveil.analytic.ridge import noisy_ridge, ridge
from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator


def isometric(sums):
    """A sum as a vector as long as (G, H) in Frobenius norm."""
    upper = sums.words[: sums.layout.triangle].double() * 2.0 ** (-2 * FRACTION_BITS)
    diagonal = [place.start for _, place in sums.layout.rows()]
    scaled = upper * math.sqrt(2)
    scaled[diagonal] = upper[diagonal]
    return torch.cat([scaled, sums.moments.flatten()])


@pytest.mark.parametrize("epsilon", [0.1, 0.93, 2.0, 8.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_noise_is_what_an_independent_accountant_says(epsilon, delta):
    from dp_accounting import dp_event
    from dp_accounting.pld import pld_privacy_accountant

    sigma = gaussian_sigma(epsilon, delta)
    accountant = pld_privacy_accountant.PLDAccountant()
    accountant.compose(dp_event.GaussianDpEvent(sigma))
    assert accountant.get_epsilon(delta) == pytest.approx(epsilon, rel=2e-3)
    assert gaussian_epsilon(sigma, delta) == pytest.approx(epsilon, rel=1e-6)
    again = pld_privacy_accountant.PLDAccountant()
    again.compose(dp_event.GaussianDpEvent(sigma), 3)
    spent = GaussianRelease(epsilon, delta).spent(3)
    assert again.get_epsilon(delta) == pytest.approx(spent, rel=2e-3)
    assert spent > epsilon


@given(st.floats(0.01, 100), st.floats(1e-12, 0.5))
def test_no_less_noise_would_do(epsilon, delta):
    sigma = gaussian_sigma(epsilon, delta)
    assert gaussian_delta(epsilon, sigma) == pytest.approx(delta, rel=1e-3)
    assert gaussian_delta(epsilon, sigma * 0.99) > delta


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**31 - 1), st.integers(1, 9))
def test_no_images_add_more_than_is_said(dimension, seed, images):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, dimension, generator=generator)
    features[0] = 0
    features[0, 0] = 1.0  # the worst: a single feature
    labels = torch.zeros(images, dtype=torch.int64)
    sums = Statistics.of(quantised(features), labels, classes=2)
    assert float(isometric(sums).norm()) <= math.sqrt(2) * images
    release = GaussianRelease(1.0, unit="client")
    assert release.scale(images) == pytest.approx(release.multiplier * math.sqrt(2) * images)
    assert GaussianRelease(1.0).scale(images) == release.multiplier * math.sqrt(2)


@pytest.mark.parametrize("sharers", [1, 4])
def test_shares_of_noise_are_normal_and_add_up(sharers):
    layout = Layout(150, 7)
    release = GaussianRelease(2.0)
    parts = [
        release.noised(
            Statistics.nothing(layout), SecureGenerator(), most_images=1, sharers=sharers
        )
        for _ in range(sharers)
    ]
    found = isometric(sum(parts[1:], parts[0])) / release.scale(1)
    assert stats.kstest(found.numpy(), "norm").pvalue > 1e-4
    assert not parts[0].counts.any()
    gram = sum(parts[1:], parts[0]).gram
    off = gram[np.triu_indices(150, 1)]
    assert float(off.std()) == pytest.approx(release.scale(1) / math.sqrt(2), rel=0.05)


def test_the_same_client_never_draws_the_same_noise():
    layout, release = Layout(3, 2), GaussianRelease(1.0)
    nothing = Statistics.nothing(layout)
    one, other = (
        release.noised(nothing, SecureGenerator(), most_images=1, sharers=1) for _ in range(2)
    )
    assert not torch.equal(one.words, other.words)


def test_half_of_a_sums_clients_make_the_noise():
    assert [noise_sharers(clients) for clients in (None, 3, 10, 101)] == [1, 2, 5, 51]


def test_the_noisy_ridge_is_the_plain_one_of_what_it_was_given():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (4000,), generator=generator)
    features = torch.randn(3, 12, generator=generator)[labels]
    features = features + torch.randn(4000, 12, generator=generator)
    rows = quantised(features)
    sums = Statistics.of(rows, labels, classes=3)
    release = GaussianRelease(2.0)
    noisy = release.noised(sums, SecureGenerator(), most_images=1, sharers=1)
    scores = rows.double() @ noisy_ridge(noisy, noise=release.scale(1)).weight.T
    plain = rows.double() @ noisy_ridge(sums, noise=release.scale(1)).weight.T
    right = [float((s.argmax(1) == labels).double().mean()) for s in (scores, plain)]
    assert right[0] > right[1] - 0.03
    phi, unit = rows.double().numpy() * 2.0**-FRACTION_BITS, np.eye(3)[labels.numpy()] - 1 / 3
    penalty = math.sqrt(24) * release.scale(1)
    oracle = np.linalg.solve(phi.T @ phi + penalty * np.eye(12), phi.T @ unit)
    np.testing.assert_allclose(
        noisy_ridge(sums, noise=release.scale(1)).weight.T, oracle, rtol=1e-8
    )


def _uneven(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(3, (count,), generator=generator)
    centres = torch.randn(3, 40, generator=torch.Generator().manual_seed(9))
    features = centres[labels] + 2 * torch.randn(count, 40, generator=generator)
    return quantised(features * torch.logspace(0, -1, 40)), labels


def test_public_images_count_by_their_precision():
    generator = torch.Generator().manual_seed(0)
    (rows, labels), (others, names) = _uneven(500, generator), _uneven(200, generator)
    sums, public = (Statistics.of(*some, classes=3) for some in ((rows, labels), (others, names)))
    noise = 4.0
    mine, theirs = sums.gram.numpy(), public.gram.numpy() * 500 / 200
    expected, shares = np.empty_like(mine), np.empty_like(mine)
    unit = sums.moments.numpy() - sums.moments.numpy().sum(1, keepdims=True) / 3
    other = public.moments.numpy() - public.moments.numpy().sum(1, keepdims=True) / 3
    phi = others.double().numpy() * 2.0**-FRACTION_BITS
    targets = np.eye(3)[names.numpy()] - 1 / 3
    for i in range(40):
        for j in range(40):
            theirs_variance = theirs[i, i] * theirs[j, j] / 200
            share = theirs_variance / (theirs_variance + noise**2 / 2)
            expected[i, j] = share * mine[i, j] + (1 - share) * theirs[i, j]
            shares[i, j] = share
    of_moments = np.empty((40, 3))
    for i in range(40):
        for c in range(3):
            variance = 500**2 / 200 * (phi[:, i] ** 2).mean() * (targets[:, c] ** 2).mean()
            share = variance / (variance + noise**2)
            of_moments[i, c] = share
            unit[i, c] = share * unit[i, c] + (1 - share) * other[i, c] * 500 / 200
    head = noisy_ridge(sums, noise=noise, images=500, public=public)
    oracle = np.linalg.solve(expected + head.penalty * np.eye(40), unit)
    np.testing.assert_allclose(head.weight.T, oracle, rtol=1e-8)
    other_penalty = ridge(public).penalty * 500 / 200 * (1 - of_moments.mean())
    draws = np.random.default_rng(0).normal(size=(400, 40, 40)) * noise
    beside = np.triu(draws, 1) / math.sqrt(2)
    symmetric = beside + beside.transpose(0, 2, 1) + draws * np.eye(40)
    lengths = np.linalg.norm(symmetric * shares, ord=2, axis=(1, 2))
    length = head.penalty - other_penalty
    assert abs(length - lengths.mean()) < 3 * lengths.std() / math.sqrt(4)
    drowned = noisy_ridge(sums, noise=1e9, images=500, public=public)
    gram, least = public.gram.numpy(), ridge(public).penalty * np.eye(40)
    np.testing.assert_allclose(drowned.weight.T, np.linalg.solve(gram + least, other), rtol=1e-3)


def test_made_up_noisy_sums_are_found_out():
    layout, release = Layout(20, 3), GaussianRelease(1.0)
    honest = release.noised(Statistics.nothing(layout), SecureGenerator(), most_images=1, sharers=1)
    assert noisy_fault(honest, images=5, scale=release.scale(1)) is None
    for place, value in ((0, 2**60), (layout.triangle, -(2**40)), (-1, 1)):
        words = honest.words.clone()
        words[place] = value
        assert noisy_fault(Statistics(layout, words), images=5, scale=release.scale(1))


def test_numbers_out_of_range_are_named():
    for wrong in ({"epsilon": 0}, {"epsilon": 1, "delta": 1}, {"epsilon": 1, "unit": "user"}):
        with pytest.raises(FedveilError, match=r"epsilon|delta|unit"):
            GaussianRelease(**wrong)
    with pytest.raises(FedveilError, match="noise"):
        noisy_ridge(Statistics.nothing(Layout(2, 2)), noise=0.0)
