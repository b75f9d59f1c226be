"""DP-SGD against gradients computed image by image, and published privacy figures."""

import math

import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

from fedveil.data import Images
from fedveil.defenses import DPSGD
from fedveil.errors import FedveilError
from fedveil.federation.training import LocalTraining, train_privately
from fedveil.models import build_model

PIXELS = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 0, 5, 2])


def _model(name="cnn"):
    return build_model(name, (1, 8, 8), 10, seed=0)


@pytest.mark.parametrize("clip", [0.5, 1e6])
@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet-gn", "vit"])
def test_without_noise_it_is_the_mean_of_clipped_gradients(name, clip):
    model = _model(name)
    found = DPSGD(noise=0, clip=clip).gradients(model, PIXELS, LABELS, expected=8)
    total = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    for pixel, label in zip(PIXELS, LABELS, strict=True):
        loss = F.cross_entropy(model(pixel[None]), label[None])
        own = torch.autograd.grad(loss, list(model.parameters()))
        length = math.sqrt(sum(float(g.square().sum()) for g in own))
        for key, gradient in zip(total, own, strict=True):
            total[key] += gradient * min(1.0, clip / length) / 8
    assert found.keys() == total.keys()
    for key, value in total.items():
        assert torch.allclose(found[key], value, atol=1e-5)


def test_noise_is_normal_at_the_multiplier_and_new_each_time():
    model = _model()
    clean = DPSGD(noise=0, clip=0.5).gradients(model, PIXELS, LABELS, expected=4)
    noisy = DPSGD(noise=2, clip=0.5).gradients(model, PIXELS, LABELS, expected=4)
    added = torch.cat([(noisy[k] - clean[k]).flatten() for k in clean])
    assert float(added.std()) == pytest.approx(2 * 0.5 / 4, rel=0.03)
    alone = DPSGD(noise=2, clip=0.5).gradients(model, PIXELS[:0], LABELS[:0], expected=4)
    only = torch.cat([value.flatten() for value in alone.values()])
    assert float(only.std()) == pytest.approx(0.25, rel=0.03)
    assert not torch.allclose(only, added)


def test_it_leaves_the_model_as_it_was():
    model = _model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    DPSGD(noise=1).gradients(model, PIXELS, LABELS, expected=4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model._forward_hooks
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())


def test_epsilon_is_no_more_than_that_of_the_moments_accountant():
    """Abadi et al. 2016, section 3.3: q = 0.01, σ = 4, T = 10,000 gives ε ≈ 1.26 at δ = 1e-5."""
    found = DPSGD(noise=4).epsilon(images=60_000, batch_size=600, steps=10_000)
    assert 0.7 * 1.26 < found < 1.27


@pytest.mark.parametrize(("noise", "steps"), [(4, 1), (4, 10), (20, 200)])
def test_epsilon_without_sampling_bounds_the_exact_one_closely(noise, steps):
    """Balle & Wang 2018, theorem 8: the exact δ(ε) of the Gaussian mechanism."""
    found = DPSGD(noise=noise).epsilon(images=10, batch_size=10, steps=steps)
    mu = math.sqrt(steps) / noise

    def delta(epsilon):
        tail = norm.cdf(mu / 2 - epsilon / mu)
        return tail - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)

    assert delta(found) <= 1e-5 <= delta(0.75 * found)


def test_epsilon_grows_with_what_is_seen_and_falls_with_noise():
    def epsilon(noise=1.0, images=600, steps=60):
        return DPSGD(noise=noise).epsilon(images=images, batch_size=10, steps=steps)

    assert epsilon(steps=600) > epsilon() > epsilon(noise=4)
    assert epsilon(images=60) > epsilon()
    assert epsilon(noise=0) == math.inf
    assert epsilon(steps=0) == 0


