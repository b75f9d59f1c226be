"""Discriminants of equally likely classes, from sums alone."""

import numpy as np
import pytest
import torch

from fedveil.analytic import (
    FRACTION_BITS,
    AnalyticClassifier,
    Statistics,
    balanced,
    quantised,
    ridge,
)
from fedveil.analytic.privacy import GaussianRelease
from fedveil.errors import FedveilError
from fedveil.features import default_options, learn_dictionary
from fedveil.federation import Analytic
from fedveil.runs.config import TrainConfig

COUNTS = (1500, 300, 60, 20)


def uneven(counts, *, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    centres = torch.randn(len(counts), 12, generator=torch.Generator().manual_seed(9))
    noise = 1.5 * torch.randn(len(labels), 12, generator=generator)
    return quantised(centres[labels] + noise + 1), labels


def scores(head, rows):
    return rows.double() * 2.0**-FRACTION_BITS @ head.weight.T + head.bias


def test_they_are_those_of_a_discriminant_analysis_of_the_images():
    rows, labels = uneven(COUNTS, seed=0)
    sums = Statistics.of(rows, labels, classes=4)
    head = balanced(ridge(sums, penalty=1e-9), sums)
    features = rows.double().numpy() * 2.0**-FRACTION_BITS
    means = np.stack([features[labels == one].mean(0) for one in range(4)])
    inverse = np.linalg.inv(np.cov((features - means[labels]).T, bias=True))
    asked, _ = uneven((500,) * 4, seed=1)
    away = asked.double().numpy()[:, None] * 2.0**-FRACTION_BITS - means
    expected = -np.einsum("nkd,de,nke->nk", away, inverse, away) / 2
    found = scores(head, asked).numpy()
    for some in (expected, found):
        some -= some.mean(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)


def test_rare_classes_are_told_as_well_as_common_ones():
    rows, labels = uneven(COUNTS, seed=0)
    sums = Statistics.of(rows, labels, classes=4)
    asked, right = uneven((500,) * 4, seed=1)
    plain = ridge(sums)
    found = [
        float((scores(head, asked).argmax(1) == right).double().mean())
        for head in (plain, balanced(plain, sums))
    ]
    assert found[1] > found[0] + 0.2


def test_a_class_that_nobody_has_is_never_said():
    rows, labels = uneven((200, 100), seed=0)
    sums = Statistics.of(rows, labels, classes=3)
    said = scores(balanced(ridge(sums), sums), uneven((50, 50), seed=1)[0]).argmax(1)
    assert set(said.tolist()) == {0, 1}


@pytest.mark.parametrize("other", [{"strategy": "fedavg"}, {"epsilon": 1.0}])
def test_noisy_sums_tell_no_classes_sizes(other):
    with pytest.raises(FedveilError, match="balanced is of strategy analytic without epsilon"):
        TrainConfig.check({"balanced": True, **other})


def test_a_strategy_has_w_balanced_or_refuses():
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = AnalyticClassifier(
        learn_dictionary(images, default_options((1, 8, 8), 2, mirrored=False), seed=0), 3
    )
    with pytest.raises(FedveilError, match=r"leave out balanced= or release="):
        Analytic(model=model, balanced=True, release=GaussianRelease(1.0))
    assert Analytic(model=model, balanced=True).balanced
