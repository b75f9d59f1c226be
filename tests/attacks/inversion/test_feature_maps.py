"""Images from features: what a dictionary of small images keeps is the image itself."""

import pytest
import torch
from torch.nn import functional as F

from fedveil.analytic import Statistics, quantised
from fedveil.attacks.inversion.feature_maps import FeatureInversion, SpanInversion, span_of
from fedveil.data import load_dataset
from fedveil.features import Mirrored, default_options, features_of, learn_dictionary


def correlation(images, originals):
    one, other = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (images, originals))
    return F.cosine_similarity(one, other)


def test_images_come_back_from_their_features_and_from_nobody_elses():
    digits = load_dataset("digits", seed=0)
    public, private = digits.test[:100], digits.train[:4]
    options = default_options(digits.shape, 22, mirrored=False)
    features = learn_dictionary(public.raw, options, seed=0)
    told = features(private.pixels) * torch.tensor([[0.1], [1.0], [7.0], [1.0]])
    attack = FeatureInversion(starts=6)
    found = attack(features, told, public.pixels, torch.Generator().manual_seed(0))
    assert found.shape == private.pixels.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert float(correlation(found, private.pixels).min()) > 0.99
    assert float(correlation(found, private.pixels.roll(1, 0)).max()) < 0.95
    assert all(parameter.grad is None for parameter in features.parameters())


def test_a_sum_of_few_gives_one_of_several_images_of_a_class():
    digits = load_dataset("digits", seed=0)
    public, private = digits.test[:100], digits.train[:40]
    options = default_options(digits.shape, 22, mirrored=False)
    features = learn_dictionary(public.raw, options, seed=0)
    rows = quantised(features_of(features, private.raw))
    sums = Statistics.of(rows, private.labels, classes=10)
    label = int(sums.counts.argmax())
    own = private[private.labels == label].pixels
    assert len(own) >= 5
    begun, generator = public.pixels.mean(0, keepdim=True), torch.Generator().manual_seed(0)
    attack = SpanInversion(starts=10)
    (found,) = attack(features, [sums], torch.tensor([label]), begun, generator)
    assert float(correlation(found[None], own).max()) > 0.99
    others = digits.train[40:]
    strangers = others[others.labels == label].pixels
    assert float(correlation(found[None], strangers).max()) < 0.98


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_no_image_of_a_sum_has_a_part_in(mirrored):
    digits = load_dataset("digits", seed=0)
    options = default_options(digits.shape, 8, mirrored=False)
    inner = learn_dictionary(digits.test[:100].raw, options, seed=0)
    features = Mirrored(inner) if mirrored else inner
    rows = quantised(features_of(features, digits.train.raw[:100]))
    names, known = digits.train.labels[:100], rows[:, : inner.dimension].double() * 2.0**-14
    vectors = torch.cat([known, F.one_hot(names, 10).double()], 1)

    def left(count):
        sums = Statistics.of(rows[:count], names[:count], classes=10, dimension=inner.dimension)
        span = span_of(sums, views=features.views).double()
        return (vectors - vectors @ span @ span.T).square().sum(1)

    assert float(left(30)[:30].max()) < 1e-6
    assert float(left(30)[30:].min()) > (1e-4 if mirrored else 1e-3)
    assert float(left(100).max()) < 1e-9  # of more images than 74 dimensions nothing is outside
