"""Whole batches taken out of the gradient of a first linear layer, beside exact truth."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import FullyConnected, LocalSteps, Observation, Peeling
from fedveil.attacks.inversion.peeling import _agreed, _sparse
from fedveil.audit.metrics import match, psnr
from fedveil.data import load_dataset
from fedveil.defenses import BlockDCT
from fedveil.errors import FedveilError
from fedveil.models import CNN
from fedveil.models.normalise import Normalise
from tests.attacks.inversion.conftest import observe_batch as observed
from tests.attacks.inversion.conftest import quality

SHAPE, CLASSES = (1, 8, 8), 10


@pytest.fixture(scope="module")
def digits():
    data = load_dataset("digits")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    return data.train[order]


def mlp(hidden, *, depth=1, activation=nn.ReLU, batch_norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [Normalise(), nn.Flatten(), nn.Linear(64, hidden)]
        if batch_norm:
            layers.append(nn.BatchNorm1d(hidden))
        layers.append(activation())
        for _ in range(depth - 1):
            layers += [nn.Linear(hidden, hidden), activation()]
        return nn.Sequential(*layers, nn.Linear(hidden, CLASSES))


@pytest.mark.parametrize(("count", "hidden", "depth"), [(1, 64, 1), (8, 256, 1), (16, 512, 3)])
def test_every_image_of_a_batch_is_exact_and_has_its_own_label(digits, count, hidden, depth):
    images = digits[:count]
    seen = observed(mlp(hidden, depth=depth), images)
    result = Peeling()(seen)
    assert float(quality(result, images).min()) > 60
    apart = torch.cdist(result.images[0].float().flatten(1), images.pixels.flatten(1))
    assert torch.equal(result.labels[0], images.labels[apart.argmin(dim=1)])
    assert float(result.loss[0]) < 1e-8
    assert int(result.iterations[0]) == 0
    if count > 8:
        assert float((quality(FullyConnected()(seen), images) > 40).double().mean()) < 1


def test_sparse_columns_are_found_up_to_order_and_length():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    columns *= torch.rand(400, 12, generator=generator) < 0.3
    mixed = torch.linalg.qr(columns @ torch.randn(12, 12, generator=generator).double())[0]
    found = _sparse(mixed, 3e-5, math.inf)
    alike = (F.normalize(columns, dim=0).T @ F.normalize(found, dim=0)).abs()
    assert torch.allclose(alike.amax(dim=1), torch.ones(12).double(), atol=1e-9)
    assert len(set(alike.argmax(dim=1).tolist())) == 12
    silent = ((found != 0).sum(dim=0).sort()[0] - (columns != 0).sum(dim=0).sort()[0]).abs()
    assert int(silent.max()) <= 2  # slopes that are nearly zero
    dense = torch.linalg.qr(torch.randn(400, 12, generator=generator, dtype=torch.float64))[0]
    assert _sparse(dense, 3e-5, math.inf) is None


def test_the_quotient_that_most_agree_on():
    quotients = torch.tensor([0.3, -2.0, 0.5, 0.300001, 9.0, 0.299999, 0.5], dtype=torch.float64)
    assert _agreed(quotients, 1e-4) == (pytest.approx(0.3, abs=1e-6), 3)
    assert _agreed(quotients[:0], 1e-4) == (0.0, 0)


def test_an_image_used_twice_has_one_column(digits):
    images = digits[torch.tensor([0, 1, 2, 3, 4, 0])]
    result = Peeling()(observed(mlp(256), images))
    distances = torch.cdist(images.pixels.flatten(1), result.images[0].float().flatten(1))
    assert float(distances.amin(dim=1).max()) < 1e-3


@pytest.mark.parametrize("steps", [LocalSteps(1, 12, 0.5), LocalSteps(1, 4, 0.1)])
def test_weights_after_local_steps_are_taken_apart_too(digits, steps):
    images = digits[:12]
    model = mlp(512)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    descent = torch.optim.SGD(model.parameters(), lr=steps.learning_rate)
    for start in range(0, 12, steps.batch_size):
        part = images[start : start + steps.batch_size]
        descent.zero_grad()
        F.cross_entropy(model(part.pixels), part.labels).backward()
        descent.step()
    length = steps.learning_rate * steps.steps(12)
    update = {
        name: ((before[name].double() - value.detach().double()) / length)[None]
        for name, value in model.named_parameters()
    }
    model.load_state_dict(before, strict=False)
    local = steps if steps.steps(12) > 1 else None
    result = Peeling()(Observation(model, update, SHAPE, CLASSES, 12, local=local))
    assert float((quality(result, images) > 40).double().mean()) >= 0.75


def test_what_cannot_be_taken_apart_is_answered_as_by_fc(digits):
    images = digits[:8]
    noisy = observed(mlp(256), images)
    for value in noisy.gradients.values():
        value += value.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    for seen in (
        noisy,
        observed(mlp(256, activation=nn.Tanh), images),  # no zeros
        observed(mlp(256, batch_norm=True).eval(), images),
        observed(mlp(6), images),  # fewer neurons than images
    ):
        result, plain = Peeling()(seen), FullyConnected()(seen)
        assert bool(result.untold) == torch.equal(result.images, plain.images)
        if not result.untold:
            assert float(quality(result, images).min()) > 60  # eval: a scale, and no harm


def test_a_search_that_is_out_of_time_says_that_it_cannot_tell(digits):
    images = digits[:12]
    seen = observed(mlp(64), images)
    result = Peeling(seconds=0.0)(seen)
    assert bool(result.untold)
    assert torch.equal(result.images, FullyConnected()(seen).images)
    assert not bool(Peeling()(observed(mlp(256), digits[:8])).untold)


def test_a_known_transformation_is_searched_in(digits):
    images, transform = digits[:8], BlockDCT(keep=10)
    trained = type(images)(transform(images.pixels), images.labels)
    result = Peeling()(observed(mlp(256), trained, knows=transform))
    found = match(result.images[0].float(), trained.pixels)
    assert float(psnr(found, trained.pixels).min()) > 60


def test_a_first_convolution_is_refused(digits):
    with pytest.raises(FedveilError, match="no linear layer with a bias"):
        Peeling()(observed(CNN(SHAPE, CLASSES), digits[:2]))
