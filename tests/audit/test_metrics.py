import itertools
import math

import pytest
import torch
from scipy.stats import binomtest

from fedveil.audit.metrics import (
    Interval,
    bootstrap,
    exact,
    identified,
    label_accuracy,
    match,
    median,
    over_updates,
    psnr,
    recognised,
    ssim,
    wilson,
)
from fedveil.data import load_dataset
from fedveil.errors import FedveilError


def test_psnr_by_hand():
    reference = torch.full((2, 1, 4, 4), 0.5)
    images = reference + torch.tensor([0.1, 0.001]).reshape(2, 1, 1, 1)
    assert psnr(images, reference).tolist() == pytest.approx([20, 60], abs=1e-3)
    assert psnr(reference, reference).tolist() == [200, 200]


def test_exact_is_over_40_db():
    reference = torch.full((2, 1, 4, 4), 0.5)
    images = reference + torch.tensor([0.0099, 0.0101]).reshape(2, 1, 1, 1)
    assert exact(images, reference).tolist() == [True, False]


@pytest.mark.parametrize("size", [8, 9, 16])
def test_ssim_of_constant_images_by_hand(size):
    one, other = torch.full((1, 1, size, size), 0.5), torch.full((1, 1, size, size), 0.25)
    constant = 0.01**2
    expected = (2 * 0.5 * 0.25 + constant) / (0.5**2 + 0.25**2 + constant)
    assert ssim(one, other).item() == pytest.approx(expected, rel=1e-6)
    assert ssim(one, one).item() == pytest.approx(1)


def test_ssim_falls_with_noise():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 32, 32)
    scores = [ssim(image + s * torch.randn_like(image), image).item() for s in (0.0, 0.1, 0.5)]
    assert scores[0] > scores[1] > scores[2]


def test_identification():
    def grey(*values):
        return torch.stack([torch.full((1, 2, 2), value) for value in values])

    found = grey(0.1, 0.5, 7.0, 0.95).reshape(2, 2, 1, 2, 2)
    strangers = grey(0.25, 0.7)
    # 0 and 0.4 by 0.1 and 0.5; 1 by 0.95; 0.2 is nearest to nothing of its own update.
    originals = grey(0.0, 0.4, 1.0, 0.2)
    assert identified(found, originals, strangers).tolist() == [1, 1, 1, 0]


