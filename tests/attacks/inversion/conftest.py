import dataclasses

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from fedveil.attacks.inversion import Observation
from fedveil.audit.metrics import match
from fedveil.models import LeNet
from fedveil.secure_random import SecureGenerator

CLASSES = 10


@pytest.fixture(scope="session")
def photos():
    """Real photographs cut to [8, 3, 16, 16] in [0, 1]."""
    pictures = load_sample_images().images
    raw = torch.stack([torch.from_numpy(picture.copy()) for picture in pictures])
    small = raw.permute(0, 3, 1, 2)[:, :, ::4, ::4].float() / 255
    cut = small.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5)
    return cut[:, 1:3, 2:4].reshape(-1, 3, 16, 16)


@pytest.fixture(scope="session")
def lenet():
    torch.manual_seed(0)
    return LeNet((3, 16, 16), CLASSES)


def observe(model, images, labels, *, knows=None, batch=1):
    """What a server has of clients that each trained on ``batch`` images."""
    names = [name for name, _ in model.named_parameters()]
    updates = []
    for part, answers in zip(images.split(batch), labels.split(batch), strict=True):
        loss = F.cross_entropy(model(part), answers)
        updates.append(torch.autograd.grad(loss, list(model.parameters())))
    gradients = {
        name: torch.stack([update[i] for update in updates]) for i, name in enumerate(names)
    }
    return Observation(model, gradients, tuple(images.shape[1:]), CLASSES, batch, knows)


def observe_batch(model, images, **changes):
    """What a server has of a client that trained on a batch once."""
    one = observe(model, images.pixels, images.labels, batch=len(images))
    return dataclasses.replace(one, **changes)


def quality(result, images):
    """Decibels of each image of a batch, whatever order they came back in."""
    own = match(result.images[0].float(), images.pixels).clamp(0, 1)
    return psnr(own, images.pixels)


def sanitised(seen, sanitizer):
    """What the server has instead where each client sanitises its update, and it knows of it."""
    generator = SecureGenerator(bytes(32))
    updates = [
        sanitizer({name: gradient[victim] for name, gradient in seen.gradients.items()}, generator)
        for victim in range(seen.victims)
    ]
    gradients = {name: torch.stack([update[name] for update in updates]) for name in seen.gradients}
    return dataclasses.replace(seen, gradients=gradients, sanitizer=sanitizer)


def psnr(images, reference):
    missed = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return -10 * missed.log10()
