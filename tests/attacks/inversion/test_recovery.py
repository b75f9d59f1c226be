import dataclasses
import inspect

import pytest
import torch
from torch import nn

from fedveil.attacks.inversion import (
    ATTACKS,
    DLG,
    IDLG,
    RGAP,
    GradientMap,
    LevenbergMarquardt,
    Observation,
    range_of,
)
from fedveil.defenses import BlockDCT, Clipping, GaussianNoise, Pruning, Soteria
from fedveil.errors import FedveilError
from fedveil.models import LeNet
from tests.attacks.inversion.conftest import CLASSES, observe, psnr, sanitised

LABELS = torch.tensor([3, 0, 9, 3, 1, 2, 7, 5])
COLD = LevenbergMarquardt(closed_form=False, restarts=2, steps=15)


@pytest.mark.parametrize("attack", [RGAP(), LevenbergMarquardt()])
def test_closed_form_recovers_photographs(attack, lenet, photos):
    result = attack(observe(lenet, photos, LABELS))
    assert result.images.shape == (8, 1, 3, 16, 16)
    assert (psnr(result.images[:, 0], photos) > 40).all()
    assert torch.equal(result.labels[:, 0], LABELS)
    assert (result.loss < 1e-7).all()
    assert (result.seconds > 0).all()


def test_closed_form_at_full_size():
    torch.manual_seed(1)
    model = LeNet((3, 32, 32), CLASSES)
    images = torch.rand(2, 3, 32, 32)
    result = RGAP()(observe(model, images, LABELS[:2]))
    assert (psnr(result.images[:, 0], images) > 40).all()


def test_closed_form_walks_other_chains(photos):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 16, 4, stride=2, padding=1)
            self.hidden = nn.Linear(16 * 64, 200)
            self.last = nn.Linear(200, CLASSES)

        def forward(self, x):
            x = nn.functional.leaky_relu(self.first((x - 0.5) * 4.0), 0.2)
            x = torch.tanh(self.second(x))
            x = x.view(x.size(0), -1)
            return self.last(torch.sigmoid(self.hidden(x)))

    class ModuleChain(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(3, 8, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(8, 16, 4, stride=2, padding=1),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(16 * 64, 200),
                nn.Sigmoid(),
                nn.Linear(200, CLASSES),
            )

    torch.manual_seed(0)
    for model in (Chain(), ModuleChain()):
        result = RGAP()(observe(model, photos[:2], LABELS[:2]))
        assert (psnr(result.images[:, 0], photos[:2]) > 40).all()


def test_levenberg_marquardt_from_a_cold_start(photos):
    torch.manual_seed(0)
    model = LeNet((3, 8, 8), CLASSES)
    images = photos[:2, :, ::2, ::2].contiguous()
    result = COLD(observe(model, images, LABELS[:2]))
    assert (psnr(result.images[:, 0], images) > 40).all()
    assert torch.equal(result.labels[:, 0], LABELS[:2])
    assert (result.iterations > 0).all()


def test_levenberg_marquardt_without_a_closed_form(photos):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(1024, CLASSES)
    )
    images = photos[:1, :, ::2, ::2].contiguous()
    result = LevenbergMarquardt()(observe(model, images, LABELS[:1]))
    assert (psnr(result.images[:, 0], images) > 40).all()


