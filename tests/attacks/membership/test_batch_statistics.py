"""Membership by running statistics: exact in the client's own mode, whatever is done to weights."""

import copy
import json

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import LocalSteps, Observation
from fedveil.attacks.membership import BatchStatistics
from fedveil.audit.leakage import audit_leakage
from fedveil.audit.membership import picked_out, unread
from fedveil.audit.metrics import recognised
from fedveil.audit.settings import LeakageSettings, Watching
from fedveil.audit.watch import WatchedFederation, observation_from_records
from fedveil.data import load_dataset
from fedveil.defenses import parse_defense
from fedveil.errors import InapplicableAttackError


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


class Net(nn.Module):
    """Two normalised layers, the second of which is used twice on the way of the third."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.norm, self.twice, self.last = (nn.BatchNorm2d(12) for _ in range(3))
        self.loose = nn.BatchNorm2d(12, track_running_stats=False)
        self.output = nn.Linear(12, 10)

    def forward(self, images):
        x = F.relu(self.norm(self.first(images)))
        x = F.relu(self.last(self.second(self.loose(x))))
        return self.output(self.twice(self.twice(x)).mean((2, 3)))


def _normed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(2048, 10),
    )  # fmt: skip


def _seen(model, clients, local):
    """Return what a server has of the sum of clients, and what each client had."""
    model = model.train()
    sent = ArrayRecord(model.state_dict())
    states = []
    for images in clients:
        own = copy.deepcopy(model)
        descent = torch.optim.SGD(own.parameters(), local.learning_rate)
        for index in torch.split(torch.arange(len(images)), local.batch_size):
            descent.zero_grad()
            F.cross_entropy(own(images[index].pixels), images[index].labels).backward()
            descent.step()
        states.append(own.state_dict())
    mean = {
        name: torch.stack([one[name] for one in states]).mean(0) if v.is_floating_point() else v
        for name, v in states[0].items()
    }
    return observation_from_records(
        model, sent, [ArrayRecord(mean)], shape=(1, 8, 8), classes=10, steps=local,
        images=sum(map(len, clients)), clients=len(clients),
    )  # fmt: skip


def _picked(seen, used, others, public):
    attack = BatchStatistics()
    members, strangers = (attack(seen, images, public) for images in (used, others))
    return float(recognised(members, strangers).mean())


def test_the_one_image_of_a_batch_is_told_to_rounding(digits):
    train, public = digits.train, digits.test[:150]
    step = LocalSteps(epochs=1, batch_size=1, learning_rate=0.1)
    exact = _normed()
    for model in (exact, Net()):
        seen = _seen(model, [train[5:6]], step)
        scores = BatchStatistics()(seen, train[:200], public)[0]
        assert int(scores.argmax()) == 5
        if model is exact:
            beaten = scores[torch.arange(200) != 5].max()
            assert 0 >= scores[5] > 1e-4 * beaten, (scores[5], beaten)


@pytest.mark.parametrize(
    ("clients", "images", "batch", "least"), [(1, 4, 4, 0.5), (3, 2, 2, 0.4), (1, 8, 4, 0.05)]
)
def test_batches_sums_and_several_steps(digits, clients, images, batch, least):
    train, public = digits.train, digits.test[:300]
    groups = [train[images * client : images * (client + 1)] for client in range(clients)]
    local = LocalSteps(epochs=1, batch_size=batch, learning_rate=0.01)
    seen = _seen(_normed(), groups, local)
    assert (seen.local is None) == (images == batch)
    share = _picked(seen, train[: clients * images], train[400:700], public)
    assert share > least, share


def test_no_change_of_the_update_hides_what_statistics_tell(digits):
    train, public = digits.train, digits.test[:150]
    step = LocalSteps(epochs=1, batch_size=8, learning_rate=0.1)
    seen = _seen(_normed(), [train[:8]], step)
    scores = BatchStatistics()(seen, train[:50], public)
    lost = {name: torch.randn_like(value) for name, value in seen.gradients.items()}
    blind = Observation(
        seen.model, lost, seen.shape, seen.classes, seen.images, statistics=seen.statistics
    )
    assert torch.equal(BatchStatistics()(blind, train[:50], public), scores)
    bare = Observation(seen.model, lost, seen.shape, seen.classes, seen.images)
    with pytest.raises(InapplicableAttackError, match="no running statistics"):
        BatchStatistics()(bare, train[:50], public)


def _watched(digits, **more):
    watching = Watching(clients=4, images=12, batch=4, workers=1, **more)
    return WatchedFederation(digits, _normed(), watching)


@pytest.mark.parametrize(
    ("defense", "more"),
    [
        ("noise:ratio=100", {"update": "step"}),
        ("prune:share=0.99", {"update": "step"}),
        ("none", {"update": "fedavg", "batch_size": 4, "learning_rate": 0.05}),
    ],
)
def test_statistics_reach_the_server_of_a_federation_past_sanitisers(digits, defense, more):
    federation, known = _watched(digits, **more), parse_defense(defense)
    seen, used = federation.observe(known), federation.ground_truth()
    assert not unread(seen)
    found = picked_out(
        known, seen, digits, used, seed=0, attacks=("batch-statistics",), naive=False
    )
    assert float(found[-1].picked.mean()) > 0.4


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"update": "step", "batch_statistics": False}, "came back as they went"),
        ({"update": "gradient"}, "a gradient came back"),
    ],
)
def test_updates_without_statistics_clear_nobody_who_sends_them(digits, more, why):
    seen = _watched(digits, **more).observe(parse_defense("none"))
    assert not seen.statistics
    (sentence,) = unread(seen)
    assert "not told of 1 and 1 other layer" in sentence
    assert why in sentence
    assert "gives them away" in sentence


def test_an_audit_says_that_statistics_were_withheld(digits, tmp_path):
    settings = LeakageSettings(
        clients=4, images=4, batch=4, attacks=("ig:steps=1",), workers=1, update="fedavg",
        batch_statistics=False,
    )  # fmt: skip
    report = audit_leakage(digits, _normed(), settings, out=tmp_path)
    assert "batch-statistics" not in {one.attack for one in report.membership["none"]}
    (sentence,) = json.loads((tmp_path / "leakage.json").read_text())["untold"]
    assert sentence in report.table()
