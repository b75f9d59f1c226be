import itertools
import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from fedveil.audit.metrics import (
    Interval,
    Ranks,
    area,
    bootstrap,
    exact,
    identified,
    label_accuracy,
    match,
    median,
    over_updates,
    psnr,
    recognised,
    roc_of_one,
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


def test_groups_are_told_by_their_own_strangers():
    torch.manual_seed(0)
    members, strangers = torch.rand(3, 5), torch.rand(3, 40) ** torch.tensor([[1.0], [4.0], [9.0]])
    found = recognised(members, strangers, among=7)
    for group in range(3):
        assert torch.equal(found[group], recognised(members[group], strangers[group], among=7))
    assert not torch.equal(found[0], recognised(members[0], strangers[1], among=7))


def test_chance_is_one_in_a_hundred():
    torch.manual_seed(0)
    assert recognised(torch.rand(4000), torch.rand(2000)).mean() == pytest.approx(0.01, abs=0.004)


@pytest.mark.parametrize("seed", range(4))
def test_the_operating_points_are_scikit_learns(seed):
    generator = torch.Generator().manual_seed(seed)
    members = torch.randn(300, generator=generator).add(0.7).mul(4).round()  # with ties
    strangers = torch.randn(1000, generator=generator).mul(4).round()
    scores, truth = torch.cat([members, strangers]), np.arange(1300) < 300
    row = roc_of_one(members, strangers)
    assert row.auc.value == pytest.approx(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    for rate, told in zip((0.01, 0.001), row.found, strict=True):
        assert told.value == pytest.approx(true[false <= rate + 1e-12].max())
        assert told.low - 1e-12 <= told.value <= told.high


def test_the_interval_of_the_area_covers_it():
    generator = torch.Generator().manual_seed(0)
    truth, inside = 0.76025, 0  # Φ(1 / √2)
    for _ in range(200):
        told = area(torch.randn(80, generator=generator) + 1, torch.randn(120, generator=generator))
        inside += told.low <= truth <= told.high
    assert 180 <= inside <= 200


def test_operating_points_of_many_updates_are_scikit_learns_of_each():
    generator = torch.Generator().manual_seed(0)
    members = torch.randn(5, 40, generator=generator).add(1).mul(4).round()
    strangers = torch.randn(5, 1000, generator=generator).mul(4).round()
    told = Ranks.of(members, strangers).roc()
    areas, found = [], {0.01: [], 0.001: []}
    for own, others in zip(members, strangers, strict=True):
        truth = np.arange(1040) < 40
        areas.append(roc_auc_score(truth, torch.cat([own, others])))
        false, true, _ = roc_curve(truth, torch.cat([own, others]), drop_intermediate=False)
        for rate, shares in found.items():
            shares.append(true[false <= rate + 1e-12].max())
    for interval, shares in zip((told.auc, *told.found), (areas, *found.values()), strict=True):
        assert interval.value == pytest.approx(np.mean(shares))
        by_hand = over_updates(torch.tensor(shares, dtype=torch.float64)[:, None].expand(5, 40))
        assert astuple(interval) == pytest.approx(astuple(by_hand))


def test_what_too_few_images_cannot_tell_is_not_told():
    strangers = torch.rand(4, 1000, generator=torch.Generator().manual_seed(0))
    few, many = torch.full((4, 4), 0.5), torch.full((4, 5), 0.5)
    assert Ranks.of(few, strangers).roc().found == (None, None)
    assert [told.value for told in Ranks.of(many, strangers).roc().found] == [0, 0]
    # A few members above all strangers do show something.
    assert [told.value for told in Ranks.of(few + 1, strangers).roc().found] == [1, 1]
    assert Ranks.of(few[:1] + 1, strangers[:1]).roc().found == (None, None)  # one update
    assert Ranks.of(many + 1, strangers[:, :999]).roc().found[1] is None
    assert Ranks.of(many + 1, strangers[:, :99]).roc().found == (None, None)
    assert "cannot tell" in Ranks.of(few, strangers).roc().as_text()
    row = Ranks.of(few, strangers).roc().as_json()
    assert {row[f"tpr_at_1{end}"] for end in ("", "_low", "_high")} == {None}


def test_scores_that_are_no_numbers_are_refused():
    """They lie above nobody and below nobody: shares of 0 % at an area of 1."""
    fine, odd = torch.randn(1, 30).double(), torch.full((1, 30), torch.nan).double()
    for members, strangers in ((odd, fine), (fine, odd)):
        with pytest.raises(FedveilError, match="30 of 60 scores of a membership attack are not"):
            Ranks.of(members, strangers)
        with pytest.raises(FedveilError, match="not numbers"):
            roc_of_one(members[0], strangers[0])
    Ranks.of(fine - torch.inf, fine)


def test_ranks_of_two_recordings_are_those_of_both():
    generator = torch.Generator().manual_seed(0)
    members, strangers = torch.rand(5, 8, generator=generator), torch.rand(5, 200)
    whole = Ranks.of(members, strangers)
    parts = [Ranks.of(members[:2], strangers[:2]), Ranks.of(members[2:], strangers[2:])]
    assert Ranks.joined(parts).roc() == whole.roc()


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
