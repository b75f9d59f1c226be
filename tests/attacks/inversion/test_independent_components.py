"""Large batches parted by independent components, beside exact truth."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import (
    FullyConnected,
    IndependentComponents,
    LocalSteps,
    Observation,
    build_attack,
)
from fedveil.attacks.inversion.independent_components import _completed, _fitted
from fedveil.attacks.inversion.separation import separated
from fedveil.data import Images
from fedveil.defenses import BlockDCT
from fedveil.errors import FedveilError
from fedveil.models import CNN
from fedveil.models.normalise import Normalise
from tests.attacks.inversion.conftest import observe_batch as observed
from tests.attacks.inversion.conftest import quality

SHAPE, CLASSES = (3, 32, 32), 10


@pytest.fixture(scope="module")
def leaves():
    """Rectangles before one another: edges as photographs have them, and none in two images."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(40, 3, 1, 1, generator=generator).repeat(1, 1, 32, 32)
    for image in pixels:
        for _ in range(20):
            top, left = torch.randint(28, (2,), generator=generator).tolist()
            high, wide = torch.randint(4, 20, (2,), generator=generator).tolist()
            colour = torch.rand(3, 1, 1, generator=generator)
            image[:, top : top + high, left : left + wide] = colour
    raw = (pixels * 255).to(torch.uint8)
    return Images(raw, torch.randint(CLASSES, (40,), generator=generator))


