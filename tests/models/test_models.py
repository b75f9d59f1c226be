import sys

import pytest
import torch
from torch import nn

from fedveil.errors import FedveilError
from fedveil.models import MODELS, build_model, first_layer, has_batch_norm, output_layer


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_every_model_takes_pixels_and_can_be_trained(name, shape):
    model = build_model(name, shape, 7, seed=0)
    logits = model(torch.rand(4, *shape))
    assert logits.shape == (4, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sizes_are_the_published_ones():
    def count(name, shape, classes):
        return sum(p.numel() for p in build_model(name, shape, classes, seed=0).parameters())

    assert count("mnist-cnn", (1, 28, 28), 10) == 1_663_370  # McMahan et al. 2017, section 3
    assert count("lenet", (3, 32, 32), 100) == 85_036  # mit-han-lab's LeNet on CIFAR-100
    assert count("cnn", (1, 28, 28), 10) == 105_866


def test_the_seed_makes_the_model_and_leaves_the_callers_random_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (build_model("cnn", (1, 28, 28), 10, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["hidden.weight"], c["hidden.weight"])


def test_pooling_first_is_the_same_function():
    model = build_model("mnist-cnn", (1, 28, 28), 10, seed=0)
    pixels = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x = model.normalise(pixels)
    for conv in (model.body[0], model.body[3]):
        x = torch.max_pool2d(torch.relu(conv(x)), 2)
    usual = model.output(torch.relu(model.hidden(x.flatten(1))))
    assert torch.allclose(model(pixels), usual, atol=1e-6)


def test_only_the_batch_norm_model_has_batch_norm():
    assert [n for n in MODELS if has_batch_norm(build_model(n, (3, 32, 32), 10, seed=0))] == [
        "resnet-bn"
    ]


class Backwards(nn.Module):
    """Defines its layers in the opposite order of their use."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 10)
        self.first = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.last(self.first(x).mean(dim=(2, 3)))


def test_the_first_layer_is_found_by_execution_not_definition():
    assert first_layer(Backwards(), (3, 8, 8)) == "first"


@pytest.mark.parametrize("name", MODELS)
def test_scaling_the_output_layer_scales_the_logits(name):
    model = build_model(name, (3, 32, 32), 10, seed=0).eval()
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model(pixels)
    with torch.no_grad():
        for parameter in model.get_submodule(output_layer(model, (3, 32, 32))).parameters():
            parameter.mul_(0.1)
    assert torch.allclose(model(pixels), 0.1 * before, atol=1e-5)


def test_logits_that_are_no_layers_output_have_no_scale():
    class Doubled(Backwards):
        def forward(self, x):
            return 2 * super().forward(x)

    assert output_layer(Backwards(), (3, 8, 8)) == "last"
    with pytest.raises(FedveilError, match="--temperature=0"):
        output_layer(Doubled(), (3, 8, 8))


def test_a_model_without_layers_says_what_to_do():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x.mean(dim=(1, 2, 3), keepdim=False)[:, None] * self.scale

    with pytest.raises(FedveilError, match="--noise PATTERN"):
        first_layer(Scale(), (3, 8, 8))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lenett", "did you mean 'lenet'.*package.module:factory"),
        ("nowhere.at_all:make", "nowhere"),
        ("my_models:missing", "missing"),
        ("my_models:number", "a int, not a factory"),
        ("my_models:text", "returned a str"),
        ("my_models:narrow", r"returns \(2, 3\).*\(2, 10\)"),
        ("my_models:wrong_size", r"fails on images of shape \(1, 28, 28\)"),
        ("my_models:raising", r"cannot be made for images of shape \(1, 28, 28\).*: no such width"),
    ],
)
def test_a_wrong_model_is_explained(name, words, tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\nnumber = 3\n"
        "def text(shape, classes): return 'no'\n"
        "def narrow(shape, classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))\n"
        "def raising(shape, classes): raise ValueError('no such width')\n"
        "def wrong_size(shape, classes): return nn.Linear(5, classes)\n"
        "def good(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    assert build_model("my_models:good", (1, 28, 28), 10, seed=0)
    with pytest.raises(FedveilError, match=words):
        build_model(name, (1, 28, 28), 10, seed=0)


def test_a_patch_that_does_not_divide_the_image_is_explained():
    with pytest.raises(FedveilError, match=r"30×28.*multiples of 4"):
        build_model("vit", (1, 30, 28), 10, seed=0)
