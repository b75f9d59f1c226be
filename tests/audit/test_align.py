"""Tracing after what changes no answer: the order and the scale of hidden units."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fedveil.audit import trace as tracing
from fedveil.audit.align import aligned, nearest
from fedveil.audit.hosts import Hosts
from fedveil.audit.trace import Lineups, log10_p
from fedveil.copies.fingerprint import Fingerprint
from fedveil.copies.noise import NoiseKey
from fedveil.models import build_model
from fedveil.runs.archive import Archive, Entry

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import disguised_trace

KEY = NoiseKey(b"thirty-two bytes of a secret key")
OUTPUT = ("output.weight", "output.bias")


def network(seed):
    return {
        name: value.detach().clone()
        for name, value in build_model("cnn", (1, 8, 8), 10, seed=seed).named_parameters()
    }


def disguised(state, seed, *, permute=True, rescale=True):
    """The same function: units of both convolutions and of the hidden layer moved and scaled."""
    return disguised_trace.disguised(state, seed, permute=permute, rescale=rescale)


def answers(state, pixels):
    model = build_model("cnn", (1, 8, 8), 10, seed=0)
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        return model.eval()(pixels)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Two rounds of a pair of copies that differ in the output layer, 8 clients each."""
    made = Archive.create(tmp_path_factory.mktemp("run"), KEY)
    mark = Fingerprint.of(build_model("cnn", (1, 8, 8), 10, seed=0), KEY, strength=0.05)
    for number in (1, 2):
        base = network(number)
        pair = tuple(
            {
                name: value + sign * 3 * value.std() * torch.sin(37 * value / value.std())
                if name in OUTPUT
                else value
                for name, value in base.items()
            }
            for sign in (1, -1)
        )
        made.write(Entry(number, pair, {client: client % 2 for client in range(8)}, mark))
    return made


@pytest.fixture(scope="module")
def suspects(kept):
    return Hosts.of(kept), list(Lineups(kept))


def trace(leaked, suspects):
    return tracing.trace(leaked, *suspects)


def test_a_disguise_is_taken_off(kept):
    base = kept.read(1).copies[0]
    own = kept.read(1).received(4).weights
    hidden = disguised(own, 5)
    pixels = torch.rand(20, 1, 8, 8)
    assert torch.allclose(answers(own, pixels), answers(hidden, pixels), atol=1e-4)
    found = aligned(hidden, base)
    assert torch.allclose(answers(found, pixels), answers(hidden, pixels), atol=1e-4)
    for name in ("body.0.weight", "body.3.weight", "hidden.weight"):
        # To the scale of each unit, which is the base's then, not the copy's.
        assert torch.allclose(found[name], own[name], rtol=0.1, atol=0.02)


