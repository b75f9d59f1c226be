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
    sums_of,
)
from fedveil.analytic.privacy import GaussianRelease
from fedveil.data import load_dataset
from fedveil.errors import FedveilError
from fedveil.features import default_options, learn_dictionary
from fedveil.federation import Analytic, Resume
from fedveil.federation.secagg.client import WORDS
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import StrategyState

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


def advised(of_the_rarer, **settings):
    """What a strategy says of sums in which half of the classes have so many images each."""
    data = load_dataset("digits", seed=0)
    labels = data.train.labels
    few = torch.cat([(labels == one).nonzero()[:of_the_rarer, 0] for one in range(5, 10)])
    some = data.train[torch.cat([(labels < 5).nonzero()[:, 0], few])]
    options = default_options(data.shape, 12, mirrored=False)
    model = AnalyticClassifier(learn_dictionary(data.test.raw[:100], options, seed=0), 10)
    memory = {
        WORDS: sums_of(model, some).words,
        "heard": torch.arange(3),
        "images": torch.tensor(len(some)),
        "noise": torch.tensor(0.0, dtype=torch.float64),
    }
    resume = Resume(1, StrategyState(memory=memory))
    return Analytic(model=model, labelled=data.test, resume=resume, **settings).balanced_gain()


def test_the_servers_images_say_whether_equally_likely_classes_are_better():
    found = advised(4)
    assert found.gain_low > 0.05
    assert found.gain > found.gain_low
    assert advised(140).gain_low <= 0
    assert advised(4, balanced=True) is None


def test_a_strategy_has_w_balanced_or_refuses():
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = AnalyticClassifier(
        learn_dictionary(images, default_options((1, 8, 8), 2, mirrored=False), seed=0), 3
    )
    with pytest.raises(FedveilError, match=r"leave out balanced= or release="):
        Analytic(model=model, balanced=True, release=GaussianRelease(1.0))
    assert Analytic(model=model, balanced=True).balanced
