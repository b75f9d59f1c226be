"""Soteria against Jacobians computed feature by feature."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.defenses import Soteria
from fedveil.errors import FedveilError
from fedveil.models import build_model

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 0, 5])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 30))
        self.fc = nn.Linear(30, 10)

    def represent(self, pixels):
        return torch.relu(self.body(pixels))

    def forward(self, pixels):
        return self.fc(self.represent(pixels))


def _gradients(model):
    loss = F.cross_entropy(model(IMAGES), LABELS)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True)), loss.detach()


def test_it_hides_the_features_that_leak_most_and_changes_nothing_else():
    model = Net()
    plain, loss = _gradients(model)
    with Soteria(share=0.4).protecting():
        guarded, same = _gradients(model)
    assert torch.allclose(loss, same)
    for name in plain:
        if name != "fc.weight":
            assert torch.allclose(plain[name], guarded[name], atol=1e-6)
    features = model.represent(IMAGES).detach()
    jacobian = torch.autograd.functional.jacobian(lambda x: model.represent(x).sum(0), IMAGES)
    norms = jacobian.transpose(0, 1).flatten(2).norm(dim=2)
    rank = features / (norms + 1e-12)
    delta = (model(IMAGES).softmax(1) - F.one_hot(LABELS, 10)).detach() / 3
    hidden = rank.topk(12, dim=1).indices
    exact = delta.T @ features.scatter(1, hidden, 0)
    # Four probes estimate a norm within about a third, so the edge of the share may differ.
    missed = (guarded["fc.weight"] - exact).square().sum()
    assert missed < 0.2 * (plain["fc.weight"] - exact).square().sum()
    again = torch.linalg.lstsq(delta.T, guarded["fc.weight"]).solution
    gone = (features > 1e-6) & (again.abs() < 1e-5)
    dead = features <= 1e-6
    assert ((gone | dead).sum(1) >= 12).all()
    assert (gone.sum(1) <= 12).all()


def test_a_share_of_0_changes_nothing_and_nothing_stays_behind():
    model = Net()
    plain, _ = _gradients(model)
    with Soteria(share=0).protecting():
        assert torch.allclose(_gradients(model)[0]["fc.weight"], plain["fc.weight"], atol=1e-6)
    with pytest.raises(RuntimeError, match="on purpose"), Soteria(share=0.9).protecting():
        raise RuntimeError("on purpose")
    assert torch.equal(_gradients(model)[0]["fc.weight"], plain["fc.weight"])


@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet-gn", "vit"])
def test_it_fits_every_model(name):
    images = torch.rand(2, 3, 16, 16)
    model = build_model(name, (3, 16, 16), 10, seed=0)
    labels = torch.tensor([0, 1])

    def gradients():
        found = torch.autograd.grad(
            F.cross_entropy(model(images), labels), list(model.parameters())
        )
        return dict(zip(dict(model.named_parameters()), found, strict=True))

    plain = gradients()
    with Soteria(share=0.8).protecting():
        guarded = gradients()
    layer = Soteria(share=0.8).on(model, (3, 16, 16)).layer
    changed = {k for k in plain if not torch.allclose(plain[k], guarded[k], atol=1e-5)}
    assert changed == {f"{layer}.weight"}


def test_the_attacker_drops_the_perturbed_layer():
    known = Soteria(share=0.5).on(Net(), (1, 8, 8))
    dummy = {k: torch.ones(2) for k in ("body.3.weight", "fc.weight", "fc.bias")}
    left = known.residual(dummy, {k: torch.zeros(2) for k in dummy})
    assert left.keys() == {"body.3.weight", "fc.bias"}
    with pytest.raises(FedveilError, match="call on"):
        Soteria(share=0.5).residual(dummy, dummy)


def test_a_share_of_1_is_refused():
    with pytest.raises(FedveilError, match="share=1"):
        Soteria(share=1)
