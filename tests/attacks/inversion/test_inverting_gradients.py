import dataclasses

import pytest
import torch
from scipy.fft import dctn
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import (
    DLG,
    GradientMap,
    InvertingGradients,
    LocalSteps,
    Observation,
    build_attack,
    infer_labels,
)
from fedveil.attacks.inversion.gradients import Factors
from fedveil.attacks.inversion.inverting_gradients import angle_and_slopes, energy
from fedveil.attacks.inversion.running_statistics import read_running_statistics
from fedveil.defenses import BlockDCT, GaussianBlur, RandomBlockDCT
from fedveil.errors import FedveilError
from fedveil.models import CNN, batch_norm_resnet, group_norm_resnet
from tests.attacks.inversion.conftest import CLASSES, observe, psnr

SHAPE = (3, 16, 16)
LABELS = torch.tensor([3, 0, 9, 3, 1, 2, 7, 5])
SHORT = InvertingGradients(steps=300, tv=0.1)


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    return CNN(SHAPE, CLASSES)


def _trained(model, photos, labels, steps=60):
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(photos), labels).backward()
        optimiser.step()
    return model


def test_a_relu_network_gives_its_images_away(cnn, photos):
    result = SHORT(observe(cnn, photos[:4], LABELS[:4]))
    assert result.images.shape == (4, 1, *SHAPE)
    found = psnr(result.images[:, 0], photos[:4])
    flat = photos[:4].mean((2, 3), keepdim=True).expand_as(photos[:4])
    # Above the best single colour, which a search that learnt nothing could hit on.
    gained = found - psnr(flat, photos[:4])
    assert (gained > 0).all()
    assert gained.mean() > 4
    assert torch.equal(result.labels[:, 0], LABELS[:4])


def test_the_loss_is_the_squared_distance_of_the_gradients(cnn, photos):
    seen = observe(cnn, photos[:2], LABELS[:2], batch=2)
    result = InvertingGradients(steps=20)(seen)
    again = observe(cnn, result.images[0].float(), result.labels[0], batch=2)
    missed = sum((again.gradients[k] - g).square().sum() for k, g in seen.gradients.items())
    size = sum(g.square().sum() for g in seen.gradients.values())
    assert float(result.loss[0]) == pytest.approx(float(missed / size), rel=1e-3)


def test_victims_do_not_disturb_each_other(cnn, photos):
    """Searched together and one by one, from the same starts."""
    seen = observe(cnn, photos[:3], LABELS[:3])
    attack = InvertingGradients(steps=40, dtype=torch.float64)
    together = attack(seen)
    apart = dataclasses.replace(attack, together=1)(seen)
    assert torch.allclose(together.images, apart.images, atol=1e-6)


def test_the_restart_of_the_smallest_angle_is_kept(cnn, photos):
    """Four restarts of a victim start as four victims of the same image do."""
    seen = observe(cnn, photos[:1], LABELS[:1])
    fourfold = seen.select(torch.zeros(4, dtype=torch.int64))
    attack = InvertingGradients(steps=16, tv=0.0, dtype=torch.float64)
    apart = attack(fourfold)
    kept = dataclasses.replace(attack, restarts=4)(seen)
    wanted = torch.cat([g[0].flatten() for g in seen.gradients.values()])
    angles = []
    for images, labels in zip(apart.images, apart.labels, strict=True):
        again = observe(cnn, images.float(), labels).gradients.values()
        angles.append(F.cosine_similarity(torch.cat([g[0].flatten() for g in again]), wanted, 0))
    best = int(torch.stack(angles).argmax())
    assert torch.allclose(kept.images[0], apart.images[best], atol=1e-6)
    assert kept.iterations.tolist() == [64]


