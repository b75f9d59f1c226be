"""Membership by span: against a projection by hand; certain only where it can be."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import Observation
from fedveil.attacks.membership import Span
from fedveil.data import Images
from fedveil.errors import FedveilError

SHAPE, CLASSES = (1, 8, 8), 4


def _model(hidden):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))


def _images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, *SHAPE, generator=generator)
    return Images(pixels, torch.randint(CLASSES, (count,), generator=generator))


def _observation(model, images, noise=0.0):
    loss = F.cross_entropy(model(images.pixels), images.labels)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    generator = torch.Generator().manual_seed(7)
    update = {
        name: (g + noise * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator))[
            None
        ]
        for name, g in zip(named, gradients, strict=True)
    }
    return Observation(model, update, SHAPE, CLASSES, len(images))


def test_scores_are_a_projection_by_hand():
    model, batch = _model(hidden=6), _images(9, 1)
    candidates, public = _images(12, 2), _images(50, 3)
    observation = _observation(model, batch)
    found = Span(ridge=0.3)(observation, candidates, public)[0].numpy()
    known = public.pixels.flatten(1).double().numpy()
    moment = known.T @ known / 50
    moment += 0.3 * np.trace(moment) / 64 * np.eye(64)
    values, vectors = np.linalg.eigh(moment)
    whitening = vectors @ np.diag(values**-0.5) @ vectors.T
    update = observation.gradients["1.weight"][0].double().numpy() @ whitening
    singular, rows = np.linalg.svd(update)[1:]
    weight = singular**2 / (singular**2 + (0.01 * singular[0]) ** 2)
    given = candidates.pixels.flatten(1).double().numpy() @ whitening
    expected = ((given @ rows[:6].T) ** 2 * weight).sum(1) / (given**2).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_it_is_certain_of_every_member_and_of_no_stranger():
    model, batch, strangers = _model(hidden=24), _images(10, 1), _images(200, 2)
    both = Images(
        torch.cat([batch.pixels, strangers.pixels]), torch.cat([batch.labels, strangers.labels])
    )
    sure = Span().judged(_observation(model, batch), both, _images(120, 3))[1][0]
    assert sure[:10].all()
    assert not sure[10:].any()


@pytest.mark.parametrize(
    ("hidden", "images", "noise", "public"),
    [(24, 10, 0.1, 120), (6, 10, 0.0, 120), (24, 10, 0.0, 50), (64, 80, 0.0, 120)],
    ids=["noise", "fewer outputs than images", "too little public", "the whole space"],
)
def test_it_is_not_certain_where_it_cannot_tell(hidden, images, noise, public):
    model, batch = _model(hidden), _images(images, 1)
    seen = _observation(model, batch, noise)
    assert not Span().judged(seen, batch, _images(public, 3))[1].any()


def test_fewer_outputs_than_images_still_tell_members():
    model, batch, strangers = _model(hidden=16), _images(20, 1), _images(100, 2)
    attack, public = Span(), _images(300, 3)
    seen = _observation(model, batch)
    members, others = attack(seen, batch, public)[0], attack(seen, strangers, public)[0]
    assert members.mean() > others.mean() + 2 * others.std()


def test_a_model_without_such_a_layer_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(1, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = _images(2, 1)
    with pytest.raises(FedveilError, match="no linear layer"):
        Span()(_observation(model, images), images, images)
