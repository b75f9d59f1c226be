"""Each attack on a small model, on what it should and should not be able to do."""

from dataclasses import fields, replace

import pytest
import torch
from sklearn.linear_model import Ridge

from fedveil.attacks.theft import (
    ATTACKS,
    Direct,
    Distil,
    FineTune,
    LocalEpochs,
    Probe,
    ReestimateBatchNorm,
    RetrainNoised,
    Surgical,
    TheftObservation,
)
from fedveil.attacks.theft.fine_tuning import layers
from fedveil.errors import FedveilError
from fedveil.models import build_model
from tests.attacks.theft.conftest import Small, accuracy, train

OUTPUT = ("output.weight", "output.bias")


def noisy(weights, names, sigma=5.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + sigma * value.std() * torch.randn(value.shape, generator=generator)
        if name in names
        else value
        for name, value in weights.items()
    }


def test_an_observation_has_no_place_for_what_a_thief_has_not():
    assert {field.name for field in fields(TheftObservation)} == {
        "architecture",
        "copies",
        "labelled",
        "unlabelled",
        "noised",
        "honest",
        "augmentation",
        "seed",
    }


def test_one_label_is_too_few(observe):
    with pytest.raises(FedveilError, match="holds 1 labelled"):
        observe(labels=1)


def test_direct_use_returns_the_copy(observe, trained):
    stolen = Direct()(observe(noisy(trained, OUTPUT), trained))
    assert all(torch.equal(stolen.weights[name], trained[name]) for name in trained)


def test_what_a_copy_withholds_starts_fresh(observe, trained):
    half = {name: value for name, value in trained.items() if name not in OUTPUT}
    start = observe(half).start
    assert torch.equal(start["hidden.weight"], trained["hidden.weight"])
    assert torch.equal(start["output.weight"], Small(3).state_dict()["output.weight"])


def test_the_probe_is_ridge_regression_as_scikit_learn_has_it(observe, trained):
    seen = observe(trained)
    stolen = Probe()(seen)
    hidden = torch.relu(
        torch.nn.functional.linear(
            4 * seen.labelled.pixels.flatten(1) - 2,
            trained["hidden.weight"],
            trained["hidden.bias"],
        )
    ).double()
    answers = torch.nn.functional.one_hot(seen.labelled.labels, 10).double()
    variance = float((hidden - hidden.mean(0)).square().sum(0).mean())
    # Without augmentation four equal views weigh four times what one does, on both sides.
    distances = []
    for power in range(-4, 3):
        oracle = Ridge(alpha=10.0**power * variance).fit(hidden.numpy(), answers.numpy())
        distances.append(abs(oracle.coef_ - stolen.weights["output.weight"].numpy()).max())
    assert min(distances) < 1e-4


@pytest.fixture(scope="module")
def alone(observe, dataset):
    return accuracy(FineTune()(observe()).weights, dataset.test)


@pytest.mark.parametrize("attack", [Probe(), RetrainNoised(), Distil()])
def test_noise_in_the_output_layer_is_undone(observe, dataset, trained, alone, attack):
    """A thief with forty labels and clean features needs no more."""
    copy = noisy(trained, OUTPUT)
    assert accuracy(copy, dataset.test) < 0.6
    stolen = attack(observe(copy, noised=OUTPUT))
    assert accuracy(stolen.weights, dataset.test) > alone + 0.04
    assert stolen.score.accuracy > 0.7


@pytest.mark.parametrize("attack", [RetrainNoised(), Surgical()])
def test_only_the_chosen_layer_moves(observe, trained, attack):
    stolen = attack(observe(noisy(trained, OUTPUT), noised=OUTPUT)).weights
    copy = noisy(trained, OUTPUT)
    moved = {name.split(".")[0] for name in copy if not torch.equal(copy[name], stolen[name])}
    assert len(moved) == 1
    if isinstance(attack, RetrainNoised):
        assert moved == {"output"}


def test_retraining_starts_from_nothing_of_the_noised_layer(observe, trained):
    """Whatever stood in the layer, the result is the same."""
    one, other = (
        RetrainNoised()(observe(noisy(trained, OUTPUT, seed=seed), noised=OUTPUT)).weights
        for seed in (1, 2)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_honest_epochs_are_the_honest_program(observe, trained):
    seen = observe(trained)
    expected = Small(0)
    expected.load_state_dict(trained)
    train(expected, seen.labelled, steps=5)
    stolen = LocalEpochs()(seen).weights
    for name, value in expected.state_dict().items():
        assert torch.allclose(stolen[name], value, atol=1e-6)


def test_heavy_noise_scores_low_but_does_not_break_fine_tuning(observe, trained):
    copy = noisy(trained, tuple(trained), sigma=1e4)
    stolen = FineTune()(observe(copy))
    assert all(torch.isfinite(value).all() for value in stolen.weights.values())
    broken = {name: value * float("nan") for name, value in trained.items()}
    assert Direct()(observe(broken)).score.accuracy == 0


def test_batch_statistics_are_measured_anew(observe, dataset):
    model = build_model("resnet-bn", dataset.shape, 10, seed=0)
    copy = {
        name: torch.full_like(value, 7.0) if "running" in name else value
        for name, value in model.state_dict().items()
    }
    seen = replace(observe(copy), architecture=model)
    assert ReestimateBatchNorm().applies(seen)
    assert not ReestimateBatchNorm().applies(observe(Small(0).state_dict()))
    weights = ReestimateBatchNorm()(seen).weights
    stem = torch.nn.functional.conv2d(
        4 * torch.cat([seen.labelled.pixels, seen.unlabelled]) - 2,
        model.state_dict()["stem.weight"],
        padding=1,
    )
    # A plain mean over batches of 250 and 50.
    parts = torch.stack([part.mean((0, 2, 3)) for part in torch.split(stem, 250)])
    assert torch.allclose(weights["stem_norm.running_mean"], parts.mean(0), atol=1e-4)


def test_training_alone_takes_every_attack_that_needs_no_copy(observe):
    alone = observe()
    able = {name for name, attack in ATTACKS.items() if attack.applies(alone)}
    assert able == {"probe", "local-epochs", "fine-tune", "surgical", "distil", "cluster"}


def test_layers_are_grouped_into_few_blocks():
    names = list(layers(build_model("cnn", (1, 8, 8), 10, seed=0)))
    assert names == ["body.0", "body.3", "hidden", "output"]
    model = build_model("resnet-gn", (1, 8, 8), 10, seed=0)
    groups = layers(model)
    assert list(groups)[:3] == ["stem", "stem_norm", "stages.0"]
    assert sorted(n for g in groups.values() for n in g) == sorted(
        name for name, _ in model.named_parameters()
    )


def test_attacks_are_the_same_twice_and_leave_the_observation_alone(observe, trained):
    seen = observe(noisy(trained, OUTPUT), noised=OUTPUT)
    before = {name: value.clone() for name, value in seen.start.items()}
    one, two = (FineTune()(seen) for _ in range(2))
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in before)
    assert all(torch.equal(seen.start[name], before[name]) for name in before)