def test_who_knows_the_transformation_reports_its_images(cnn, photos):
    transform = BlockDCT(keep=6)
    trained = transform(photos[:2])
    seen = observe(cnn, trained, LABELS[:2], knows=transform)
    result = SHORT(seen)
    assert torch.allclose(transform(result.images[:, 0]), result.images[:, 0], atol=1e-6)
    naive = SHORT(dataclasses.replace(seen, knows=None))
    adaptive = psnr(result.images[:, 0], trained)
    assert (adaptive > psnr(naive.images[:, 0], trained)).all()


def test_frequencies_that_are_not_searched_are_not_in_the_answer(cnn, photos):
    seen = observe(cnn, photos[:2], LABELS[:2], batch=2)
    low, every = (InvertingGradients(steps=20, keep=keep)(seen).images[0] for keep in (3, 64))
    mask = BlockDCT(keep=3).double()
    assert torch.allclose(mask(low), low, atol=1e-5)
    assert not torch.allclose(mask(every), every, atol=1e-2)


def test_fewer_frequencies_are_found_better_behind_a_batch(cnn, photos):
    seen = observe(cnn, photos[:8], LABELS, batch=8)
    low, every = (dataclasses.replace(SHORT, keep=keep)(seen) for keep in (6, 64))
    smooth = BlockDCT(keep=6)(photos[:8])
    assert psnr(low.images[0], smooth).mean() > psnr(every.images[0], smooth).mean()


