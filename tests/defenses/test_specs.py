"""Defences as they are written, two joined by a plus among them."""

import pytest
import torch
from torch.nn import functional as F

from fedveil.audit.settings import Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import load_dataset
from fedveil.defenses import BlockDCT, parse_defense
from fedveil.defenses.sanitizers import Pruning
from fedveil.errors import FedveilError
from fedveil.models import build_model
from fedveil.secure_random import SecureGenerator


def test_a_plus_joins_a_transformation_and_a_change_of_the_update():
    joined = parse_defense("noise:ratio=1e+1+dct:keep=16")
    assert joined.names == ("noise", "dct")
    assert joined.family == "noise+dct"
    assert isinstance(joined.transform, BlockDCT)
    assert joined.sanitizer.ratio == 10
    assert joined.strength == pytest.approx(10 + 0.75)
    assert joined.soteria is joined.privacy is None


def test_a_single_one_has_its_own_strength_and_none_has_nothing():
    assert parse_defense("dct:keep=16").strength == pytest.approx(0.75)
    none = parse_defense("none")
    assert (none.family, none.names, none.strength) == ("none", (), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none+dct:keep=3", "cannot be joined so"),
        ("dct:keep=3+none", "cannot be joined so"),
        ("dct:keep=3+jpeg:quality=5", "joins one transformation of images"),
        ("prune:share=0.5+noise:ratio=1", "and one change of the update"),
        ("soteria:share=0.5+dp-sgd:noise=1", "cannot be joined so"),
        ("dct:keep=3+nois:ratio=1", "did you mean 'noise'"),
        ("dct:keep=3+noise", "noise:ratio="),
        ("none:keep=3", "no option 'keep'"),
    ],
)
def test_joins_that_cannot_be(text, message):
    with pytest.raises(FedveilError, match=message):
        parse_defense(text)


def test_both_parts_act_on_what_a_federation_returns():
    digits = load_dataset("digits")
    model = build_model("lenet", digits.shape, 10, seed=0)
    watched = WatchedFederation(digits, model, Watching(clients=4, victim=1, images=1))
    seen = watched.observe(parse_defense("dct:keep=3+prune:share=0.5"))
    used = digits.train[watched.ground_truth()]
    loss = F.cross_entropy(model(BlockDCT(keep=3)(used.pixels)), used.labels)
    named = dict(model.named_parameters())
    gradient = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    expected = Pruning(share=0.5)(gradient, SecureGenerator())
    for name, value in expected.items():
        torch.testing.assert_close(seen.gradients[name][0], value, atol=1e-6, rtol=1e-4)
    assert seen.knows is not None
    assert seen.sanitizer is not None