def test_a_start_that_stalls_is_given_up_long_before_its_steps_are_spent(photos):
    """Behind ReLUs a linear model of the gradient is good for next to no distance."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, CLASSES)
    )
    seen = observe(model, photos[:2, :, ::2, ::2].contiguous(), LABELS[:2], batch=2)
    result = LevenbergMarquardt(steps=50, restarts=2)(seen)
    assert result.loss[0] > 1e-6
    assert result.iterations[0] < 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levenberg_marquardt_in_either_precision(dtype, photos):
    torch.manual_seed(0)
    model = LeNet((3, 8, 8), CLASSES)
    images = photos[:1, :, ::2, ::2].contiguous()
    attack = dataclasses.replace(COLD, dtype=dtype)
    result = attack(observe(model, images, LABELS[:1]))
    assert (psnr(result.images[:, 0], images) > 40).all()


@pytest.mark.parametrize("attack", [RGAP(), LevenbergMarquardt(), COLD])
def test_who_knows_the_defence_finds_what_was_trained_on(attack, lenet, photos):
    transform = BlockDCT(keep=6)
    trained = transform(photos[:2])
    result = attack(observe(lenet, trained, LABELS[:2], knows=transform))
    assert (psnr(result.images[:, 0], trained) > 60).all()
    again = transform(result.images[:, 0])
    assert torch.allclose(again, result.images[:, 0], atol=1e-6)


def test_naive_attacker_does_not_search_the_subspace(lenet, photos):
    transform = BlockDCT(keep=6)
    trained = transform(photos[:1])
    naive = RGAP()(observe(lenet, trained, LABELS[:1]))
    outside = naive.images[:, 0] - transform(naive.images[:, 0])
    assert outside.abs().max() > 1e-9


def test_no_attack_can_be_given_the_truth():
    for attack in ATTACKS.values():
        taken = set(inspect.signature(attack().__call__).parameters)
        assert taken == {"observation", "progress"}
    assert {field.name for field in dataclasses.fields(Observation)} == {
        "model", "gradients", "shape", "classes", "images", "knows", "rounding",
        "sanitizer", "local", "statistics", "clients", "unread",
    }  # fmt: skip


def test_restarts_are_chosen_by_the_attackers_loss(photos):
    torch.manual_seed(0)
    model = LeNet((3, 8, 8), CLASSES)
    seen = observe(model, photos[:1, :, ::2, ::2].contiguous(), LABELS[:1])
    single = [DLG(steps=2, seed=0)(seen)]
    several = DLG(steps=2, restarts=3, seed=0)(seen)
    assert several.loss[0] <= single[0].loss[0]


def test_dlg_recovers_a_small_image(photos):
    torch.manual_seed(0)
    model = LeNet((3, 8, 8), CLASSES)
    images = photos[:1, :, ::2, ::2].contiguous()
    result = DLG(steps=100, restarts=3)(observe(model, images, LABELS[:1]))
    assert result.labels[0, 0] == LABELS[0]
    assert psnr(result.images[:, 0], images) > 30


def test_dlg_minimises_the_published_distance(photos):
    torch.manual_seed(0)
    model = LeNet((3, 8, 8), CLASSES)
    seen = observe(model, photos[:1, :, ::2, ::2].contiguous(), LABELS[:1])
    result = IDLG(steps=1)(seen)
    again = observe(model, result.images[0].float(), result.labels[0])
    missed = sum((again.gradients[k] - g).square().sum() for k, g in seen.gradients.items())
    size = sum(g.square().sum() for g in seen.gradients.values())
    assert float(result.loss[0]) == pytest.approx(float(missed / size), rel=1e-3)


def test_idlg_reads_every_label(photos):
    torch.manual_seed(0)
    model = LeNet((3, 8, 8), CLASSES)
    images = photos[:, :, ::2, ::2].contiguous()
    result = IDLG(steps=1)(observe(model, images, LABELS))
    assert torch.equal(result.labels[:, 0], LABELS)


@pytest.mark.parametrize("attack", [DLG(steps=40), IDLG(steps=40)])
def test_searches_leave_out_what_a_sanitiser_destroyed(attack, photos):
    torch.manual_seed(0)
    model = LeNet((3, 8, 8), CLASSES)
    images = photos[:1, :, ::2, ::2].contiguous()
    aware = sanitised(observe(model, images, LABELS[:1]), Pruning(share=0.5))
    informed = attack(aware)
    naive = attack(dataclasses.replace(aware, sanitizer=None))
    assert psnr(informed.images[:, 0], images) > psnr(naive.images[:, 0], images) + 5
    assert informed.loss[0] < naive.loss[0]


@pytest.mark.parametrize("attack", [DLG(steps=2), IDLG(steps=2)])
def test_the_loss_of_a_search_is_of_what_is_left_of_the_update(attack, photos):
    torch.manual_seed(0)
    model = LeNet((3, 8, 8), CLASSES)
    images = photos[:2, :, ::2, ::2].contiguous()
    seen = sanitised(observe(model, images, LABELS[:2]), Clipping(norm=0.1))
    result = attack(seen)
    measure = GradientMap.of(seen, dtype=torch.float32, device=torch.device("cpu"))
    if isinstance(attack, IDLG):
        expected = measure.distance(result.images.float(), result.labels, seen)
        torch.testing.assert_close(result.loss, expected.double(), rtol=1e-3, atol=1e-9)
    assert (result.loss != attack(dataclasses.replace(seen, sanitizer=None)).loss).all()


@pytest.mark.parametrize("sanitizer", [Pruning(share=0.1), Soteria(share=0.1, layer="fc")])
def test_the_closed_form_refuses_what_a_sanitiser_destroyed(sanitizer, lenet, photos):
    seen = observe(lenet, photos[:1], LABELS[:1])
    if isinstance(sanitizer, Pruning):
        seen = sanitised(seen, sanitizer)
    with pytest.raises(FedveilError, match=r"needs every entry .* destroyed \d+ of .*--attack lm"):
        RGAP()(dataclasses.replace(seen, sanitizer=sanitizer))


@pytest.mark.parametrize("sanitizer", [Clipping(norm=0.01), GaussianNoise(ratio=1e-9)])
def test_the_closed_form_takes_what_a_sanitiser_left_whole(sanitizer, lenet, photos):
    result = RGAP()(sanitised(observe(lenet, photos[:2], LABELS[:2]), sanitizer))
    assert (psnr(result.images[:, 0], photos[:2]) > 40).all()
    assert (result.loss < 1e-7).all()


def test_range_of_any_linear_module():
    class Blur(nn.Module):
        def forward(self, images):
            return (
                nn.functional.avg_pool2d(images, 2)
                .repeat_interleave(2, -1)
                .repeat_interleave(2, -2)
            )

    space = range_of(Blur(), (1, 8, 8))
    assert space.size == 16
    image = Blur()(torch.rand(1, 1, 8, 8, dtype=torch.float64))
    assert torch.allclose(space.images(space.coordinates(image)), image)
    mixed = range_of(BlockDCT(keep=10, chroma_keep=3), (3, 16, 16))
    assert mixed.size == 4 * (10 + 3 + 3)
    padded = range_of(BlockDCT(keep=5), (1, 12, 12))
    image = BlockDCT(keep=5)(torch.rand(1, 1, 12, 12, dtype=torch.float64))
    assert torch.allclose(padded.images(padded.coordinates(image)), image)


def test_progress_and_interruption(lenet, photos):
    ticks = []
    RGAP(together=3)(observe(lenet, photos, LABELS), progress=lambda *at: ticks.append(at[:2]))
    assert ticks == [(3, 8), (6, 8), (8, 8)]

    def interrupt(*_at):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RGAP()(observe(lenet, photos, LABELS), progress=interrupt)


@pytest.mark.parametrize("attack", [DLG, IDLG])
@pytest.mark.parametrize("knows", [None, BlockDCT(keep=10)])
def test_searches_made_together_are_those_made_alone(attack, knows, photos):
    torch.manual_seed(0)
    model = LeNet((3, 8, 8), CLASSES)
    images = photos[:2, :, ::2, ::2].contiguous()
    images = images if knows is None else knows(images)
    seen = observe(model, images, LABELS[:2], knows=knows)
    together = attack(steps=1, restarts=2)(seen)
    alone = attack(steps=1, restarts=2, together=1)(seen)
    assert torch.equal(together.labels, alone.labels)
    assert torch.equal(together.iterations, alone.iterations)
    # Without a line search rounding grows from one iteration to the next.
    torch.testing.assert_close(together.images, alone.images, rtol=0, atol=0.05)
    torch.testing.assert_close(together.loss, alone.loss, rtol=0.1, atol=1e-6)


def test_dlg_takes_the_steps_of_pytorchs_lbfgs(photos):
    torch.manual_seed(0)
    model = LeNet((3, 8, 8), CLASSES)
    images = photos[:1, :, ::2, ::2].contiguous()
    seen = observe(model, images, LABELS[:1])
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 8, 8, generator=generator).requires_grad_()
    logits = torch.randn(1, CLASSES, generator=generator).requires_grad_()
    optimiser = torch.optim.LBFGS([image, logits], lr=1)
    weights = list(model.parameters())

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(image), logits.softmax(dim=-1))
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        pairs = zip(gradient, seen.gradients.values(), strict=True)
        distance = sum((g - o[0]).square().sum() for g, o in pairs)
        image.grad, logits.grad = torch.autograd.grad(distance, [image, logits])
        return distance.detach()

    optimiser.step(closure)
    result = DLG(steps=1)(seen)
    torch.testing.assert_close(result.images[0], image.detach().double(), rtol=0, atol=0.05)


def test_a_model_that_branches_on_values_is_attacked_one_image_at_a_time(photos):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = LeNet((3, 8, 8), CLASSES)

        def forward(self, pixels):
            return self.inner(pixels if pixels.sum() > -1e9 else -pixels)

    torch.manual_seed(0)
    model = Branching()
    images = photos[:2, :, ::2, ::2].contiguous()
    result = DLG(steps=1)(observe(model, images, LABELS[:2]))
    plain = DLG(steps=1)(observe(model.inner, images, LABELS[:2]))
    torch.testing.assert_close(result.images, plain.images, rtol=0, atol=0.05)


def test_batched_searches_report_progress_and_can_be_interrupted(photos):
    torch.manual_seed(0)
    seen = observe(LeNet((3, 8, 8), CLASSES), photos[:3, :, ::2, ::2].contiguous(), LABELS[:3])
    ticks = []
    DLG(steps=2, together=2)(seen, progress=lambda *at: ticks.append(at))
    assert all(0 <= done <= 3 and total == 3 for done, total, _ in ticks)
    assert [done for done, _, _ in ticks] == sorted(done for done, _, _ in ticks)
    assert ticks[-1][0] == 3

    def interrupt(*_at):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DLG(steps=2)(seen, progress=interrupt)
