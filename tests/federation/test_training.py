import copy
import math

import pytest
import torch
from torch.nn import functional as F

from fedveil.data import Images
from fedveil.federation.evaluation import count_correct
from fedveil.federation.training import LocalTraining, Strangers, train_locally
from fedveil.models import build_model


def some_images(count, shape=(1, 16, 16)):
    generator = torch.Generator().manual_seed(3)
    raw = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return Images(raw, torch.randint(0, 4, (count,), generator=generator))


def plain_loop(model, images, settings, generator):
    """What any textbook writes; returns the weighted mean loss."""
    model.train()
    optimiser = torch.optim.SGD(
        model.parameters(), lr=settings.learning_rate, momentum=settings.momentum
    )
    losses, step = [], 0
    steps = settings.epochs * math.ceil(len(images) / settings.batch_size)
    for _ in range(settings.epochs):
        for index in torch.randperm(len(images), generator=generator).split(settings.batch_size):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(images[index].pixels), images.labels[index])
            loss.backward()
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            if settings.decay:
                optimiser.param_groups[0]["lr"] = settings.learning_rate * (1 - step / steps)
            optimiser.step()
            step += 1
            losses += [loss.item()] * len(index)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["cnn", "resnet-gn", "resnet-bn", "vit", "lenet"])
@pytest.mark.parametrize(
    "settings",
    [
        # Small steps: batch normalisation of eight images takes rounding further in every step.
        LocalTraining(epochs=2, batch_size=8, learning_rate=0.01),
        LocalTraining(epochs=2, batch_size=8, momentum=0.9, learning_rate=0.01),
        LocalTraining(epochs=1, batch_size=5, clip=0.1),
        LocalTraining(epochs=2, batch_size=8, decay=True),
    ],
    ids=["plain", "momentum", "clip", "decay"],
)
def test_training_gives_what_a_plain_loop_gives(name, settings):
    images = some_images(27, (3, 16, 16))  # the last batch is smaller
    model = build_model(name, (3, 16, 16), 4, seed=1)
    plain = copy.deepcopy(model)
    loss = train_locally(model, images, settings, generator=torch.Generator().manual_seed(5))
    expected = plain_loop(plain, images, settings, torch.Generator().manual_seed(5))
    assert loss == pytest.approx(expected, rel=1e-3)
    before = build_model(name, (3, 16, 16), 4, seed=1).state_dict()
    moved = 0.0
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-4)
        moved = max(moved, float((value - before[key]).abs().max()))
    assert moved > 1e-3


def test_steps_inside_the_backward_pass_are_the_same_bits_as_steps_after_it():
    images = some_images(40)
    model = build_model("cnn", (1, 16, 16), 4, seed=1)
    plain = copy.deepcopy(model).to(memory_format=torch.channels_last)
    train_locally(model, images, LocalTraining(), generator=torch.Generator().manual_seed(0))
    plain_loop(plain, images, LocalTraining(), torch.Generator().manual_seed(0))
    for trained, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(trained, expected)


def test_training_leaves_nothing_behind_that_would_train_the_next_backward_pass():
    images = some_images(20)
    model = build_model("cnn", (1, 16, 16), 4, seed=1)
    train_locally(model, images, LocalTraining(), generator=torch.Generator())
    before = [parameter.clone() for parameter in model.parameters()]
    F.cross_entropy(model(images.pixels), images.labels).backward()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is not None


def test_frozen_parameters_stay():
    images = some_images(20)
    model = build_model("cnn", (1, 16, 16), 4, seed=1)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    train_locally(model, images, LocalTraining(), generator=torch.Generator())
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
    assert same == [True] + [False] * (len(before) - 1)


def test_the_generator_alone_decides_the_order():
    images = some_images(30)
    results = []
    for seed in (7, 7, 8):
        torch.manual_seed(len(results))
        model = build_model("cnn", (1, 16, 16), 4, seed=1)
        train_locally(model, images, LocalTraining(), generator=torch.Generator().manual_seed(seed))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_client_without_images_is_an_error():
    model = build_model("cnn", (1, 16, 16), 4, seed=1)
    with pytest.raises(ValueError, match="without images"):
        train_locally(model, some_images(0), LocalTraining(), generator=torch.Generator())


@pytest.mark.parametrize("name", ["cnn", "resnet-bn"])
def test_count_correct_counts_and_leaves_the_model_as_it_was(name):
    images = some_images(230, (3, 16, 16))
    model = build_model(name, (3, 16, 16), 4, seed=2)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        answers = copy.deepcopy(model).eval()(images.pixels).argmax(1)
    expected = int((answers == images.labels).sum())
    assert 0 < expected < 230
    for batch in (1, 64, 100, 1000):
        assert count_correct(model, images.pixels, images.labels, batch=batch) == expected
    assert count_correct(model, images.pixels, answers) == 230
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_unlabelled_images_are_taught_as_any_class_the_client_lacks():
    images = some_images(8, (1, 8, 8))
    images = Images(images.raw, torch.tensor([0, 2] * 4))
    strange = some_images(50, (1, 8, 8))
    settings = LocalTraining(epochs=1, batch_size=8, learning_rate=0.1)
    model = build_model("cnn", (1, 8, 8), 4, seed=1)
    plain = copy.deepcopy(model)
    train_locally(
        model,
        images,
        settings,
        generator=torch.Generator().manual_seed(5),
        strangers=Strangers(strange, 6),
    )
    # One step: the gradient of the mean over both kinds, written out.
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(8, generator=generator)
    drawn = torch.randint(50, (6,), generator=generator)
    known = -F.log_softmax(plain(images[order].pixels), 1)[torch.arange(8), images.labels[order]]
    logs = F.log_softmax(plain(strange[drawn].pixels), 1)
    stranger = -(logs[:, 1] + logs[:, 3]) / 2
    (torch.cat([known, stranger]).mean()).backward()
    for name, parameter in plain.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-4, atol=1e-6)
