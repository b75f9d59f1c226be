import dataclasses

import pytest
import torch
from torch import nn

from fedveil.attacks.inversion import (
    DLG,
    IDLG,
    RGAP,
    LevenbergMarquardt,
    Observation,
    build_attack,
    range_of,
)
from fedveil.defenses import Pruning
from fedveil.errors import FedveilError
from tests.attacks.inversion.conftest import CLASSES, observe, sanitised

LABEL = torch.tensor([1])


def _images(count=1):
    return torch.rand(count, 3, 8, 8)


def _net(*middle):
    return nn.Sequential(*middle, nn.Flatten(), nn.LazyLinear(CLASSES))


def _seen(model):
    model(_images(2))
    return observe(model, _images(), LABEL)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(192, CLASSES)

    def forward(self, x):
        return self.fc((x + self.conv(x)).flatten(1))


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, CLASSES)

    def forward(self, x):
        return self.fc(x.detach().flatten(1))


@pytest.mark.parametrize("attack", [DLG(), IDLG(), RGAP(), LevenbergMarquardt()])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: _net(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Dropout(0.5)), "layer 2 \\(Dropout\\)"),
        (lambda: _net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "layer 1 \\(BatchNorm2d\\)"),
        (Rounded, "is not differentiable"),
    ],
)
def test_models_no_attack_takes(attack, model, message):
    with pytest.raises(FedveilError, match=message):
        attack(_seen(model()))


def test_dropout_and_batch_norm_are_fine_in_evaluation_mode():
    model = _net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Dropout(0.5))
    model(_images(2))
    DLG(steps=1)(_seen(model.eval()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: _net(nn.Conv2d(3, 4, 3), nn.ReLU()), "rgap does not apply, _?1"),
        (lambda: _net(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Sigmoid()), "_?1 .* stops it"),
        (lambda: _net(nn.Conv2d(3, 4, 3, bias=False), nn.Sigmoid()), "0 has no bias"),
        (lambda: _net(nn.Conv2d(3, 3, 3, groups=3), nn.Sigmoid()), "groups"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES), nn.Sigmoid()), "end with"),
        (Residual, "used more than once"),
        (lambda: _net(nn.Conv2d(3, 1, 2, stride=2), nn.Sigmoid()), "rgap stops at 0"),
    ],
)
def test_closed_form_says_which_layer_stops_it(model, message):
    with pytest.raises(FedveilError, match=message):
        RGAP()(_seen(model()))


def test_images_of_a_size_the_model_does_not_take():
    seen = dataclasses.replace(_seen(_net(nn.Conv2d(3, 4, 3), nn.Sigmoid())), shape=(3, 9, 9))
    with pytest.raises(FedveilError, match=r"fails on images of shape \(3, 9, 9\)"):
        DLG()(seen)


def test_wrong_number_of_classes():
    seen = dataclasses.replace(_seen(_net(nn.Conv2d(3, 4, 3), nn.Sigmoid())), classes=7)
    with pytest.raises(FedveilError, match=r"returns \(1, 10\) where logits \(1, 7\)"):
        DLG()(seen)


@pytest.mark.parametrize(("attack", "most"), [(IDLG(), 1), (RGAP(), 1), (LevenbergMarquardt(), 8)])
def test_batches_that_are_too_large(attack, most):
    model = _net(nn.Conv2d(3, 4, 3), nn.Sigmoid())
    model(_images())
    labels = torch.arange(10)
    seen = observe(model, _images(10), labels, batch=10)
    with pytest.raises(FedveilError, match=f"at most {most}, not of 10"):
        attack(seen)


def test_fewer_equations_than_unknowns_are_no_work_for_gauss_newton():
    model = _net(nn.Conv2d(3, 4, 3), nn.Sigmoid())
    seen = _seen(model)
    entries = sum(value.numel() for value in model.parameters())
    assert entries > 192
    with pytest.raises(FedveilError, match=r"solves for 192 unknowns, and \d+ entries"):
        LevenbergMarquardt()(sanitised(seen, Pruning(share=0.97)))
    LevenbergMarquardt(steps=1, restarts=1)(seen)


def test_observations_that_cannot_be():
    seen = _seen(_net(nn.Conv2d(3, 4, 3), nn.Sigmoid()))
    with pytest.raises(FedveilError, match="at least one"):
        dataclasses.replace(seen, images=0)
    with pytest.raises(FedveilError, match=r"no gradient for 0\.bias"):
        dataclasses.replace(
            seen, gradients={k: g for k, g in seen.gradients.items() if k != "0.bias"}
        )
    with pytest.raises(FedveilError, match="same model"):
        dataclasses.replace(seen, gradients={**seen.gradients, "0.bias": torch.zeros(1, 9)})
    with pytest.raises(FedveilError, match="is not finite"):
        dataclasses.replace(seen, gradients={k: g * torch.nan for k, g in seen.gradients.items()})
    with pytest.raises(FedveilError, match="holds no victims"):
        Observation(seen.model, {k: g[:0] for k, g in seen.gradients.items()}, (3, 8, 8), CLASSES)


def test_transformations_without_a_subspace():
    class Square(nn.Module):
        def forward(self, images):
            return images.square()

    class Half(nn.Module):
        def forward(self, images):
            return images[..., ::2, ::2]

    with pytest.raises(FedveilError, match="is not linear"):
        range_of(Square(), (1, 4, 4))
    with pytest.raises(FedveilError, match="keeps the shape"):
        range_of(Half(), (1, 4, 4))


def test_unknown_attack():
    with pytest.raises(FedveilError, match="did you mean 'dlg'"):
        build_attack("dgl")