def test_training_learns_and_is_not_repeatable():
    labels = torch.arange(300) % 2
    raw = (labels.view(-1, 1, 1, 1) * 200).expand(-1, 1, 8, 8).to(torch.uint8)
    images = Images(raw, labels)
    settings = LocalTraining(epochs=6, batch_size=20, learning_rate=0.3)
    models = [_model(), _model()]
    for model in models:
        train_privately(model, images, settings, DPSGD(noise=0.5))
    with torch.no_grad():
        assert (models[0](images.pixels).argmax(1) == labels).float().mean() > 0.95
    states = [nn.utils.parameters_to_vector(m.parameters()) for m in models]
    assert not torch.allclose(*states)


class _Counting(nn.Module):
    """Remembers the mean image in a buffer, as no type of torch's own does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(64))
        self.output = nn.Linear(64, 10)

    def forward(self, x):
        self.seen = 0.9 * self.seen + 0.1 * x.flatten(1).mean(0).detach()
        return self.output(x.flatten(1))


class _Kept(nn.Module):
    """The same in a parameter that is not trained."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(64), requires_grad=False)
        self.output = nn.Linear(64, 10)

    def forward(self, x):
        self.seen.data.mul_(0.9).add_(x.flatten(1).mean(0).detach(), alpha=0.1)
        return self.output(x.flatten(1))


class _Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(64, 10)

    def forward(self, x):
        flat = x.flatten(1)
        return self.output(flat - flat.mean(0, keepdim=True))


class _InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
        self.output = nn.Linear(16, 10)

    def forward(self, x):
        hidden = self.body(x)
        hidden += 1
        return self.output(hidden.relu_())


def _frozen_batch_norm():
    model = _model("resnet-bn")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return model


def _plain(*layers):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(256, 10))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (_model("resnet-bn"), "BatchNorm2d"),
        (_frozen_batch_norm(), "BatchNorm2d"),
        (_plain(nn.BatchNorm2d(4, affine=False)), "BatchNorm2d"),
        (_plain(nn.BatchNorm2d(4, track_running_stats=False)), "BatchNorm2d"),
        (_plain(nn.SyncBatchNorm(4)), "SyncBatchNorm"),
        (_plain(nn.InstanceNorm2d(4, track_running_stats=True)), "running_mean changes"),
        (_Counting(), "seen changes"),
        (_Kept(), "seen changes"),
        (_Mixing(), "depends on the others"),
        (_InPlace(), "cannot train"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_the_promise_cannot_cover_is_refused_before_training(model, told):
    with pytest.raises(FedveilError, match=told):
        DPSGD(noise=1).check(model, (1, 8, 8))


@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet-gn", "vit"])
def test_models_that_it_can_train_pass(name):
    DPSGD(noise=1).check(_model(name), (1, 8, 8))


@pytest.mark.parametrize(
    ("noise", "images", "steps"), [(0.6, 400, 80), (1.0, 1000, 400), (4.0, 60_000, 10_000)]
)
def test_epsilon_is_that_of_an_independent_accountant(noise, images, steps):
    """Google's dp-accounting: another implementation of Rényi accounting, and a tighter one."""
    from dp_accounting import dp_event, pld, rdp

    found = DPSGD(noise=noise).epsilon(images=images, batch_size=20, steps=steps)
    step = dp_event.PoissonSampledDpEvent(20 / images, dp_event.GaussianDpEvent(noise))
    event = dp_event.SelfComposedDpEvent(step, steps)
    same = rdp.RdpAccountant().compose(event).get_epsilon(1e-5)
    tight = pld.PLDAccountant().compose(event).get_epsilon(1e-5)
    assert found == pytest.approx(same, rel=0.02)
    assert tight <= found * 1.001


def test_releases_of_different_sizes_compose():
    """Two halves of one size are the whole; a smaller share gives more away."""
    private = DPSGD(noise=1.0)
    whole = private.epsilon(images=500, batch_size=10, steps=100)
    assert private.spent([(500, 50), (500, 50)], batch_size=10) == pytest.approx(whole)
    assert private.spent([(500, 50), (100, 50)], batch_size=10) > whole


@pytest.mark.parametrize(
    "wrong", [{"noise": -1}, {"noise": 1, "clip": 0}, {"noise": 1, "delta": 1}]
)
def test_numbers_that_cannot_be(wrong):
    with pytest.raises(FedveilError, match="out of range"):
        DPSGD(**wrong)
