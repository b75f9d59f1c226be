"""Models as other people write them: what fedveil does to them is right, or said in a sentence."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fedveil.copies.batch_statistics import reestimate_batch_norm
from fedveil.copies.fingerprint import Fingerprint
from fedveil.copies.noise import NoiseKey, add_noise, noise_target
from fedveil.copies.temperature import Temperature
from fedveil.data import Images
from fedveil.errors import FedveilError
from fedveil.federation.training import LocalTraining, train_locally
from fedveil.models import build_model, check_sendable, twins
from fedveil.models.layout import memory_layout

SHAPE = (1, 8, 8)
KEY = NoiseKey(bytes(range(32)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(64, 32), nn.Linear(32, 10)
        self.b, self.c = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.c.weight = self.b.weight

    def forward(self, x):
        hidden = torch.relu(self.b(torch.relu(self.a(x.flatten(1)))))
        return self.o(torch.relu(self.c(hidden)))


class Viewing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.o = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 10)

    def forward(self, x):
        return self.o(F.relu(self.conv(x)).view(len(x), -1))


class Solid(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.o = nn.Conv3d(1, 4, (1, 3, 3), padding=(0, 1, 1)), nn.Linear(256, 10)

    def forward(self, x):
        return self.o(F.relu(self.conv(x.unsqueeze(1))).flatten(1))


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.o = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.o(self.gru(x[:, 0])[0][:, -1])


def _pruned():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, 10))
    prune.l1_unstructured(model[1], "weight", 0.5)
    return model


def _dropout():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))


def _batch_norm():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))


def _images(count):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)
    return Images(raw, torch.arange(count) % 10)


@pytest.mark.parametrize("make", [Tied, Viewing, Solid, Rows, _pruned, _dropout, _batch_norm])
def test_it_trains_to_the_same_bits_for_the_same_seed_whoever_drew_before(make):
    torch.manual_seed(0)
    start = make()
    ends = []
    for noise in (3, 7):
        torch.manual_seed(noise)  # what another client of the same process left behind
        model = make()
        model.load_state_dict(start.state_dict())
        settings = LocalTraining(batch_size=5, learning_rate=0.1)
        loss = train_locally(
            model, _images(21), settings, generator=torch.Generator().manual_seed(5)
        )
        assert 0 < loss < 10
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    moved = [n for n, v in start.state_dict().items() if not torch.equal(v, ends[0][n])]
    assert moved


def test_a_tied_weight_is_one_tensor_whatever_its_names():
    model = Tied()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert twins(model) == {"c.weight": "b.weight"}
    for where in ("all", "c.weight", "b.*"):
        noise = noise_target(model, SHAPE, where).draw(
            weights, KEY, run="r", round_number=1, group="g"
        )
        copy = add_noise(weights, noise, 1.0)
        assert torch.equal(copy["b.weight"], copy["c.weight"])
        assert not torch.equal(copy["c.weight"], weights["c.weight"])
    marked = Fingerprint.of(model, KEY, strength=0.1).apply(weights, round_number=1, client=0)
    assert torch.equal(marked["b.weight"], marked["c.weight"])
    assert not torch.equal(marked["c.weight"], weights["c.weight"])


def test_a_scale_that_would_change_answers_is_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(64, 64), nn.Linear(64, 64)
            self.o.weight = self.a.weight

        def forward(self, x):
            return self.o(torch.tanh(self.a(x.flatten(1))))

    with pytest.raises(FedveilError, match="also the weight of another layer"):
        Temperature.of(Shared(), SHAPE, 10.0)


def test_frozen_parameters_carry_no_noise_and_names_with_brackets_are_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.ModuleDict({"in[0]": nn.Linear(64, 8), "out[1]": nn.Linear(8, 10)})
            self.m["in[0]"].requires_grad_(False)

        def forward(self, x):
            return self.m["out[1]"](torch.relu(self.m["in[0]"](x.flatten(1))))

    model = Named()
    own = ("m.out[1].weight", "m.out[1].bias")
    assert noise_target(model, SHAPE, "all").names == own
    assert noise_target(model, SHAPE, "output").names == own
    assert noise_target(model, SHAPE, "m.out[1].bias").names == own[1:]
    with pytest.raises(FedveilError, match="matches no parameter"):
        noise_target(model, SHAPE, "first-conv")


@pytest.mark.parametrize(
    ("make", "bears"),
    [(Viewing, False), (Solid, False), (lambda: build_model("cnn", SHAPE, 10, seed=0), True)],
)
def test_channels_last_is_given_up_per_model(make, bears):
    model = make()
    layout = memory_layout(model, torch.zeros(2, *SHAPE))
    assert (layout == torch.channels_last) == bears
    assert model(torch.zeros(2, *SHAPE)).shape == (2, 10)


def test_batch_normalisation_without_statistics_has_none_to_measure():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4)
    )
    found = reestimate_batch_norm(model, model.state_dict(), torch.rand(20, *SHAPE))
    assert float((found["2.running_mean"]).abs().sum()) > 0
    assert "1.running_mean" not in found


class _Extra(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


def _half_buffer():
    model = nn.Linear(64, 10)
    model.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16))
    return model


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_half_buffer, "scale is torch.bfloat16"),
        (lambda: nn.Linear(64, 10).to(torch.bfloat16), "weight is torch.bfloat16"),
        (lambda: _Extra(64, 10), "_extra_state is a dict"),
    ],
)
def test_what_no_message_carries_is_named(make, told):
    with pytest.raises(FedveilError, match=told):
        check_sendable(make())


def test_lazy_layers_are_initialised_under_the_seed(tmp_path, monkeypatch):
    (tmp_path / "lazy_net.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    sums = set()
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        model = build_model("lazy_net:net", SHAPE, 10, seed=0)
        sums.add(float(sum(p.double().sum() for p in model.parameters())))
    assert len(sums) == 1


@pytest.mark.parametrize(
    "content",
    ["raise SystemExit(3)", "open('/nonexistent')", "def net(:", "1 / 0", "net = 3", "x = 1"],
)
def test_a_model_file_that_fails_is_one_sentence(tmp_path, monkeypatch, content):
    (tmp_path / "bad_net.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("bad_net", None)
    with pytest.raises(FedveilError, match="'bad_net:net'"):
        build_model("bad_net:net", SHAPE, 10, seed=0)
