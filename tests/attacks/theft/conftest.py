from dataclasses import replace

import pytest
import torch
from torch import nn

from fedveil.attacks.theft import Copy, TheftObservation
from fedveil.data import load_dataset
from fedveil.data.augmentation import Augmentation


class Small(nn.Module):
    """Two linear layers on 8×8 digits: little enough to train in a blink."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.hidden = nn.Linear(64, 32)
            self.output = nn.Linear(32, 10)

    def forward(self, pixels):
        return self.output(torch.relu(self.hidden(4 * pixels.flatten(1) - 2)))


def accuracy(weights, images):
    model = Small(0)
    model.load_state_dict(dict(weights))
    with torch.no_grad():
        return float((model.eval()(images.pixels).argmax(1) == images.labels).double().mean())


def train(model, images, steps=300):
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images.pixels), images.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.fixture(scope="session")
def dataset():
    return load_dataset("digits")


@pytest.fixture(scope="session")
def trained(dataset):
    """The owner's model, trained on images the thief has not."""
    torch.set_num_threads(1)
    model = Small(7)
    train(model, dataset.train[300:])
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="session")
def observe(dataset):
    """Returns an observation of given copies: one client a copy, or (round, client, weights)."""

    def observation(*copies, labels=40, **changes):
        own = dataset.train[:300]
        seen = TheftObservation(
            architecture=Small(3),
            copies=tuple(
                Copy(*copy) if isinstance(copy, tuple) else Copy(1, i, copy)
                for i, copy in enumerate(copies)
            ),
            labelled=own[:labels],
            unlabelled=own[labels:].pixels,
            noised=(),
            honest=lambda model, images: train(model, images, steps=5),
            augmentation=Augmentation(),
        )
        return replace(seen, **changes)

    return observation