def mlp(hidden, activation=nn.ReLU, *, centred=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [Normalise()] if centred else []
        wide = torch.Size(SHAPE).numel()
        first += [nn.Flatten(), nn.Linear(wide, hidden), activation()]
        return nn.Sequential(*first, nn.Linear(hidden, CLASSES))


@pytest.mark.parametrize("centred", [True, False])
def test_a_batch_far_beyond_the_quotients_reach_is_exact_with_its_labels(leaves, centred):
    images = leaves[:32]
    seen = observed(mlp(512, centred=centred), images)
    result = IndependentComponents()(seen)
    assert float((quality(result, images) > 60).double().mean()) >= 0.9
    apart = torch.cdist(result.images[0].float().flatten(1), images.pixels.flatten(1))
    near = apart.min(dim=1)
    own = images.labels[near.indices][near.values < 0.1]
    assert torch.equal(result.labels[0][near.values < 0.1], own)
    assert float(result.loss[0]) < 1e-3
    assert int(result.iterations[0]) >= 1
    assert not bool(result.untold.any())
    assert float((quality(FullyConnected()(seen), images) > 40).double().mean()) < 0.6


def test_components_alone_are_near_where_no_relu_silences_anything(leaves):
    images = leaves[:12]
    result = IndependentComponents()(observed(mlp(256, nn.Tanh), images))
    assert float(quality(result, images).median()) > 18
    assert float(quality(FullyConnected()(observed(mlp(256, nn.Tanh), images)), images).max()) < 15


def test_noise_blurs_and_does_not_end_it(leaves):
    images = leaves[:8]
    seen = observed(mlp(256), images)
    generator = torch.Generator().manual_seed(0)
    for value in seen.gradients.values():
        value += 0.05 * value.std() * torch.randn(value.shape, generator=generator)
    result = IndependentComponents()(seen)
    assert float(quality(result, images).median()) > 15
    assert bool(result.untold.all())


def apart(mixing, found):
    """Return of each true column the cosine to the nearest that was found."""
    return (F.normalize(found, dim=0).T @ F.normalize(mixing, dim=0)).abs().amax(dim=0)


def test_images_that_samples_one_by_one_do_not_tell_apart_are_parted(leaves):
    from sklearn.decomposition import FastICA

    generator = torch.Generator().manual_seed(0)
    images = leaves.pixels.double()
    mixing = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    rows = mixing @ images.flatten(1)
    grouped = apart(mixing, separated(rows, SHAPE, steps=100, seed=0))
    mixed = rows.reshape(40, *SHAPE).numpy()
    singly = FastICA(whiten="unit-variance", random_state=0, max_iter=100, tol=1e-3)
    singly.fit(np.concatenate([np.diff(mixed, axis=axis).reshape(40, -1) for axis in (2, 3)], 1).T)
    assert float(grouped.min()) > 0.97
    assert float(grouped.median()) > float(apart(mixing, torch.from_numpy(singly.mixing_)).median())


@pytest.mark.parametrize("shape", [(1, 2, 9), (3, 90, 70), (2, 1, 40), (1, 3, 3)])
def test_images_of_any_size_are_looked_at(shape):
    generator = torch.Generator().manual_seed(0)
    size = torch.Size(shape).numel()
    images = torch.randn(2, size, generator=generator, dtype=torch.float64).exp()
    images[0, : size // 2] *= 0.01
    images[1, size // 2 :] *= 0.01
    mixing = torch.tensor([[1.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
    found = separated(mixing @ images, shape, steps=100, seed=0)
    assert found.dtype == torch.float64
    assert bool(found.isfinite().all())
    if size > 9:
        assert float(apart(mixing, found).min()) > 0.9


def test_a_column_is_found_by_its_zeros_though_some_are_none():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(300, 10, generator=generator, dtype=torch.float64)
    columns *= torch.rand(300, 10, generator=generator) < 0.5
    mixing = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    heard = F.normalize(columns @ torch.linalg.inv(mixing), dim=1).nan_to_num()
    truth = F.normalize(mixing, dim=0)
    silent = (columns[:, 3] == 0).nonzero()[:, 0]
    silent = torch.cat([silent, (columns[:, 3] != 0).nonzero()[:15, 0]])
    start = F.normalize(truth[:, 3] + 0.1 * torch.randn(10, generator=generator).double(), dim=0)
    found, left = _fitted(heard, silent, start)
    assert float((found @ truth[:, 3]).abs()) == pytest.approx(1, abs=1e-9)
    assert left < 1e-6
    known = truth[:, [0, 1, 2, 4, 5, 6, 7, 8, 9]]
    beyond = torch.linalg.svd(known, full_matrices=True)[0][:, -1]
    found = _completed(heard, silent, beyond, known)
    assert float((found @ truth[:, 3]).abs()) == pytest.approx(1, abs=1e-9)


def test_an_image_used_twice_and_a_single_one(leaves):
    images = leaves[torch.tensor([0, 1, 2, 3, 0])]
    result = IndependentComponents()(observed(mlp(256), images))
    distances = torch.cdist(images.pixels.flatten(1), result.images[0].float().flatten(1))
    assert float(distances.amin(dim=1).max()) < 1e-2
    single = IndependentComponents()(observed(mlp(64), leaves[:1]))
    assert float(quality(single, leaves[:1])) > 60
    assert not bool(single.untold.any())


def test_local_steps_and_a_known_transformation(leaves):
    transform, steps = BlockDCT(keep=10), LocalSteps(epochs=1, batch_size=4, learning_rate=0.01)
    images = Images(transform(leaves[:8].pixels), leaves[:8].labels)
    model = mlp(256)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    descent = torch.optim.SGD(model.parameters(), lr=steps.learning_rate)
    for part in (images[:4], images[4:]):
        descent.zero_grad()
        F.cross_entropy(model(part.pixels), part.labels).backward()
        descent.step()
    update = {
        name: ((before[name].double() - value.detach().double()) / 0.02)[None]
        for name, value in model.named_parameters()
    }
    model.load_state_dict(before, strict=False)
    seen = Observation(model, update, SHAPE, CLASSES, 8, knows=transform, local=steps)
    result = IndependentComponents()(seen)
    assert float(quality(result, images).median()) > 25


def test_a_first_convolution_is_refused_and_options_are_read(leaves):
    with pytest.raises(FedveilError, match="no linear layer with a bias"):
        IndependentComponents()(observed(CNN(SHAPE, CLASSES), leaves[:2]))
    assert build_attack("ica:rounds=0,steps=50") == IndependentComponents(rounds=0, steps=50)
