"""Membership attacks side by side, as an audit runs them."""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import Observation
from fedveil.attacks.membership import ATTACKS, GradientMembership
from fedveil.audit.membership import Recognition, best, picked_out, table
from fedveil.audit.metrics import Ranks, recognised
from fedveil.audit.settings import Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import Images, load_dataset
from fedveil.defenses import parse_defense
from fedveil.models import build_model

SHAPE, CLASSES = (1, 3, 4), 3


def _images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, *SHAPE, generator=generator)
    return Images(pixels, torch.randint(CLASSES, (count,), generator=generator))


def test_what_all_images_have_in_common_hides_nothing():
    """Strong common directions drown a plain cosine; whitened, they weigh no more than others."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(60, 144, generator=generator) * 6

    def photographs(count):
        rows = torch.randn(count, 60, generator=generator) @ common / 8
        rows += torch.randn(count, 144, generator=generator)
        return Images(rows.view(count, 1, 12, 12), torch.randint(3, (count,), generator=generator))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 24), nn.Tanh(), nn.Linear(24, 3))
    used, others, public = photographs(60), photographs(300), photographs(400)
    named = dict(model.named_parameters())
    loss = F.cross_entropy(model(used.pixels), used.labels)
    gradients = torch.autograd.grad(loss, list(named.values()))
    update = {name: g[None] for name, g in zip(named, gradients, strict=True)}
    seen = Observation(model, update, (1, 12, 12), 3, 60)
    share = {}
    for name in ("gradient", "span"):
        attack = ATTACKS[name]
        members, strangers = attack(seen, used, public)[0], attack(seen, others, public)[0]
        share[name] = float(recognised(members, strangers).mean())
    assert share["span"] > share["gradient"] + 0.2, share


def test_every_attack_runs_in_the_audit_and_the_best_is_named():
    digits, noise = load_dataset("digits"), parse_defense("noise:ratio=1")
    model = build_model("cnn", digits.shape, 10, seed=0)
    watched = WatchedFederation(
        digits, model, Watching(clients=4, images=16, batch=8, update="step")
    )
    seen, used = watched.observe(noise), watched.ground_truth()
    found = picked_out(noise, seen, digits, used, seed=0)
    aware = picked_out(noise, seen, digits, used, seed=0, attacks=("span",), naive=False)
    assert [(one.attack, one.adaptive) for one in aware] == [("span", True)]
    (same,) = (one for one in found if (one.attack, one.adaptive) == ("span", True))
    assert torch.equal(aware[0].picked, same.picked)
    none = parse_defense("none")  # nothing to know: who does not know it is who does
    alone = picked_out(none, seen, digits, used, seed=0, attacks=("span",), naive=False)
    assert {one.adaptive for one in alone} == {False, True}
    known = {one.attack: one for one in found if one.adaptive}
    assert set(known) == {"gradient", "span"}  # the others ask for local training
    for one in known.values():
        assert one.picked.shape == (2, 8)
        assert 0.5 < one.strangers.roc().auc.value <= 1
        assert one.unseen is None  # digits has no test images beside the attacker's own
        assert float(best(found, adaptive=True).picked.mean()) >= float(one.picked.mean())
    assert known["span"].certain == known["span"].mistaken == 0  # noise leaves nothing certain


def test_batch_normalisation_is_scored_in_the_mode_the_client_trains_in():
    attack = GradientMembership()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )
    model[1].running_mean.fill_(5.0)  # of no use to a client that trains on its batch's own
    candidates, public = _images(60, 5), _images(60, 6)
    places = []
    for used in range(8):
        one = candidates[used : used + 1]
        loss = F.cross_entropy(model.train()(one.pixels), one.labels)
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()))
        update = {name: g[None] for name, g in zip(named, gradients, strict=True)}
        scores = attack(Observation(model, update, SHAPE, 3, 1), candidates, public)[0]
        places.append(int(scores.argmax()) == used)
    assert sum(places) >= 7


def test_the_table_says_once_what_both_kinds_of_attacker_tell():
    ranks = Ranks.of(torch.rand(2, 30), torch.rand(2, 200))
    other = Ranks.of(torch.rand(2, 30) + 0.5, torch.rand(2, 200))
    naive = Recognition("gradient", False, torch.zeros(2, 30), ranks, None)
    aware = dataclasses.replace(naive, adaptive=True)
    better = dataclasses.replace(aware, strangers=other)
    lines = table({"none": (naive, aware), "noise:ratio=1": (naive, better)})
    assert [line.split()[:3] for line in lines[1:]] == [
        ["gradient", "none", "either"],
        ["gradient", "noise:ratio=1", "naive"],
        ["gradient", "noise:ratio=1", "adaptive"],
    ]
    assert lines[1].split()[3:] == lines[2].split()[3:] != lines[3].split()[3:]
