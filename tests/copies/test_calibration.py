import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from fedveil.copies.calibration import (
    _log_evidence,
    agreement_margin,
    below_cap,
    certifiable,
    raise_until_below,
    search_sigma,
)
from fedveil.errors import FedveilError


def blocks(accuracy, *, images=2_000, block=100, seed=0):
    generator = random.Random(seed)
    for _ in range(images // block):
        yield sum(generator.random() < accuracy for _ in range(block)), block


@given(
    correct=st.integers(0, 60),
    wrong=st.integers(0, 60),
    cap=st.floats(0.05, 0.95, exclude_max=True),
)
def test_evidence_is_the_averaged_likelihood_ratio(correct, wrong, cap):
    ratio, _ = integrate.quad(
        lambda p: (p / cap) ** correct * ((1 - p) / (1 - cap)) ** wrong, 0, 1, limit=200
    )
    assert _log_evidence(correct, correct + wrong, cap) == pytest.approx(math.log(ratio), abs=1e-6)


def test_a_copy_at_the_cap_passes_hardly_ever():
    passed = sum(below_cap(blocks(0.6, seed=seed), 0.6).below for seed in range(2_000))
    assert passed <= 8  # at most 1 in 1,000; 8 of 2,000 has a chance below 0.1 %


def test_a_clear_copy_is_decided_on_few_images():
    verdicts = [below_cap(blocks(0.3, seed=seed), 0.6) for seed in range(200)]
    assert all(verdict.below for verdict in verdicts)
    assert max(verdict.images for verdict in verdicts) <= 300
    assert not any(below_cap(blocks(0.98, seed=seed), 0.6).below for seed in range(200))


def test_an_undecided_copy_counts_as_above():
    verdict = below_cap(blocks(0.59, images=500, seed=3), 0.6)
    assert not verdict.below
    assert verdict.images == 500


class Landscape:
    """Accuracy that falls as σ grows, with a worse sign; counts what is asked of it."""

    def __init__(self, critical):
        self.critical = critical
        self.asked = []
        self.draws = []

    def copies(self, sigma, draw):
        self.draws.append(draw)
        return ({"s": torch.tensor(sigma)}, {"s": torch.tensor(sigma * 0.8)})

    def evaluate(self, copy):
        sigma = float(copy["s"])
        self.asked.append(sigma)
        return blocks(0.98 if sigma < self.critical else 0.3, seed=len(self.asked))


@given(critical=st.floats(0.01, 50), start=st.floats(0.01, 50))
def test_search_finds_the_weakest_noise_that_holds_for_both_signs(critical, start):
    landscape = Landscape(critical)
    found = search_sigma(landscape.copies, landscape.evaluate, cap=0.6, start=start, limit=100)
    needed = critical / 0.8
    assert found.sigma >= needed * 0.999999
    assert found.sigma <= max(start, needed * 1.3 * 1.001)
    assert found.evaluations == len(landscape.asked)
    for sign in (1.0, 0.8):
        assert any(math.isclose(s, found.sigma * sign, rel_tol=1e-5) for s in landscape.asked)


def test_a_good_start_takes_two_evaluations():
    landscape = Landscape(1.0)
    found = search_sigma(landscape.copies, landscape.evaluate, cap=0.6, start=1.3, limit=100)
    assert (found.sigma, found.evaluations) == (1.3, 2)


def test_the_papers_loop_evaluates_both_copies_whole_at_every_turn():
    landscape = Landscape(1.0)
    found = raise_until_below(
        landscape.copies, landscape.evaluate, cap=0.6, start=0.25, step=0.25, factor=1, limit=10
    )
    assert found.sigma == 1.25  # 0.8 · 1.25 is the first that reaches 1.0
    assert landscape.draws == [0, 1, 2, 3, 4]
    assert found.evaluations == 10
    assert found.images == 10 * 2_000


def test_the_cap_itself_is_allowed_by_the_papers_loop():
    found = raise_until_below(
        lambda sigma, draw: ({"s": torch.tensor(sigma)},),
        lambda copy: iter([(60, 100)]),
        cap=0.6,
        start=0.1,
        step=0.1,
        factor=1,
        limit=1,
    )
    assert found.sigma == 0.1


def test_noise_that_never_suffices_is_an_error_that_names_the_limit():
    landscape = Landscape(1e9)
    for find in (
        lambda: search_sigma(landscape.copies, landscape.evaluate, cap=0.6, start=1, limit=7.5),
        lambda: raise_until_below(
            landscape.copies, landscape.evaluate, cap=0.6, start=1, step=2, factor=1, limit=7.5
        ),
    ):
        with pytest.raises(FedveilError, match=r"7\.5.*60%"):
            find()


def test_agreement_margin_is_the_mean_lack_of_confidence():
    logits = torch.log(torch.tensor([[0.9, 0.05, 0.05], [0.5, 0.3, 0.2]]))
    assert agreement_margin(logits) == pytest.approx((0.1 + 0.5) / 2, abs=1e-6)


def test_a_draw_that_stays_above_at_any_strength_is_given_up_for_the_next():
    def copies(sigma, draw):
        return ({"right": torch.tensor(0.9 if draw < 2 or sigma < 3 else 0.3)},)

    found = search_sigma(
        copies, lambda copy: blocks(float(copy["right"])), cap=0.6, start=1, limit=50
    )
    assert found.draw == 2
    assert found.sigma >= 3


def test_the_papers_loop_can_raise_by_a_factor():
    landscape = Landscape(1.0)
    found = raise_until_below(
        landscape.copies, landscape.evaluate, cap=0.6, start=0.1, step=0, factor=2, limit=10
    )
    assert found.sigma == pytest.approx(1.6)  # 0.8 · 0.8 is too little, 1.6 · 0.8 enough
    assert landscape.draws == [0, 1, 2, 3, 4]


@given(images=st.integers(20, 500), cap=st.floats(0.2, 0.95))
def test_certifiable_is_the_edge_of_what_passes(images, cap):
    def passes(correct):
        return below_cap(iter([(correct, images)]), cap).below

    limit = certifiable(images, cap)
    if limit < 0:
        assert not passes(0)
        return
    edge = round(limit * images)
    assert passes(edge)
    assert edge + 1 >= cap * images or not passes(edge + 1)
