"""Membership attacks on a released model against closed forms and plain loops."""

import math

import pytest
import torch
from torch import nn

from fedveil.attacks.membership.released import confidence, likelihood_ratio, relative
from fedveil.audit.metrics import roc_of_one
from fedveil.data import Images
from fedveil.errors import FedveilError


def halves(shadows, images, generator):
    held = torch.zeros(shadows, images, dtype=torch.bool)
    for number in range(0, shadows, 2):
        held[number] = torch.rand(images, generator=generator) < 0.5
        held[number + 1] = ~held[number]
    return held


def test_confidence_is_the_log_odds_of_the_own_class():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))
    images = Images(torch.rand(700, 1, 2, 2), torch.randint(5, (700,)))
    p = model.double()(images.pixels.double()).softmax(1).gather(1, images.labels[:, None])[:, 0]
    model.float().train()
    assert torch.allclose(confidence(model, images), (p / (1 - p)).log(), atol=1e-4)
    assert model.training


def test_a_sure_answer_is_finite():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([500.0, 0.0]))
    images = Images(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    assert confidence(model, images).tolist() == pytest.approx([500, -500])


def test_of_gaussians_the_likelihood_ratio_is_that_of_the_closed_form():
    """φ ~ N(d + 1, 1) with an image in training and N(d, 1) without, d the image's own."""
    generator = torch.Generator().manual_seed(0)
    count, shadows = 4000, 256
    own = 3 * torch.randn(count, generator=generator, dtype=torch.float64)
    held = halves(shadows, count, generator)
    noise = torch.randn(shadows, count, generator=generator, dtype=torch.float64)
    known = own + held.double() + noise
    member = torch.arange(count) < count // 2
    target = own + member.double() + torch.randn(count, generator=generator, dtype=torch.float64)
    scores = likelihood_ratio(target, known, held)
    exact = (target - own) - 0.5  # log N(φ; d + 1, 1) - log N(φ; d, 1)
    assert float((scores - exact).abs().median()) < 0.1
    assert float(torch.corrcoef(torch.stack([scores, exact]))[0, 1]) > 0.99
    # Its AUC is Φ(1 / √2); that of φ itself is diluted by the images' own difficulty.
    pairs = (scores[member][:, None] > scores[~member]).double().mean()
    assert float(pairs) == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.02)
    plain = (target[member][:, None] > target[~member]).double().mean()
    assert float(plain) < float(pairs) - 0.1


def test_a_likelihood_ratio_refuses_what_no_shadow_held():
    held = torch.tensor([[True, True], [False, True]])
    with pytest.raises(FedveilError, match="held each image and shadows that did not"):
        likelihood_ratio(torch.zeros(2), torch.zeros(2, 2), held)


def test_relative_membership_by_hand():
    generator = torch.Generator().manual_seed(1)
    count, shadows = 30, 4
    held = halves(shadows, count, generator)
    target = torch.randn(count, generator=generator, dtype=torch.float64)
    known = torch.randn(shadows, count, generator=generator, dtype=torch.float64)
    population = torch.arange(count) >= 18

    def ratio(place):
        sides = [known[held[:, place] == side, place].sigmoid() for side in (True, False)]
        return float(target[place].sigmoid() / ((sides[0].mean() + sides[1].mean()) / 2))

    by_hand = []
    for place in range(count):
        others = range(18, count)
        by_hand.append(sum(ratio(place) >= ratio(other) for other in others) / len(others))
    assert relative(target, known, population, held).tolist() == pytest.approx(by_hand)


def test_images_that_look_alike_score_alike():
    """Members stood above strangers of the same ratio, so that sure answers told all of them."""
    generator = torch.Generator().manual_seed(0)
    held, population = halves(4, 400, generator), torch.arange(400) >= 200
    target = torch.tensor([40.0, -1.0, 2.0, 50.0]).double().repeat(100)  # the first and last are 1
    found = relative(target, torch.zeros(4, 400).double(), population, held)
    assert torch.equal(found[:200], found[200:])
    assert float(roc_of_one(found[:200], found[200:]).auc.value) == 0.5