def test_what_wears_no_disguise_is_left_as_it_is_to_the_bit(kept):
    entry = kept.read(1)
    own = entry.received(4).weights
    found = aligned(own, entry.copies[0])
    assert all(torch.equal(found[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("permute", "rescale"), [(True, False), (False, True), (True, True)], ids=str
)
@pytest.mark.parametrize("change", ["nothing", "tuned", "pruned", "quantised"])
def test_the_receiver_is_named_under_a_disguise(kept, suspects, permute, rescale, change):
    leaked = dict(kept.read(2).received(3).weights)
    if change == "tuned":
        generator = torch.Generator().manual_seed(1)
        leaked = {
            n: v + 0.02 * v.std() * torch.randn(v.shape, generator=generator)
            for n, v in leaked.items()
        }
    if change == "pruned":
        leaked = {n: torch.where(v.abs() < 0.3 * v.std(), 0, v) for n, v in leaked.items()}
    if change == "quantised":
        leaked = {
            n: (v / v.abs().max() * 31).round() * v.abs().max() / 31 for n, v in leaked.items()
        }
    hidden = disguised(leaked, 9, permute=permute, rescale=rescale)
    found = trace(hidden, suspects)
    assert found.named == (3,)
    plain = trace(leaked, suspects).suspects[0].z
    assert found.suspects[0].z > 0.5 * plain


def test_three_colluders_are_named_under_a_disguise(kept, suspects):
    states = [kept.read(1).received(client).weights for client in (1, 4, 6)]
    mean = {n: torch.stack([s[n] for s in states]).mean(0) for n in states[0]}
    assert trace(disguised(mean, 3), suspects).named == (1, 4, 6)


def test_aligned_innocents_are_accused_no_more_often_than_by_chance(suspects):
    """Trained elsewhere from the same base, so that alignment has much to find, then disguised."""
    z = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        base = network(1 + seed % 2)
        other = {
            n: v + 0.1 * v.std() * torch.randn(v.shape, generator=generator)
            for n, v in base.items()
        }
        found = trace(disguised(other, seed), suspects)
        assert not found.named
        z += [score for suspect in found.suspects for score in suspect.scores.values()]
    assert len(z) == 40 * 16
    # z are lowered by what eight clients' fingerprints tell of the next base, here by chance alone.
    p = 10 ** np.array([log10_p(score) for score in z])
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 1e-3


def test_the_nearest_base_is_found_though_an_output_layer_is_full_of_noise():
    """The noise of a copy is larger than all else: a plain distance is that to the largest base."""
    bases = [network(seed) for seed in (1, 2, 3)]
    bases[2] = {n: 30 * v if n in OUTPUT else v for n, v in bases[2].items()}
    for number, base in enumerate(bases):
        noise = network(9)
        leaked = {n: base[n] + (200 * noise[n] if n in OUTPUT else 0) for n in base}
        assert nearest(disguised(leaked, 4), bases) is bases[number]


def normalised(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(24, 4),
    )  # fmt: skip
    for name, value in model.named_parameters():
        if name.partition(".")[0] in "14":
            value.data += 0.3 * torch.randn_like(value)
    return model.eval()


@pytest.mark.parametrize("change", ["scale", "sign", "passed on", "bias", "all"])
def test_what_a_normalisation_hides_is_taken_off(change):
    """Before it scale, sign and bias of a unit change no answer; behind it scale is passed on."""
    model = normalised(0)
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    leaked = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    by, passed, shift = torch.ones(8), torch.ones(8), torch.zeros(8)
    if change in ("scale", "all"):
        by = 10 ** (2 * torch.rand(8, generator=generator) - 1)
    if change in ("sign", "all"):
        by = by * torch.tensor([1.0, -1, 1, -1, -1, 1, 1, -1])
    if change in ("passed on", "all"):
        passed = 10 ** (2 * torch.rand(8, generator=generator) - 1)
    if change in ("bias", "all"):
        shift = torch.full((8,), 100.0)
    leaked["0.weight"] *= by.reshape(-1, 1, 1, 1)
    leaked["0.bias"] = leaked["0.bias"] * by + shift
    leaked["1.running_mean"] = leaked["1.running_mean"] * by + shift
    leaked["1.running_var"] *= by**2
    leaked["1.weight"] *= by.sign() * passed
    leaked["1.bias"] *= passed
    leaked["3.weight"] /= passed.reshape(1, -1, 1, 1)
    order = torch.randperm(8, generator=generator)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        leaked[name] = leaked[name][order]
    leaked["3.weight"] = leaked["3.weight"][:, order]
    pixels = torch.rand(9, 3, 8, 8)
    with torch.no_grad():
        wanted = model(pixels)
        model.load_state_dict(leaked)
        assert torch.allclose(model(pixels), wanted, atol=1e-3)  # the running variance has an eps
    found = aligned({name: leaked[name] for name in base}, base)
    for name in base:
        if name != "0.bias" or change in ("scale", "sign", "passed on"):
            assert torch.allclose(found[name], base[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("units", [-8, 8], ids=["removed", "added"])
def test_the_receiver_is_named_in_a_model_of_other_width(kept, suspects, units):
    """Dead units can be taken out, and added, without a change of any answer."""
    own = dict(kept.read(2).received(3).weights)
    last = "output.weight"
    generator = torch.Generator().manual_seed(2)
    count = len(own["hidden.weight"])
    if units < 0:
        leaked = {**own, last: own[last][:, -units:]}
        leaked |= {n: own[n][-units:] for n in ("hidden.weight", "hidden.bias")}
    else:
        extra = torch.randn(units, own["hidden.weight"].shape[1], generator=generator)
        leaked = {**own, last: torch.cat([own[last], torch.zeros(len(own[last]), units)], 1)}
        leaked["hidden.weight"] = torch.cat([own["hidden.weight"], extra])
        leaked["hidden.bias"] = torch.cat([own["hidden.bias"], torch.zeros(units)])
    order = torch.randperm(count + units, generator=generator)
    leaked |= {n: leaked[n][order] for n in ("hidden.weight", "hidden.bias")}
    leaked[last] = leaked[last][:, order]
    found = trace(leaked, suspects)
    assert found.named == (3,)
    assert found.compared == 1
    assert found.suspects[0].z > 0.8 * trace(own, suspects).suspects[0].z


@pytest.mark.parametrize("huge", [1e4, 1e30, 3e38, math.inf, math.nan])
def test_a_few_huge_values_hide_nothing(kept, suspects, huge):
    """A bias before a normalisation, or a weight of a unit that is never on, may be anything."""
    own = dict(kept.read(2).received(3).weights)
    leaked = {name: value.clone() for name, value in own.items()}
    for value in leaked.values():
        value.view(-1)[::97] = huge
    found = trace(leaked, suspects)
    assert found.named == (3,)
    assert found.suspects[0].z > 0.7 * trace(own, suspects).suspects[0].z


def test_of_a_model_of_the_run_that_is_nobodys_copy_nobody_is_cleared(kept, suspects):
    """The sentence said that it was another model."""
    of_run = trace(kept.read(2).copies[0], suspects)
    other = trace(network(77), suspects)
    assert not of_run.named + other.named
    assert of_run.explained > 0.9
    assert "CANNOT BE TOLD" in of_run.table(is_w=False)
    assert other.explained < 0.1
    assert "clears nobody: it is another model" in other.table(is_w=False)


def test_a_leak_without_biases_is_aligned_and_its_last_layer_scaled():
    base = network(1)
    leaked = {name: value for name, value in base.items() if not name.endswith("bias")}
    found = aligned({**leaked, "output.weight": 100 * leaked["output.weight"]}, base)
    assert found.keys() == leaked.keys()
    for name, value in leaked.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_a_model_that_is_no_chain_is_left_alone():
    base = {"a.weight": torch.randn(4, 3), "b.weight": torch.randn(5, 7)}
    leaked = {name: value.flip(0) for name, value in base.items()}
    found = aligned(leaked, base)
    assert all(torch.equal(found[name], leaked[name]) for name in base)
    assert aligned({"a.weight": base["a.weight"]}, base).keys() == {"a.weight"}