def test_the_angles_derivative_is_autograds():
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (3, 5, 4), "bias": (3, 5), "one": (3,)}
    dummy, seen = (
        {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
        for _ in range(2)
    )
    angle, slopes = angle_and_slopes(dummy, seen, energy(seen))
    leaves = {name: value.requires_grad_() for name, value in dummy.items()}
    flat = [torch.cat([u[k].reshape(3, -1) for k in u], dim=1) for u in (leaves, seen)]
    expected = 1 - F.cosine_similarity(*flat)
    torch.testing.assert_close(angle, expected.detach())
    wanted = torch.autograd.grad(expected.sum(), list(leaves.values()))
    torch.testing.assert_close(list(slopes.values()), list(wanted))


def test_factors_give_the_same_angle_and_derivative_as_the_gradient_they_make_up():
    generator = torch.Generator().manual_seed(0)
    inputs, slopes, weight, bias = (
        torch.randn(2, *s, generator=generator, dtype=torch.float64)
        for s in ((4, 7), (4, 5), (5, 7), (5,))
    )
    seen = {"weight": weight, "bias": bias}
    leaves = [inputs.requires_grad_(), slopes.requires_grad_()]
    whole = {"weight": slopes.mT @ inputs, "bias": slopes.sum(dim=1)}
    angle, by_update = angle_and_slopes(whole, seen, energy(seen))
    wanted = torch.autograd.grad(list(whole.values()), leaves, list(by_update.values()))
    parts = {"weight": Factors(inputs, slopes), "bias": slopes.sum(dim=1)}
    same, by_part = angle_and_slopes(parts, seen, energy(seen))
    torch.testing.assert_close(same, angle)
    found = torch.autograd.grad(
        [*parts["weight"], parts["bias"]], leaves, [*by_part["weight"], by_part["bias"]]
    )
    torch.testing.assert_close(found, wanted)


class _Shared(nn.Module):
    """Two linear layers that are used as such, one used twice, and one whose weight is borrowed."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(48, 8), nn.Linear(8, 8)
        self.lent, self.last = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, pixels):
        hidden = torch.tanh(self.first(pixels.flatten(1)))
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(hidden))))
        return self.last(F.linear(self.lent(hidden), self.lent.weight))


def test_only_layers_whose_gradient_is_an_outer_product_come_as_factors():
    torch.manual_seed(0)
    model, images = _Shared().double(), torch.rand(3, 3, 4, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    seen = observe(model, images, labels, batch=3)
    gradients = GradientMap.of(seen, dtype=torch.float64, device=torch.device("cpu"))
    layers = gradients.linear_layers(images)
    assert layers == ("first", "last")
    whole, parts = gradients(images, labels), gradients.factored(images, labels, layers)
    assert parts.keys() == whole.keys()
    for name, part in parts.items():
        made = part.slopes.mT @ part.inputs if isinstance(part, Factors) else part
        torch.testing.assert_close(made, whole[name])
    found = InvertingGradients(steps=30, tv=0.0, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        quick = found(seen)
        patch.setattr(GradientMap, "linear_layers", lambda self, images: ())
        slow = found(seen)
    torch.testing.assert_close(quick.images, slow.images, atol=1e-6, rtol=0)


def test_what_was_trained_on_and_what_it_was_before_are_two_answers(cnn, photos):
    """The prior fills in what a blur removed; the blurred image is without it."""
    transform = GaussianBlur(sigma=1.0)
    trained = transform(photos[:4])
    result = SHORT(observe(cnn, trained, LABELS[:4], knows=transform))
    images, originals = result.images[:, 0].float(), result.originals[:, 0].float()
    assert torch.allclose(transform(originals), images, atol=1e-5)
    assert psnr(images, trained).mean() > psnr(originals, trained).mean() + 1
    assert psnr(originals, photos[:4]).mean() > psnr(images, photos[:4]).mean()


def test_the_original_is_the_candidate_of_the_smaller_objective(cnn, photos):
    """After one step the search is noise, and a smooth image has the smaller variation."""

    class Flat(nn.Module):
        def forward(self, images):
            return images.mean(dim=(-2, -1), keepdim=True).expand_as(images)

    flat = Flat()
    seen = observe(cnn, flat(photos[:2]), LABELS[:2], knows=flat)
    result = InvertingGradients(steps=8, tv=10.0)(seen)
    assert torch.equal(result.originals, result.images)


def _empty_frequencies(images):
    """Return how many of 64 coefficients are nothing in every block of the image that has most."""
    blocks = images.double().unfold(2, 8, 8).unfold(3, 8, 8).numpy()
    found = abs(dctn(blocks, axes=(4, 5), norm="ortho")).max(axis=(1, 2, 3))
    return int((found < 1e-5).sum(axis=(1, 2)).max())


def test_no_draw_of_a_random_transformation_is_reported(cnn, photos):
    defence = RandomBlockDCT(drop=0.5)
    trained = torch.stack([defence(image[None])[0] for image in photos[:4]])
    seen = observe(cnn, trained, LABELS[:4], knows=defence.surrogate)
    torch.manual_seed(0)
    result = SHORT(seen)
    assert torch.equal(result.images, result.originals)
    found = result.images[:, 0].float()
    assert _empty_frequencies(defence.surrogate(found)) > 20, "what a draw would show"
    assert _empty_frequencies(found) == 0
    assert InvertingGradients(steps=8)(dataclasses.replace(seen, knows=None)).originals is None


def test_batch_statistics_are_simulated(photos):
    """A client that trains with the statistics of its batch, against autograd on the real model."""
    torch.manual_seed(0)
    model = batch_norm_resnet(SHAPE, CLASSES).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = torch.autograd.grad(
        F.cross_entropy(model(photos[:4]), LABELS[:4]), list(model.parameters())
    )
    model.load_state_dict(before)
    seen = observe(model, photos[:4], LABELS[:4], batch=4)
    model.load_state_dict(before)
    found = GradientMap.of(seen, dtype=torch.float32, device=torch.device("cpu"))(
        photos[:4], LABELS[:4]
    )
    for value, wanted in zip(found.values(), expected, strict=True):
        assert torch.allclose(value, wanted, rtol=1e-3, atol=1e-6)
    with pytest.raises(FedveilError, match="use --attack ig"):
        DLG()(seen)
    result = InvertingGradients(steps=10)(seen)
    assert torch.equal(
        model.state_dict()["stem_norm.running_mean"], before["stem_norm.running_mean"]
    )
    assert result.images.shape == (1, 4, *SHAPE)


def test_the_prior_of_batch_norm_pulls_the_statistics_together(photos):
    torch.manual_seed(0)
    model = batch_norm_resnet(SHAPE, CLASSES)
    for _ in range(30):
        model(photos)
    model.eval()
    seen = observe(model, photos[:1], LABELS[:1])
    inputs = {}
    model.stem_norm.register_forward_pre_hook(lambda _m, given: inputs.update(stem=given[0]))

    def gap(images):
        model(images.float())
        return (inputs["stem"].mean((0, 2, 3)) - model.stem_norm.running_mean).norm()

    free = InvertingGradients(steps=60, tv=0.0)(seen)
    pulled = InvertingGradients(steps=60, tv=0.0, batch_norm=1.0)(seen)
    assert gap(pulled.images[0]) < gap(free.images[0]) / 2
    plain = observe(CNN(SHAPE, CLASSES), photos[:1], LABELS[:1])
    with pytest.raises(FedveilError, match="needs a model with running statistics"):
        InvertingGradients(batch_norm=0.1)(plain)


def test_statistics_that_came_back_take_the_place_of_the_running_ones(photos):
    """Each victim is pulled to its own batch's statistics, and the images themselves lie there."""
    torch.manual_seed(0)
    model = batch_norm_resnet(SHAPE, CLASSES).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches, states = (photos[:2], photos[2:4]), []
    for batch in batches:
        model.load_state_dict(before)
        model(batch)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    model.load_state_dict(before)
    told = read_running_statistics(model, before, states, steps=1).layers
    parts = [observe(model, batch, LABELS[:2], batch=2) for batch in batches]
    seen = dataclasses.replace(
        parts[0],
        gradients={k: torch.cat([part.gradients[k] for part in parts]) for k in before if k in
                   parts[0].gradients},
        statistics=told,
    )  # fmt: skip
    model.load_state_dict(before)

    def gap(images, victim):
        with torch.no_grad():
            given = model.stem(model.normalise(images.float()))
        return (given.mean((0, 2, 3)) - told["stem_norm"].mean[victim]).norm()

    attack = InvertingGradients(steps=30, tv=0.0, batch_norm=1.0)
    own = attack(seen).images
    running = attack(dataclasses.replace(seen, statistics={})).images
    for victim, batch in enumerate(batches):
        assert gap(batch, victim) < 1e-5
        assert gap(own[victim], victim) < 0.7 * gap(running[victim], victim)


def test_a_solved_victim_stops_and_its_restarts_with_it(cnn, photos):
    seen = observe(cnn, photos[:2], LABELS[:2])
    result = InvertingGradients(steps=200, restarts=2, solved=0.9)(seen)
    assert (result.iterations < 20).all()


class _FirstLayerLost:
    """A sanitiser that sent noise instead of the first layer's gradient."""

    def residual(self, dummy, observed):
        return {k: dummy[k] - observed[k] for k in observed if not k.startswith("body.0")}


def test_what_a_sanitiser_destroyed_is_not_compared(cnn, photos):
    seen = observe(cnn, photos[:2], LABELS[:2])
    ruined = {
        k: torch.randn_like(g) if k.startswith("body.0") else g for k, g in seen.gradients.items()
    }
    naive = dataclasses.replace(seen, gradients=ruined)
    informed = dataclasses.replace(naive, sanitizer=_FirstLayerLost())
    truth = photos[:2, None]
    measure = GradientMap.of(seen, dtype=torch.float32, device=torch.device("cpu"))
    assert (measure.distance(truth, LABELS[:2, None], informed) < 1e-9).all()
    assert (measure.distance(truth, LABELS[:2, None], naive) > 0.1).all()
    assert SHORT(informed).loss.max() < SHORT(naive).loss.min()


@pytest.mark.parametrize("factory", [CNN, group_norm_resnet])
@pytest.mark.parametrize("trained", [False, True])
def test_labels_of_a_batch_with_repeats(factory, trained, photos):
    torch.manual_seed(0)
    model = factory(SHAPE, CLASSES)
    if trained:
        _trained(model, photos, LABELS, steps=15)
    labels = torch.tensor([4, 4, 4, 1, 7, 7, 0, 9])
    seen = observe(model, photos, labels, batch=8)
    inferred = infer_labels(seen)
    assert inferred.shape == (1, 8)
    counts = torch.bincount(inferred[0], minlength=CLASSES)
    right = torch.minimum(counts, torch.bincount(labels, minlength=CLASSES)).sum()
    assert right >= (8 if not trained else 7)


def test_counts_of_a_large_lopsided_batch():
    """Images of one class are alike here, as the equations of the counts suppose."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    kinds = torch.rand(CLASSES, 3, 2, 2) * 4
    labels = torch.tensor([2] * 36 + [5] * 16 + [6] * 8 + [0] * 4)
    seen = observe(model, kinds[labels], labels, batch=64)
    wrong = (infer_labels(seen)[0] != labels.sort().values).sum()
    assert wrong <= 2
    shares = torch.bincount(labels, minlength=CLASSES) / 64
    # The bias alone is off by the mean probability of a class, some images' worth of it.
    assert (seen.gradients["1.bias"][0] + shares).abs().max() > 4 / 64


def test_settings_that_cannot_be():
    with pytest.raises(FedveilError, match="steps 0 is out of range"):
        InvertingGradients(steps=0)
    with pytest.raises(FedveilError, match="tv -1"):
        InvertingGradients(tv=-1)


def test_options_of_attacks_as_written():
    attack = build_attack("ig:steps=600,tv=0.5,restarts=2")
    assert attack == InvertingGradients(steps=600, tv=0.5, restarts=2)
    with pytest.raises(FedveilError, match="has no option 'step'; its options: steps, restarts"):
        build_attack("ig:step=3")
    with pytest.raises(FedveilError, match="steps needs a whole number, not '1e3'"):
        build_attack("ig:steps=1e3")
    with pytest.raises(FedveilError, match="has no option 'dtype'"):
        build_attack("lm:dtype=float64")


def _federated(model, images, labels, local, order):
    """Weights after a client's own local training, by torch.optim on a copy."""
    own = type(model)(SHAPE, CLASSES)
    own.load_state_dict(model.state_dict())
    optimiser = torch.optim.SGD(own.parameters(), local.learning_rate)
    for epoch in order:
        for index in epoch.split(local.batch_size):
            optimiser.zero_grad()
            F.cross_entropy(own(images[index]), labels[index]).backward()
            optimiser.step()
    length = local.learning_rate * local.steps(len(images))
    after = dict(own.named_parameters())
    gradients = {
        name: ((weight - after[name]).detach() / length)[None]
        for name, weight in model.named_parameters()
    }
    return Observation(model, gradients, SHAPE, CLASSES, len(images), local=local)


def test_local_steps_are_simulated_as_torch_makes_them(cnn, photos):
    local = LocalSteps(epochs=2, batch_size=3, learning_rate=0.1)
    orders = [torch.arange(8), torch.tensor([7, 1, 5, 0, 2, 6, 3, 4])]
    seen = _federated(cnn, photos, LABELS, local, orders)
    measure = GradientMap.of(seen, dtype=torch.float32, device=torch.device("cpu"))
    found = measure(photos, LABELS, orders[1:])
    assert local.steps(8) == 6
    for name, value in found.items():
        assert torch.allclose(value, seen.gradients[name][0], rtol=1e-3, atol=1e-5)


def test_simulating_local_steps_beats_taking_the_update_for_a_gradient(cnn, photos):
    local = LocalSteps(epochs=5, batch_size=1, learning_rate=0.3)
    orders = [torch.arange(1)] * 5
    seen = _federated(cnn, photos[:1], LABELS[:1], local, orders)
    naive = SHORT(dataclasses.replace(seen, local=None))
    aware = SHORT(seen)
    assert psnr(aware.images[0], photos[:1]) > psnr(naive.images[0], photos[:1]) + 1
    with pytest.raises(FedveilError, match="use --attack ig, which simulates"):
        DLG()(seen)
