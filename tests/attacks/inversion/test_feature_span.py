"""Clients that train for several epochs on real images, and what their update's rows give away."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import FeatureSpan, LocalSteps, Observation, build_attack
from fedveil.audit.metrics import match, psnr
from fedveil.data import load_dataset
from fedveil.errors import FedveilError
from fedveil.models import CNN

SHAPE, CLASSES = (1, 8, 8), 10
QUICK = FeatureSpan(rounds=3, starts=40, steps=200, variation=0.005)


@pytest.fixture(scope="module")
def images():
    return load_dataset("digits").train[torch.arange(4)]


def network(*, hidden=64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(1024, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)),
        )


def returned(model, images, local):
    """What the server has of a client, which is torch's own SGD in an order of its own."""
    own, steps = copy.deepcopy(model), 0
    optimizer = torch.optim.SGD(own.parameters(), local.learning_rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(local.epochs):
        for index in torch.randperm(len(images), generator=generator).split(local.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(own(images.pixels[index]), images.labels[index]).backward()
            optimizer.step()
            steps += 1
    moved = dict(own.named_parameters())
    gradients = {
        name: ((sent - moved[name]) / (local.learning_rate * steps)).detach()[None]
        for name, sent in model.named_parameters()
    }
    return Observation(model, gradients, SHAPE, CLASSES, len(images), local=local)


def quality(result, images):
    return psnr(match(result.images[0].float(), images.pixels), images.pixels)


def test_every_image_comes_back_after_several_epochs_in_an_unknown_order(images):
    result = QUICK(returned(network(), images, LocalSteps(3, 2, 0.01)))
    assert float(quality(result, images).min()) > 40
    apart = torch.cdist(result.images[0].float().flatten(1), images.pixels.flatten(1))
    assert torch.equal(result.labels[0], images.labels[apart.argmin(dim=1)])
    assert not bool(result.untold[0])
    assert float(result.loss[0]) < 0.1
    assert result.images.min() >= 0
    assert result.images.max() <= 1


def test_one_gradient_is_the_same_search_without_the_drift(images):
    seen = returned(network(), images, LocalSteps(1, 4, 0.01))
    once = QUICK(dataclasses.replace(seen, local=None))
    assert float(quality(once, images).min()) > 40


def test_it_says_that_it_cannot_tell_where_features_do_not_part_images(images):
    pooled = CNN(SHAPE, CLASSES)
    result = dataclasses.replace(QUICK, rounds=1)(returned(pooled, images, LocalSteps(3, 2, 0.01)))
    assert float(quality(result, images).max()) < 20
    assert bool(result.untold[0])


def test_what_it_cannot_attack_is_refused(images):
    local = LocalSteps(1, 4, 0.01)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    with pytest.raises(FedveilError, match="--attack ica"):
        QUICK(returned(flat, images, local))
    with pytest.raises(FedveilError, match="4 neurons"):
        QUICK(returned(network(hidden=4), images, local))
    with pytest.raises(FedveilError, match="starts 0 is out of range"):
        build_attack("features:starts=0")
    with pytest.raises(FedveilError, match="variation -1"):
        build_attack("features:variation=-1")