def test_identification_is_the_mean_over_draws_of_strangers():
    torch.manual_seed(0)
    found, originals = torch.rand(3, 2, 1, 2, 2), torch.rand(6, 1, 2, 2)
    strangers = torch.rand(6, 1, 2, 2)

    def nearest(candidate, images):
        return min(float((candidate - image).square().sum()) for image in images)

    by_hand = []
    for place, own in enumerate(originals):
        images = found[place // 2]
        draws = list(itertools.combinations(strangers, 3))
        wins = sum(all(nearest(own, images) < nearest(s, images) for s in draw) for draw in draws)
        by_hand.append(wins / len(draws))
    assert identified(found, originals, strangers, among=4).tolist() == pytest.approx(by_hand)
    assert 0 < sum(by_hand) < 6


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_images_without_content_identify_one_in_a_hundred_whatever_the_batch(batch):
    """Matched by the truth first, as this scorer once did, batches of 64 identify far more."""
    data = load_dataset("digits")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    pixels = data.train[order].pixels
    originals, strangers = pixels[:320], pixels[320:815]
    found = pixels[815:1135].reshape(320 // batch, batch, 1, 8, 8)
    assert float(identified(found, originals, strangers).mean()) == pytest.approx(0.01, abs=0.008)
    matched = torch.cat([match(f, o) for f, o in zip(found, originals.split(batch), strict=True)])
    candidates = torch.cat([originals, strangers]).flatten(1)
    turns = (torch.arange(320)[:, None] + torch.arange(100)) % len(candidates)
    distances = torch.cdist(matched.flatten(1), candidates).gather(1, turns)
    before = float((distances.argmin(dim=1) == 0).float().mean())
    assert (before > 0.05) == (batch > 1)


def test_images_of_which_nothing_is_known_identify_nothing():
    nowhere = torch.full((1, 1, 1, 2, 2), torch.nan)
    assert identified(nowhere, torch.zeros(1, 1, 2, 2), torch.ones(5, 1, 2, 2)).tolist() == [0]


def test_updates_that_all_agree_are_no_certainty():
    interval = over_updates(torch.ones(4, 16))
    oracle = binomtest(4, 4).proportion_ci(0.95, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((oracle.low, oracle.high))
    assert over_updates(torch.ones(1, 16)) == Interval(1.0, 0.0, 1.0)


def test_standing_out_is_the_mean_over_all_draws_of_strangers():
    strangers = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    members = torch.tensor([0.5, 3.5, 4.5, 9.0])
    by_hand = [
        sum(all(s < m for s in drawn) for drawn in itertools.combinations(strangers.tolist(), 3))
        / 10
        for m in members.tolist()
    ]
    assert by_hand == [0, 0.1, 0.4, 1]
    assert recognised(members, strangers, among=4).tolist() == pytest.approx(by_hand)
    assert recognised(members, strangers).tolist() == [0, 0, 0, 1]


def test_chance_is_one_in_a_hundred():
    torch.manual_seed(0)
    assert recognised(torch.rand(4000), torch.rand(2000)).mean() == pytest.approx(0.01, abs=0.004)


def test_label_accuracy_ignores_order_and_counts_repeats():
    labels = torch.tensor([[1, 2, 2, 5], [0, 0, 0, 0]])
    truth = torch.tensor([[2, 1, 3, 2], [0, 1, 0, 2]])
    assert label_accuracy(labels, truth).tolist() == [0.75, 0.5]


def test_match_undoes_a_permutation():
    torch.manual_seed(0)
    reference = torch.rand(5, 1, 4, 4)
    shuffled = reference[torch.tensor([3, 1, 0, 4, 2])] + 0.01
    assert torch.allclose(match(shuffled, reference), reference + 0.01)


def test_bootstrap_of_the_mean_agrees_with_the_normal_interval():
    torch.manual_seed(0)
    values = torch.randn(400, dtype=torch.float64)
    interval = bootstrap(values)
    half = 1.96 * float(values.std()) / math.sqrt(400)
    assert interval.value == pytest.approx(float(values.mean()))
    assert interval.low == pytest.approx(interval.value - half, abs=0.02)
    assert interval.high == pytest.approx(interval.value + half, abs=0.02)


def test_bootstrap_of_the_median():
    interval = bootstrap(torch.tensor([1.0, 2.0, 3.0, 100.0]), statistic=median)
    assert interval.value == 2.5
    assert interval.low >= 1
    assert interval.high <= 100
    constant = bootstrap(torch.ones(5))
    assert (constant.value, constant.low, constant.high) == (1, 1, 1)


@pytest.mark.parametrize(("hits", "count"), [(0, 100), (100, 100), (99, 100), (3, 8), (0, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_share_has_scipys_score_interval(hits, count, level):
    values = torch.arange(count) < hits
    interval = wilson(values, level=level)
    oracle = binomtest(hits, count).proportion_ci(level, method="wilson")
    assert interval.value == hits / count
    assert (interval.low, interval.high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_share_of_all_by_hand():
    # Without a miss the lower bound is n / (n + z²).
    assert wilson(torch.ones(100)).low == pytest.approx(100 / (100 + 1.959963984540054**2))


def test_refusals():
    with pytest.raises(FedveilError, match="no values"):
        wilson(torch.zeros(0))
    with pytest.raises(FedveilError, match="no values"):
        bootstrap(torch.zeros(0))
    with pytest.raises(FedveilError, match="cannot be compared"):
        psnr(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3))
