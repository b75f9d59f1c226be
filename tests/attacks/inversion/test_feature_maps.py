"""Images from features: what a dictionary of small images keeps is the image itself."""

import torch
from torch.nn import functional as F

from fedveil.attacks.inversion.feature_maps import FeatureInversion
from fedveil.data import load_dataset
from fedveil.features import default_options, learn_dictionary


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
