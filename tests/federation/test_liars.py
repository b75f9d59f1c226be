"""Clients that lie in their first answer, about their images, or about what was measured."""

import json
import math
import re

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import nn

from fedveil.errors import FedveilError
from fedveil.federation import Sampling, SeededFedAvg
from fedveil.federation.acceptance import Acceptance, weight_bound
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.roster import Client, query_roster
from fedveil.runs.directory import RoundRecord, RunDirectory


@pytest.fixture(scope="module")
def grid():
    with LocalGrid("tests.federation.apps:liar", nodes=4, workers=2) as grid:
        yield grid


def _round(grid, model, lie, **acceptance):
    strategy, history = SeededFedAvg(sampling=Sampling(min_clients=4)), []
    strategy.acceptance = Acceptance(**acceptance)
    strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=1,
        timeout=60,
        train_config=ConfigRecord({"lie": lie}),
        evaluate_fn=lambda _, arrays: history.append(arrays.to_torch_state_dict()),
    )
    return strategy, history[-1]


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ("nan", "partition-id is nan"),
        ("list", "partition-id is \\[1\\]"),
        ("negative", "partition-id is -7"),
        ("large", "partition-id is 1152921504606846976"),
        ("no images", "num-examples is 0"),
        ("less than none", "num-examples is -3"),
        ("half", "num-examples is 1.5"),
        ("empty", "partition-id is None"),
        ("missing", "0 records of metrics"),
    ],
)
def test_a_false_first_answer_costs_that_node_its_place_and_nobody_else(grid, caplog, lie, told):
    clients = query_roster(grid, ConfigRecord({"lie": lie}), min_clients=4, timeout=60)
    assert [client.partition for client in clients] == [0, 2, 3]
    node = grid.get_node_ids()[1]
    assert re.search(f"node {node} takes no part: .*{told}", caplog.text)


def test_of_two_that_claim_one_partition_neither_takes_part(grid, caplog):
    clients = query_roster(grid, ConfigRecord({"lie": "another's"}), min_clients=4, timeout=60)
    assert [client.partition for client in clients] == [2, 3]
    for node in grid.get_node_ids()[:2]:
        assert f"node {node} takes no part: 2 nodes claim partition 0" in caplog.text


def test_where_nobody_answers_well_the_run_ends_with_each_reason():
    with (
        LocalGrid("tests.federation.apps:liar", nodes=2, workers=1) as grid,
        pytest.raises(FedveilError, match="2 nodes claim partition 0"),
    ):
        query_roster(grid, ConfigRecord({"lie": "another's"}), min_clients=2, timeout=60)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))


def _step(before, after):
    return float((after["1.weight"] - before.state_dict()["1.weight"]).mean())


def test_who_claims_a_million_million_images_counts_for_three_medians(grid, small, caplog):
    strategy, after = _round(grid, small, "many", weight_limit=3.0)
    counts = [10, 3 * 12, 12, 13]  # the lower median of 10, 10^12, 12 and 13 is 12
    expected = sum(n * 0.01 * (k + 1) for k, n in enumerate(counts)) / sum(counts)
    assert _step(small, after) == pytest.approx(expected, rel=1e-4)
    (claim,) = strategy.bounded
    assert (
        f"node {grid.get_node_ids()[1]}: says it has 1000000000000 images, counted as 36" in claim
    )
    assert claim in caplog.text


def test_without_a_limit_its_word_is_the_mean(grid, small):
    _, after = _round(grid, small, "many", weight_limit=None)
    assert _step(small, after) == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize(
    ("claims", "bound"), [([5], 15), ([5, 10**12], 15), ([1, 1, 9], 3), ([None, None], None)]
)
def test_the_bound_is_of_the_lower_median(claims, bound):
    clients = [Client(i, 100 + i, count) for i, count in enumerate(claims)]
    assert weight_bound(clients, 3.0) == bound
    assert weight_bound(clients, None) is None


def test_a_negative_variance_is_refused_and_counters_stay_the_servers(grid, small):
    strategy, after = _round(grid, small, "variance")
    assert "2.running_var is a variance and holds -1" in strategy.refused[0]
    assert strategy.averaged == (0, 2, 3)
    assert int(after["2.num_batches_tracked"]) == 0  # the app adds to it


@pytest.mark.parametrize("loss", ["nan", "inf", "1e308"])
def test_a_loss_that_is_none_is_refused(grid, small, loss):
    strategy, _ = _round(grid, small, f"loss {loss}")
    assert strategy.averaged == (0, 2, 3)
    assert "its loss is" in strategy.refused[0]
    assert strategy.loss == pytest.approx(0.5)


def test_no_number_that_json_lacks_is_ever_written(tmp_path):
    record = RoundRecord(1, 0.5, (0.5,), 0.0, 0, 0, 0.0, 1.0, None, (0,))
    directory = RunDirectory(tmp_path)
    directory.write_rounds([record])
    assert json.loads((tmp_path / "rounds.jsonl").read_text())["loss"] is None
    assert directory.rounds() == [record]
    with pytest.raises(ValueError, match="JSON"):
        directory.write_summary({"accuracy": math.nan})
