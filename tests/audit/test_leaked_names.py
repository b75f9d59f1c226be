"""A leaked model is looked at under whatever names and in whatever order its tensors come."""

import math

import pytest
import torch

from fedveil.audit.align import aligned
from fedveil.audit.leaked_names import as_in_the_run, shared_values
from fedveil.audit.settings import TraceSettings
from fedveil.audit.thieves import AuditedRun
from fedveil.audit.trace import run_trace
from fedveil.errors import FedveilError
from fedveil.federation.training_run import run_to_completion
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from fedveil.runs.state_files import read_state


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 3, 3), torch.nn.Flatten(), torch.nn.Linear(27, 8), torch.nn.Linear(8, 8)
    ).state_dict()


def wrapped(prefix):
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


def turned(*orders):
    by = {len(order): order for order in orders}
    return lambda state: {
        name: value.permute(by.get(value.ndim, tuple(range(value.ndim)))).contiguous()
        for name, value in state.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        wrapped("module."),
        wrapped("_orig_mod."),
        wrapped("module.model._orig_mod."),
        lambda state: {name.replace(".", "._orig_mod."): v for name, v in state.items()},
        lambda state: {name.replace(".w", ".base_layer.w"): v for name, v in state.items()},
        lambda state: {
            name.replace("weight", "parametrizations.weight.original"): v
            for name, v in state.items()
        },
        turned((1, 0)),  # the last layer is square, the convolution has as many channels in as out
        turned((1, 0), (2, 3, 1, 0)),
        lambda state: wrapped("module.")(turned((1, 0), (2, 3, 1, 0))(state)),
        lambda state: {**state, "lora_A.weight": torch.ones(8, 8)},
    ],
)
def test_wrappers_and_other_orders_hide_no_tensor(model, change):
    marked = {name: value + 0.01 * torch.randn_like(value) for name, value in model.items()}
    found = as_in_the_run(change(marked), model)
    assert shared_values(found, model) == 1
    for name, value in marked.items():
        assert torch.equal(found[name], value), name


def test_what_may_be_one_or_another_is_taken_for_neither(model):
    both = {f"{side}.{name}": value for side in ("a", "b") for name, value in model.items()}
    assert shared_values(as_in_the_run(both, model), model) == 0
    other = {"0.weight": torch.zeros(5, 5), "2.weight": torch.zeros(2, 3, 4)}
    assert shared_values(as_in_the_run(other, model), model) == 0


