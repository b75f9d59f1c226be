"""A flwr FedAvg is one: each of its arguments does what Flower's does, or is refused in words."""

import inspect
import logging

import odd_app
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg

from fedveil.errors import FedveilError
from fedveil.federation import (
    EnsembleDistillation,
    NoiseDelta,
    NoisePair,
    Sampling,
    SeededFedAvg,
)
from fedveil.federation.acceptance import Acceptance
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.secagg.server import SecureAggregation
from fedveil.federation.strategies.flower_arguments import FedAvgArguments
from tests.federation import apps

NAMES = {
    "weighted_by_key": "share",
    "arrayrecord_key": "weights",
    "configrecord_key": "settings",
}


def run(strategy, model, app="odd_app:app", nodes=4):
    with LocalGrid(app, nodes=nodes, workers=1) as inner:
        grid = apps.RecordingGrid(inner)
        arrays = ArrayRecord(model.state_dict())
        return strategy.start(grid, arrays, num_rounds=1, timeout=60), grid


def strategies(model, cap):
    pixels = cap.shown.pixels
    return {
        "fedavg": SeededFedAvg,
        "noise-delta": lambda **more: NoiseDelta(model=model, cap=cap, **more),
        "noise-pair": lambda **more: NoisePair(model=model, cap=cap, **more),
        "protected": lambda **more: EnsembleDistillation(model=model, unlabelled=pixels, **more),
    }


KINDS = ("fedavg", "noise-delta", "noise-pair", "protected")


def test_every_argument_of_flowers_fedavg_is_known():
    theirs = set(inspect.signature(FedAvg.__init__).parameters) - {"self"}
    assert theirs == set(FedAvgArguments.__annotations__)


def test_the_same_arguments_give_what_flowers_own_strategy_gives(model):
    theirs, _ = run(FedAvg(fraction_evaluate=0.0, min_train_nodes=4, **NAMES), model)
    # Weights differ by up to 2.5 times, so the bound of three medians changes nothing.
    ours, _ = run(SeededFedAvg(min_train_nodes=4, **NAMES), model)
    told = ours.train_metrics_clientapp[1]
    assert told.keys() == theirs.train_metrics_clientapp[1].keys()
    for name, value in theirs.train_metrics_clientapp[1].items():
        assert told[name] == pytest.approx(value)
    expected = theirs.arrays.to_torch_state_dict()
    for name, value in ours.arrays.to_torch_state_dict().items():
        assert torch.allclose(value, expected[name].to(value.dtype), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_strategy_takes_them_and_no_client_evaluates(model, cap, kind, caplog):
    caplog.set_level(logging.INFO)
    asked = {"fraction_evaluate": 0.5, "min_evaluate_nodes": 2, "fraction_train": 0.5}
    strategy = strategies(model, cap)[kind](**asked, **NAMES, min_available_nodes=4)
    result, grid = run(strategy, model)
    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds.count("train.answers" if kind == "protected" else "train") == 2
    assert not any(kind.startswith("evaluate") for kind in kinds)
    said = [r for r in caplog.records if "clients evaluate nothing" in r.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert {"train_loss", "by class", "images"} == set(result.train_metrics_clientapp[1])


def test_the_apps_own_aggregation_sees_what_flowers_would(model):
    def aggregate(contents, key):
        assert key == "share"
        clients = [content["notes"]["client"] for content in contents]
        return MetricRecord({"clients": sorted(clients)})

    strategy = SeededFedAvg(train_metrics_aggr_fn=aggregate, min_available_nodes=4, **NAMES)
    result, _ = run(strategy, model)
    assert result.train_metrics_clientapp[1]["clients"] == [0, 1, 2, 3]


def test_a_train_function_of_the_apps_own(model):
    class Twice(SeededFedAvg):
        def configure_train(self, *arguments):
            for message in super().configure_train(*arguments):
                message.metadata.message_type = "train.twice"
                yield message

    result, _ = run(Twice(min_train_nodes=4, **NAMES), model)
    weights = [odd_app.weight(client) for client in range(4)]
    step = sum(0.02 * (n + 1) * w for n, w in enumerate(weights)) / sum(weights)
    for name, value in result.arrays.to_torch_state_dict().items():
        assert torch.allclose(value, model.state_dict()[name] + step, atol=1e-6)


def test_one_share_cannot_become_the_mean(model):
    strategy = SeededFedAvg(min_train_nodes=4, **NAMES)
    strategy.acceptance = Acceptance(weight_limit=1.0)
    run(strategy, model)
    assert len(strategy.bounded) == 2  # of 0.5, 0.75, 1.0 and 1.25 the lower median is 0.75
    assert "counted as 0.75" in strategy.bounded[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"fraction_train": 0.0}, "train nobody"),
        ({"fraction_train": 2}, "at most 1"),
        ({"fraction_train": True}, "fraction_train"),
        ({"min_train_nodes": 0}, "min_train_nodes"),
        ({"min_available_nodes": 1.5}, "min_available_nodes"),
        ({"weighted_by_key": ""}, "weighted_by_key"),
        ({"arrayrecord_key": "config"}, "must differ"),
        ({"configrecord_key": "unlabelled"}, "must differ"),
        ({"train_metrics_aggr_fn": "mean"}, "no function"),
        ({"fraction_evaluate": "all"}, "fraction_evaluate"),
        ({"fraction_train": 0.5, "sampling": Sampling()}, "give either"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(model, cap, kind, wrong, reason):
    with pytest.raises(FedveilError, match=reason):
        strategies(model, cap)[kind](**wrong)


def test_an_argument_that_is_nobodys_is_refused(model, cap):
    with pytest.raises(TypeError, match="fraction_fit"):
        SeededFedAvg(fraction_fit=0.5)


def test_more_clients_a_round_than_take_part(model):
    strategy = SeededFedAvg(min_train_nodes=5, **NAMES)
    assert strategy.sampling.min_clients == 5
    strategy.sampling = Sampling(min_train=5, min_clients=4)
    with pytest.raises(FedveilError, match="min_train_nodes=5"):
        run(strategy, model)


def test_secure_aggregation_keeps_its_own_names(model):
    strategy = SeededFedAvg(arrayrecord_key="weights")
    strategy.secure = SecureAggregation()
    with pytest.raises(FedveilError, match="leave weighted_by_key, arrayrecord_key"):
        run(strategy, model)
