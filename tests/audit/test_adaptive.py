"""Knowing the defence: none is without what is known of it, and knowing pays where it can."""

import dataclasses

import pytest
import torch
from torch import nn

from fedveil.attacks.inversion import (
    GradientMap,
    InvertingGradients,
    LearnedInverse,
    LevenbergMarquardt,
    build_attack,
    check_declared,
)
from fedveil.audit.adaptive import attackers
from fedveil.audit.leakage import audit_leakage
from fedveil.audit.metrics import psnr
from fedveil.audit.settings import LeakageSettings, Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import load_dataset
from fedveil.defenses import BlockDCT, Defense, Pruning, check_defense, parse_defense, specs
from fedveil.errors import FedveilError
from fedveil.models import build_model


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def model(digits):
    return build_model("lenet", digits.shape, 10, seed=0)


def _watched(digits, model, **changes):
    watching = Watching(**{"clients": 4, "victim": 1, "images": 2, **changes})
    return WatchedFederation(digits, model, watching)


class _Unspoken:
    """A sanitiser that says nothing of itself."""

    strength = 1.0

    def __call__(self, update, generator):
        return dict(update)

    def residual(self, dummy, observed):
        return dummy


def test_a_defence_without_metadata_is_refused(digits, model):
    with pytest.raises(FedveilError, match="defence _Unspoken has no metadata"):
        specs._Kind.of("mine", _Unspoken)
    alone = Defense("mine", ("mine",), sanitizer=_Unspoken())
    with pytest.raises(FedveilError, match="defence _Unspoken has no metadata"):
        check_defense(alone, model, digits.shape)


def test_a_strength_that_cannot_be_is_refused_where_it_is_named():
    class Wrong(Pruning):
        metadata = dataclasses.replace(Pruning.metadata, strengths=("share=2",))

    with pytest.raises(FedveilError, match="share=2"):
        specs._Kind.of("mine", Wrong)


def test_an_attack_that_does_not_say_what_it_uses_is_refused():
    with pytest.raises(FedveilError, match="attack 'mine' does not say what it makes"):
        check_declared("mine", object())


@pytest.mark.parametrize(
    ("spec", "attack", "kinds"),
    [
        ("none", "lm", [(False, False)]),
        ("dct:keep=3", "lm", [(False, False), (True, False), (True, True)]),
        ("jpeg:quality=50", "lm", [(False, False), (True, False), (True, True)]),
        ("jpeg:quality=50", "ig:steps=5", [(False, False), (True, False), (True, True)]),
        ("prune:share=0.5", "lm", [(False, False), (True, False)]),
        ("prune:share=0.5", "dlg", [(False, False), (True, False)]),
        ("prune:share=0.5", "idlg", [(False, False), (True, False)]),
        ("prune:share=0.5", "fc", [(False, False), (True, False)]),
        ("prune:share=0.5", "rgap", [(False, False), (True, False)]),
        ("soteria:share=0.5", "ig", [(False, False), (True, False)]),
        ("dp-sgd:noise=1", "ig", [(False, False), (True, False)]),
        ("noise:ratio=1", "ig", [(False, False), (True, False)]),
        ("dct:keep=3+prune:share=0.5", "lm", [(False, False), (True, False), (True, True)]),
        ("dct:keep=3+dp-sgd:noise=1", "ig", [(False, False), (True, False), (True, True)]),
    ],
)
def test_who_attacks_what_and_what_the_naive_know(digits, model, spec, attack, kinds):
    defense = parse_defense(spec)
    informed = _watched(digits, model, images=1).observe(defense)
    found = attackers(defense, informed, build_attack(attack).uses, inverse=True)
    assert [(one.adaptive, one.inverse) for one in found] == kinds
    assert found[0].observation.knows is None
    assert found[0].observation.sanitizer is None


@pytest.mark.parametrize("spec", ["jpeg:quality=50", "dct-random:drop=0.5", "blur:sigma=0.7"])
def test_what_the_client_trained_on_is_what_is_scored(digits, model, spec):
    """An exact attack on the federation's own messages gives the image T(x) of the scoring."""
    defense, watched = parse_defense(spec), _watched(digits, model)
    seen = attackers(defense, watched.observe(defense), LevenbergMarquardt.uses, inverse=False)[0]
    found = LevenbergMarquardt()(seen.observation).images[:, 0].float()
    originals = digits.train[watched.ground_truth()].pixels
    assert (psnr(found, defense.transform(originals)) > 50).all()


def test_to_those_who_know_of_it_pruning_explains_the_true_image_best(digits, model):
    defense, watched = parse_defense("prune:share=0.7"), _watched(digits, model)
    naive, aware = attackers(
        defense, watched.observe(defense), InvertingGradients.uses, inverse=False
    )
    used = digits.train[watched.ground_truth()]
    losses = [
        GradientMap.of(seen, dtype=torch.float32, device=torch.device("cpu")).distance(
            used.pixels[:, None], used.labels[:, None], seen
        )
        for seen in (naive.observation, aware.observation)
    ]
    assert (losses[0] > 1e-4).all()
    assert (losses[1] < 1e-8).all()


