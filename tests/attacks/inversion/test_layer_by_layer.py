import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import LayerByLayer
from fedveil.attacks.inversion.smoothed import FOLLOWERS, composed, pooled_first, slopes
from fedveil.errors import FedveilError, InapplicableAttackError
from tests.attacks.inversion.conftest import observe, psnr

LABELS = torch.tensor([3])


def pooled():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 24, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(24 * 4, 10)),
    )


def test_it_finds_an_image_behind_relu_and_max_pooling(photos):
    image = photos[:1, :, :8, :8].contiguous()
    result = LayerByLayer(steps=250)(observe(pooled(), image, LABELS))
    assert not result.untold.any()
    assert result.labels.tolist() == [[3]]
    others = photos[1:, :, :8, :8]
    assert psnr(result.images[0], image).item() > psnr(others, image).max() + 10


def test_it_cannot_tell_of_an_update_that_is_no_image_s(photos):
    seen = observe(pooled(), photos[:1, :, :8, :8].contiguous(), LABELS)
    seen.gradients["3.weight"].mul_(1.5)
    assert LayerByLayer(steps=2)(seen).untold.all()


def test_it_refuses_updates_of_zeros(photos):
    seen = observe(pooled(), photos[:1, :, :8, :8].contiguous(), LABELS)
    for gradient in seen.gradients.values():
        gradient.zero_()
    with pytest.raises(InapplicableAttackError, match="or none"):
        LayerByLayer(steps=1)(seen)


def test_slopes_are_exact_and_a_descent_sees_where_they_go():
    follower = composed((FOLLOWERS.modules[nn.MaxPool2d](nn.MaxPool2d(2)),))
    values = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    upper = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    (exact,) = torch.autograd.grad((F.max_pool2d(values, 2) * upper).sum(), values)
    found = slopes(follower, values, upper, 0.1)
    assert torch.allclose(found, exact, atol=1e-12)
    (moved,) = torch.autograd.grad(found.square().sum(), values)
    assert moved.abs().max() > 0


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.LeakyReLU(0.2), nn.MaxPool2d(2), nn.MaxPool2d(3, 2), nn.AvgPool2d(2), nn.GELU()],
    ids=str,
)
def test_a_cold_smooth_function_is_the_module_itself(module):
    values = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    follower = FOLLOWERS.modules[type(module)](module)
    assert torch.allclose(follower.exact(values), module(values))
    assert torch.allclose(follower.smooth(values, 1e-4), module(values), atol=1e-3)


def test_activations_are_moved_behind_pooling_and_nothing_changes():
    modules = (nn.ReLU(), nn.MaxPool2d(2))
    followers = [FOLLOWERS.modules[type(module)](module) for module in modules]
    moved = pooled_first(followers)
    assert moved[0].pools
    values = torch.randn(1, 2, 6, 6)
    assert torch.equal(composed(moved).exact(values), composed(followers).exact(values))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "--attack fc or ica"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10, bias=False)),
            "has no bias",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.Flatten(), nn.Linear(144, 10)),
            "stops it",
        ),
        (
            nn.Sequential(
                *(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 4, 3), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(144, 10)),
            ),
            "than its 4096 inputs",
        ),
        (
            nn.Sequential(
                *(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)),
                *(nn.Flatten(), nn.Linear(64, 10)),
            ),
            "stops it",
        ),
    ],
    ids=["linear", "no bias", "normalised", "wide", "padded pooling"],
)
def test_it_names_what_stops_it(photos, model, reason):
    seen = observe(model, photos[:1, :, :8, :8].contiguous(), LABELS)
    with pytest.raises(InapplicableAttackError, match=reason):
        LayerByLayer(steps=1)(seen)


def test_it_takes_single_images_only(photos):
    seen = observe(pooled(), photos[:2, :, :8, :8].contiguous(), torch.tensor([1, 2]), batch=2)
    with pytest.raises(InapplicableAttackError, match="at most 1"):
        LayerByLayer()(seen)
    with pytest.raises(FedveilError, match="steps 0 is out of range"):
        LayerByLayer(steps=0)