def test_a_square_layer_whose_units_were_permuted_is_not_turned():
    """By distance alone either orientation is as near, and every other such layer was turned."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        model = {
            "a.weight": torch.randn(16, 16, generator=generator),
            "b.weight": torch.randn(4, 16, generator=generator),
        }
        order = torch.randperm(16, generator=generator)
        leaked = {"a.weight": model["a.weight"][order], "b.weight": model["b.weight"][:, order]}
        for change in (lambda state: state, turned((1, 0))):
            found = as_in_the_run(change(leaked), model)
            assert all(torch.equal(found[name], leaked[name]) for name in model)


def sparse(state):
    return {
        n: v.to_sparse() if v.ndim == 4 else v.to_sparse_csr() if v.ndim == 2 else v
        for n, v in state.items()
    }


def exported(state):
    """As exporters name weights, in their order, while biases keep their names."""
    return {(f"onnx::Gemm_{i}" if v.ndim >= 2 else n): v for i, (n, v) in enumerate(state.items())}


def length_and_direction(length, direction):
    def change(state):
        parts = {}
        for name, value in state.items():
            if value.ndim < 2:
                parts[name] = value
                continue
            norm = value.flatten(1).norm(dim=1).reshape(-1, *[1] * (value.ndim - 1))
            stem = name.removesuffix("weight")
            parts |= {f"{stem}{length}": norm, f"{stem}{direction}": value / norm}
        return parts

    return change


@pytest.mark.parametrize(
    "change",
    [
        sparse,
        exported,
        length_and_direction("weight_g", "weight_v"),
        length_and_direction(
            "parametrizations.weight.original0", "parametrizations.weight.original1"
        ),
        lambda state: {name: value.to(torch.complex64) for name, value in state.items()},
        lambda state: {name: torch.nn.Parameter(value) for name, value in state.items()},
    ],
)
def test_tensors_are_read_as_the_numbers_they_stand_for(model, change):
    marked = {name: value + 0.01 * torch.randn_like(value) for name, value in model.items()}
    found = as_in_the_run(change(marked), model)
    assert shared_values(found, model) == 1
    for name, value in marked.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_numbers_of_eight_bits_are_read(model):
    floats = as_in_the_run({n: v.to(torch.float8_e4m3fn) for n, v in model.items()}, model)
    steps = {name: value.abs().max() / 127 for name, value in model.items()}
    whole = {
        name: (v / steps[name]).round().to(torch.int8) if v.ndim > 1 else v
        for name, v in model.items()
    }
    for found in (floats, as_in_the_run(whole, model)):
        for name, value in model.items():
            assert torch.allclose(found[name], value, atol=0.1 * float(value.abs().max())), name


def test_what_holds_no_number_is_not_compared(model):
    meta = as_in_the_run({name: value.to("meta") for name, value in model.items()}, model)
    assert shared_values(meta, model) == 0
    for fill in (math.nan, 0.0):
        empty = {name: torch.full_like(value, fill) for name, value in model.items()}
        assert shared_values(as_in_the_run(empty, model), model) == 0


def test_a_state_dict_in_a_checkpoint_is_read(tmp_path, model):
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 3, "model": model, "optimizer": {"state": {}, "lr": 0.1}}, path)
    found = read_state(path, option="LEAKED")
    assert all(torch.equal(found[name], model[name]) for name in model)
    for odd in ({"model": model, "ema": model}, {0: torch.ones(2)}, {"a": {"b": model}}, [1]):
        torch.save(odd, path)
        with pytest.raises(FedveilError, match="no state dict, or several"):
            read_state(path, option="LEAKED")


@pytest.mark.filterwarnings("ignore")
def test_layers_that_pytorch_quantised_are_read(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    torch.save({"net": quantised.state_dict(), "epoch": 1}, tmp_path / "quantised.pt")
    found = read_state(tmp_path / "quantised.pt", option="LEAKED")
    for name, value in model.state_dict().items():
        assert torch.allclose(found[name], value, atol=0.01), name


def test_a_part_of_a_model_clears_nobody_and_is_not_w(tmp_path):
    given = {
        "dataset": "digits", "model": "tests.audit.small_models:two_layers", "clients": 4,
        "rounds": 1, "strategy": "fedavg", "fingerprint": 0.05, "workers": 1,
    }  # fmt: skip
    run = RunDirectory.create(tmp_path / "run", TrainConfig.check(given))
    run_to_completion(run)
    w = AuditedRun(run.path, 0).delivered()
    first = next(iter(w))
    for name, state, part in (("part", {first: w[first]}, True), ("w", dict(w), False)):
        torch.save(state, tmp_path / f"{name}.pt")
        told = run_trace(tmp_path / f"{name}.pt", run.path, TraceSettings(), out=None)
        assert ("who is not named is not cleared" in told) == part
        assert ("The file is w itself" in told) != part
    copy = AuditedRun(run.path, 0).archive.read(1)
    client = min(copy.assignment)
    torch.save(wrapped("module.")(copy.received(client).weights), tmp_path / "ddp.pt")
    told = run_trace(tmp_path / "ddp.pt", run.path, TraceSettings(), out=None)
    assert "1 of 4 clients named" in told


def test_folded_normalisations_hinder_no_alignment():
    """As exporters fold them: into the layer before, whose units are then put in another order."""
    torch.manual_seed(0)
    whole = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(6, 4),
    )  # fmt: skip
    base = {name: p.detach().double() for name, p in whole.named_parameters()}
    leaked = {name: v.clone() for name, v in base.items() if name.partition(".")[0] not in "14"}
    for layer, after, units in (("0", "3", 8), ("3", "7", 6)):
        order, factor = torch.randperm(units), 0.5 + torch.rand(units).double()
        for name in (f"{layer}.weight", f"{layer}.bias"):
            value = leaked[name] * factor.reshape(-1, *[1] * (leaked[name].ndim - 1))
            leaked[name] = value[order]
        leaked[f"{after}.weight"] = leaked[f"{after}.weight"][:, order]
    found = aligned(leaked, base)
    for name in leaked:
        assert torch.allclose(found[name], base[name], atol=1e-5), name