def test_enough_of_a_pruned_update_gives_the_image_exactly(digits, model):
    defense, watched = parse_defense("prune:share=0.5"), _watched(digits, model, images=1)
    naive, aware = attackers(
        defense, watched.observe(defense), LevenbergMarquardt.uses, inverse=False
    )
    original = digits.train[watched.ground_truth()].pixels
    attack = LevenbergMarquardt()
    scores = [float(psnr(attack(s.observation).images[:, 0], original)) for s in (naive, aware)]
    assert scores[1] > 40
    assert scores[0] < 30


def test_soteria_does_not_stop_those_who_leave_its_layer_out(digits, model):
    defense, watched = parse_defense("soteria:share=0.8"), _watched(digits, model, images=1)
    naive, aware = attackers(
        defense, watched.observe(defense), LevenbergMarquardt.uses, inverse=False
    )
    original = digits.train[watched.ground_truth()].pixels
    attack = LevenbergMarquardt()
    scores = [float(psnr(attack(s.observation).images[:, 0], original)) for s in (naive, aware)]
    assert scores[1] > 40
    assert scores[0] < 30


def test_a_learned_inverse_passes_the_ceiling_of_what_is_left(digits):
    transform = BlockDCT(keep=6)
    undo = LearnedInverse(steps=150).fit(transform, digits.train.pixels[:1000])
    unseen = digits.test.pixels[:200]
    hidden = transform(unseen)
    gained = psnr(undo(hidden), unseen) - psnr(hidden.clamp(0, 1), unseen)
    assert float(gained.mean()) > 1
    idle = LearnedInverse(steps=0).fit(transform, unseen)
    torch.testing.assert_close(idle(hidden), hidden.clamp(0, 1))
    with pytest.raises(FedveilError, match="needs public images"):
        LearnedInverse().fit(transform, unseen[:0])


def test_the_audit_puts_the_inverse_on_top(digits, model):
    settings = LeakageSettings(
        clients=4,
        images=2,
        attacks=("lm",),
        defenses=("jpeg:quality=20",),
        inverse=True,
    )
    naive, aware, undone = audit_leakage(digits, model, settings).rows
    assert [row.attack for row in (naive, aware, undone)] == ["lm", "lm", "lm+inverse"]
    assert (naive.scores["psnr_trained"] > 50).all()
    assert undone.scores["psnr_original"].mean() > naive.scores["psnr_original"].mean()


def test_noise_is_searched_once_for_both_attackers(digits, model):
    defense = parse_defense("noise:ratio=1")
    informed = _watched(digits, model, images=1).observe(defense)
    naive, aware = attackers(defense, informed, LevenbergMarquardt.uses, inverse=False)
    assert naive.observation is aware.observation


def test_who_knows_the_transformation_compares_transformed_candidates(digits, model):
    """What is left of an image without its low frequencies resembles other images more."""
    settings = LeakageSettings(
        clients=4,
        images=8,
        attacks=("lm",),
        defenses=("dct:skip=20",),
    )
    naive, aware = audit_leakage(digits, model, settings).rows
    assert (aware.scores["psnr_trained"] > 50).all()
    assert (aware.scores["identified"] == 1).all()
    assert naive.scores["identified"].mean() < 0.5


def test_of_an_aggregate_only_the_mean_is_seen(digits, model):
    watched = _watched(digits, model, aggregate=3, images=12, batch=2)
    seen = watched.observe(parse_defense("none"))
    assert seen.images == 6
    used = digits.train[watched.ground_truth()]
    for number in range(2):
        batch = used[6 * number : 6 * number + 6]
        loss = nn.functional.cross_entropy(model(batch.pixels), batch.labels)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for got, wanted in zip(seen.gradients.values(), expected, strict=True):
            torch.testing.assert_close(got[number], wanted, rtol=1e-3, atol=1e-6)


def test_the_images_of_an_aggregate_are_searched_together(digits, model):
    settings = LeakageSettings(
        clients=4,
        images=8,
        aggregate=4,
        attacks=("ig:steps=20",),
    )
    report = audit_leakage(digits, model, settings)
    assert report.rows[0].reconstructions.shape == (8, 1, 8, 8)
    assert float(report.rows[0].scores["label_accuracy"].mean()) > 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregate": 5}, "--aggregate 5 is out of range"),
        ({"aggregate": 3, "images": 4}, "no multiple of the 3 images of a round"),
        ({"aggregate": 2, "update": "fedavg"}, "--aggregate with --update fedavg"),
    ],
)
def test_aggregates_that_cannot_be(changes, message):
    with pytest.raises(FedveilError, match=message):
        LeakageSettings(**{"clients": 4, **changes})
