"""Sanitisers of updates, alone and as mods of an app."""

import math

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import jvp, vmap

from fedveil.defenses import parse_defense
from fedveil.defenses.mods import defense_mods, withhold_batch_statistics
from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator

SPECS = ["prune:share=0.9", "clip:norm=0.5", "noise:ratio=0.1"]


def _update(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (20, 30), "a.bias": (20,)}
    return {k: torch.randn(s, generator=generator) * scale for k, s in shapes.items()}


def _length(update):
    return math.sqrt(sum(float(v.double().square().sum()) for v in update.values()))


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.999), st.integers(0, 100))
def test_pruning_keeps_the_largest(share, seed):
    before = _update(seed)
    after = parse_defense(f"prune:share={share}").sanitizer(before, SecureGenerator())
    for name, value in before.items():
        kept = after[name] != 0
        assert int(kept.sum()) == max(1, round(value.numel() * (1 - share)))
        assert torch.equal(after[name][kept], value[kept])
        if not kept.all():
            assert value[kept].abs().min() >= value[~kept].abs().max()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.floats(0.001, 10))
def test_clipping_limits_the_length_and_keeps_the_direction(norm, scale):
    before = _update(scale=scale)
    after = parse_defense(f"clip:norm={norm}").sanitizer(before, SecureGenerator())
    assert _length(after) == pytest.approx(min(norm, _length(before)), rel=1e-4)
    factor = _length(after) / _length(before)
    for name in before:
        assert torch.allclose(after[name], before[name] * factor, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_noise_is_normal_in_units_of_the_update(scale):
    before = {"w": torch.randn(200, 200) * scale, "b": torch.zeros(10_000)}
    noisy = parse_defense("noise:ratio=0.5").sanitizer(before, SecureGenerator(bytes(32)))
    added = torch.cat([(noisy[k] - before[k]).flatten() for k in before]).double()
    rms = scale * math.sqrt(0.8)
    assert float(added.std()) == pytest.approx(0.5 * rms, rel=0.02)
    z = (added - added.mean()) / added.std()
    assert float((z**4).mean()) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("spec", SPECS)
def test_the_true_update_leaves_no_residual_but_the_noise(spec):
    sanitizer = parse_defense(spec).sanitizer
    true = _update()
    observed = sanitizer(true, SecureGenerator())
    left = _length(sanitizer.residual(true, observed))
    assert left < 0.11 * _length(true) if "noise" in spec else left < 1e-5
    other = sanitizer.residual(_update(seed=9), observed)
    assert _length(other) > 0.5 * _length(observed)


@pytest.mark.parametrize("spec", SPECS)
def test_residuals_pass_through_function_transforms(spec):
    sanitizer = parse_defense(spec).sanitizer
    observed = sanitizer(_update(), SecureGenerator())
    dummies = {k: torch.stack([_update(i)[k] for i in range(3)]) for k in observed}
    together = vmap(lambda dummy: sanitizer.residual(dummy, observed))(dummies)
    for i in range(3):
        alone = sanitizer.residual(_update(i), observed)
        for name, value in alone.items():
            assert torch.allclose(together[name][i], value, atol=1e-6)
    point, direction = _update(3), _update(4)
    _, slope = jvp(lambda dummy: sanitizer.residual(dummy, observed), (point,), (direction,))
    step = 1e-3
    ahead, behind = (
        sanitizer.residual({k: point[k] + sign * step * direction[k] for k in point}, observed)
        for sign in (1, -1)
    )
    for name in slope:
        numeric = (ahead[name] - behind[name]) / (2 * step)
        assert torch.allclose(slope[name], numeric, atol=2e-3)


def _app(mods, answer):
    app = ClientApp(mods=mods)

    @app.train()
    def train(message, context):
        arrays = message.content["arrays"].to_torch_state_dict()
        content = {"arrays": ArrayRecord(answer(arrays)), "metrics": MetricRecord({"n": 1})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        return train(message, context)

    return app


def _ask(app, arrays, kind="train"):
    metadata = Metadata(0, "", 0, 0, "", "", 0.0, 1e12, kind, 0, None)
    message = make_message(metadata, RecordDict({"arrays": ArrayRecord(arrays)}))
    reply = app(message, Context(0, 0, {}, RecordDict(), {}))
    return reply.content["arrays"].to_torch_state_dict()


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).state_dict()


def _trained(arrays):
    return {
        k: v + 1 if k.endswith("tracked") else v + 0.5 * v.abs() + 0.1 for k, v in arrays.items()
    }


def test_a_mod_sanitises_the_change_of_the_weights_and_not_the_weights():
    sent = _net()
    defense = parse_defense("prune:share=0.9")
    got = _ask(_app(defense_mods(defense), _trained), sent)
    plain = _ask(_app([], _trained), sent)
    update = {k: plain[k] - sent[k] for k in ("0.weight", "0.bias", "1.weight", "1.bias")}
    clean = defense.sanitizer(update, SecureGenerator())
    for name, value in clean.items():
        assert torch.allclose(got[name], sent[name] + value, atol=1e-6)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(got[name], plain[name])


def test_a_mod_withholds_what_batch_normalisation_kept():
    sent = _net()
    got, plain = (_ask(_app(m, _trained), sent) for m in ([withhold_batch_statistics()], []))
    for name, value in got.items():
        kept = name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
        assert torch.equal(value, sent[name] if kept else plain[name]), name
        assert not torch.equal(sent[name], plain[name])
    evaluated = _ask(_app([withhold_batch_statistics()], _trained), sent, "evaluate")
    assert torch.equal(evaluated["1.running_mean"], plain["1.running_mean"])
    bare = {"0.weight": sent["0.weight"]}
    with pytest.raises(FedveilError, match=r"1\.num_batches_tracked was not in the message"):
        _ask(_app([withhold_batch_statistics()], lambda _arrays: _trained(sent)), bare)


def test_a_mod_takes_a_gradient_as_it_is():
    gradient = {"0.weight": torch.randn(4, 1, 3, 3)}
    mods = defense_mods(parse_defense("clip:norm=0.1"), returned="gradient")
    got = _ask(_app(mods, lambda arrays: gradient), _net())
    assert _length(got) == pytest.approx(0.1, rel=1e-4)


def test_a_mod_leaves_evaluation_alone_and_draws_new_noise_every_time():
    sent = {"w": torch.zeros(50)}
    mods = defense_mods(parse_defense("noise:ratio=1"))
    app = _app(mods, lambda arrays: {"w": arrays["w"] + 1})
    assert torch.equal(_ask(app, sent, "evaluate")["w"], torch.ones(50))
    assert not torch.equal(_ask(app, sent)["w"], _ask(app, sent)["w"])


def test_a_tied_weight_carries_the_same_noise_under_each_of_its_names():
    """Noise drawn anew for each name would shrink where whoever reads them takes the mean."""
    sent = {"encoder.weight": torch.zeros(50), "decoder.weight": torch.zeros(50)}
    other = {"head.weight": torch.ones(50)}
    app = _app(
        defense_mods(parse_defense("noise:ratio=1")),
        lambda arrays: {name: value + 1 for name, value in arrays.items()},
    )
    got = _ask(app, sent | other)
    assert torch.equal(got["encoder.weight"], got["decoder.weight"])
    assert not torch.equal(got["encoder.weight"], torch.ones(50))
    assert not torch.equal(got["head.weight"] - 1, got["encoder.weight"])


def test_an_app_that_trains_in_place_is_sanitised_all_the_same():
    def in_place(arrays):
        arrays["w"].add_(3)
        return arrays

    got = _ask(_app(defense_mods(parse_defense("clip:norm=1")), in_place), {"w": torch.zeros(9)})
    assert _length(got) == pytest.approx(1, rel=1e-4)


def test_a_reply_with_other_names_is_refused():
    app = _app(defense_mods(parse_defense("clip:norm=1")), lambda arrays: {"v": arrays["w"]})
    with pytest.raises(FedveilError, match="0 records of the message"):
        _ask(app, {"w": torch.zeros(9)})


@pytest.mark.parametrize(
    "spec", ["prune:share=1", "prune:share=-0.1", "clip:norm=0", "clip:norm=nan", "noise:ratio=-1"]
)
def test_strengths_that_cannot_be(spec):
    with pytest.raises(FedveilError, match="out of range"):
        parse_defense(spec)
