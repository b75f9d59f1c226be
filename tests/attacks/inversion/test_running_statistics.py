"""What running statistics tell, against a plain loop that watches every batch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion.running_statistics import read_running_statistics


def _net(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(),
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=momentum), nn.Flatten(), nn.Linear(80, 3),
        nn.BatchNorm1d(3, momentum=momentum),
    )  # fmt: skip


def _trained(model, batches):
    """Train a copy, and return its state and what each layer was given in each step."""
    own, seen = copy.deepcopy(model).train(), {}
    for name, module in own.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(
                lambda _m, inputs, name=name: seen.setdefault(name, []).append(
                    inputs[0].detach().double().transpose(0, 1).flatten(1)
                )
            )
    descent = torch.optim.SGD(own.parameters(), 0.1)
    for batch in batches:
        descent.zero_grad()
        F.cross_entropy(own(batch), torch.arange(len(batch)) % 3).backward()
        descent.step()
    return own.state_dict(), seen


def _batches(count, seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, size, 2, 8, 8, generator=generator).unbind()


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_mix_of_batches_is_that_of_a_plain_loop(momentum, steps):
    model = _net(momentum)
    model.load_state_dict(_trained(model, _batches(3, seed=9))[0])  # statistics of others before
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after, seen = _trained(model, _batches(steps))
    found = read_running_statistics(model, before, [after], steps=99)
    assert not found.unread
    weights: list[float] = []
    for step in range(steps):
        taken = 1 / (3 + step + 1) if momentum is None else momentum
        weights = [(1 - taken) * weight for weight in weights] + [taken]
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    for name, given in seen.items():
        layer = found.layers[name]
        means = torch.stack([one.mean(dim=1) for one in given])
        variances = torch.stack([one.var(dim=1) for one in given])
        assert torch.allclose(layer.mean[0], shares @ means, atol=2e-5)
        assert torch.allclose(layer.variance[0], shares @ variances, rtol=1e-3, atol=2e-5)
        assert float(layer.concentration[0]) == pytest.approx(float(shares.square().sum()))
        assert int(layer.batches[0]) == steps


def test_a_sum_of_clients_tells_the_mean_of_what_each_would():
    model = _net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = [_trained(model, _batches(2, seed))[0] for seed in range(3)]
    alone = read_running_statistics(model, before, states, steps=2).layers
    mean = {
        name: torch.stack([one[name] for one in states]).mean(dim=0)
        for name, value in before.items()
        if value.is_floating_point()
    }
    together = read_running_statistics(model, before, [mean], steps=2).layers  # without a counter
    for name, layer in together.items():
        assert torch.allclose(layer.mean[0], alone[name].mean.mean(dim=0), atol=2e-5)
        assert torch.allclose(layer.variance[0], alone[name].variance.mean(dim=0), rtol=1e-3)
        assert torch.equal(alone[name].select(torch.tensor([2])).mean, alone[name].mean[2:])


def test_layers_that_tell_nothing_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.BatchNorm2d(2)
            self.unused = nn.BatchNorm2d(2)
            self.fixed = nn.BatchNorm2d(2)
            self.still = nn.BatchNorm2d(2, momentum=0.0)
            self.untracked = nn.BatchNorm2d(2, track_running_stats=False)
            self.kept = nn.BatchNorm2d(2)

        def forward(self, images):
            for layer in (self.used, self.fixed, self.still, self.untracked, self.kept):
                images = layer(images)
            return images

    model = Odd()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.fixed.eval()
    model(_batches(1)[0])
    after = {k: v for k, v in model.state_dict().items() if not k.startswith("kept.running")}
    found = read_running_statistics(model, before, [after], steps=1)
    assert set(found.layers) == {"used"}
    assert {name: why.split(",")[0].split(":")[0] for name, why in found.unread.items()} == {
        "unused": "its running statistics came back as they went",
        "fixed": "its running statistics came back as they went",
        "still": "its running statistics came back as they went",
        "untracked": "it keeps no running statistics",
        "kept": "its running statistics did not come back",
    }
    some = read_running_statistics(model, before, [model.state_dict(), before], steps=1)
    assert some.unread["used"] == "only some of the victims returned its running statistics"
