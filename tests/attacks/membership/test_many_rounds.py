"""Many rounds of one client's updates, beside a computation of their z in numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import Observation
from fedveil.attacks.membership import GradientMembership, ManyRounds
from fedveil.audit.leakage import audit_leakage
from fedveil.audit.metrics import area
from fedveil.audit.settings import LeakageSettings, Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import Images, load_dataset
from fedveil.defenses import Defense
from fedveil.errors import FedveilError
from fedveil.models import build_model

WATCHING = {
    "clients": 5,
    "victim": 2,
    "images": 24,
    "batch": 24,
    "update": "fedavg",
    "batch_size": 24,
    "repeats": 3,
    "workers": 1,
}


class Given:
    """Scores that were decided beforehand, one round after the other."""

    def __init__(self, rounds):
        self.rounds = iter(rounds)

    def __call__(self, _observation, _candidates, _public):
        return next(self.rounds)


def blank(clients):
    model = nn.Linear(1, 2)
    gradients = {name: p[None].expand(clients, *p.shape) for name, p in model.named_parameters()}
    return Observation(model, gradients, (1, 1, 1), 2)


def images(count):
    return Images(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64))


def combined(scores, **options):
    """Return what scores [R, K, M] come to."""
    rounds = [blank(scores.shape[1])] * len(scores)
    found = ManyRounds(base=Given(scores), **options)(rounds, images(scores.shape[2]), images(1))
    assert found.shape == (1, scores.shape[2])
    return found[0]


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_the_mean_of_z_against_other_clients(shared):
    scores = torch.randn(4, 7, 30, generator=torch.Generator().manual_seed(0)).double()
    wanted = np.zeros(30)
    for one in scores.numpy():
        variance = one[1:].var(axis=0, ddof=1)
        variance = (1 - shared) * variance + shared * variance.mean()
        wanted += (one[0] - one[1:].mean(axis=0)) / np.sqrt(variance) / 4
    assert np.allclose(combined(scores, shared=shared).numpy(), wanted)


def test_more_rounds_tell_more_and_a_candidates_own_difficulty_nothing():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(16, 10, 400, generator=generator).double()
    scores[:, 0, :200] += 0.5
    scores += 20 * torch.randn(1, 1, 400, generator=generator)  # of the image, whoever is asked
    plain = area(scores[:, 0, :200].mean(0), scores[:, 0, 200:].mean(0)).value
    told = [area(found[:200], found[200:]).value for found in map(combined, (scores[:1], scores))]
    assert plain < 0.6
    assert 0.55 < told[0] < 0.75
    assert told[1] > 0.87


def test_a_null_of_two_clients_is_refused():
    with pytest.raises(FedveilError, match="3 others"):
        ManyRounds(base=GradientMembership())([blank(3)], images(4), images(4))
    with pytest.raises(FedveilError, match="0 rounds"):
        ManyRounds(base=GradientMembership())([], images(4), images(4))


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_a_followed_federation_trains_on_the_same_images_and_moves_on(digits):
    model = build_model("lenet", digits.shape, 10, seed=0)
    watched = WatchedFederation(digits, model, Watching(**WATCHING, learning_rate=0.3))
    rounds = watched.follow(Defense("none"))
    assert [seen.victims for seen in rounds] == [5, 5, 5]
    used = digits.train[watched.ground_truth()]
    for number, seen in enumerate(rounds):
        named = dict(seen.model.named_parameters())
        loss = F.cross_entropy(seen.model(used.pixels), used.labels)
        for name, own in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            # The victim's first, of its own images at this round's weights.
            assert torch.allclose(seen.gradients[name][0].float(), own, atol=1e-5)
            if number:
                before = rounds[number - 1]
                mean = before.gradients[name].mean(dim=0)
                was = dict(before.model.named_parameters())[name]
                assert torch.allclose(named[name].double(), was.double() - 0.3 * mean, atol=1e-5)


def test_an_audit_puts_the_rounds_together(digits):
    model = build_model("cnn", digits.shape, 10, seed=0)
    settings = LeakageSettings(**WATCHING, learning_rate=0.1, attacks=("ig:steps=1",))
    report = audit_leakage(digits, model, settings)
    told = {row.attack: row for row in report.membership["none"] if row.adaptive}
    assert {"gradient", "span", "gradient × 3 rounds", "span × 3 rounds"} <= told.keys()
    single, many = told["gradient"].strangers, told["gradient × 3 rounds"].strangers
    assert float(many.above.mean()) >= float(single.above.mean()) - 0.02
    assert float(many.above.mean()) > 0.8
    assert "gradient × 3 rounds" in report.table()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 12}, "--batch 24, as many as --images"),
        ({"update": "gradient"}, "--update fedavg"),
        ({"clients": 3}, "--clients 4 or more"),
        ({"repeats": 0}, "--repeats 0 is out of range"),
    ],
)
def test_settings_that_cannot_be_followed(changes, message):
    with pytest.raises(FedveilError, match=message):
        Watching(**(WATCHING | changes))
