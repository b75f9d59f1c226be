import pytest
import torch
from torch import nn

from fedveil.data import Images
from fedveil.federation import Cap


@pytest.fixture
def model():
    """A linear classifier of two classes that is right on every image below."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net[1].weight[0], net[1].weight[1] = 1.0, -1.0
        net[1].bias[0], net[1].bias[1] = -8.0, 8.0
        net[3].weight[0, 0] = net[3].weight[1, 1] = 1.0
    return net


@pytest.fixture
def images():
    """Bright images are of class 0, dark ones of class 1; 400 of each, shuffled."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(800, generator=generator) % 2
    raw = torch.randint(0, 100, (800, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Images(torch.where(labels.view(-1, 1, 1, 1) == 0, 255 - raw, raw), labels)


@pytest.fixture
def cap(images):
    # Two classes: chance is 50 %, so the cap sits well above it.
    return Cap(0.8, images)
