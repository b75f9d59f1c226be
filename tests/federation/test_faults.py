"""What bad answers, silence, a full disk and kill -9 do to a run: nothing is lost or averaged in.

Faults of whole deployments are in ``tests/deployment/test_faults.py``; workers that are killed in
``test_local.py``; a killed or interrupted training run in ``test_train.py``.
"""

import multiprocessing
import os
import random
import re
import resource
import signal
import time

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedveil.errors import FedveilError
from fedveil.federation import SeededFedAvg
from fedveil.federation.acceptance import (
    Acceptance,
    coordinate_median,
    refuse_large,
    trimmed_mean,
)
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.replies import Update, read_replies
from fedveil.federation.roster import Client, query_roster
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import Checkpoint, RunDirectory, StrategyState
from tests.commands import forked
from tests.federation.strategies.test_strategies import delta, run, trains, weights_of
from tests.federation.test_train import FAST, fedveil, outcomes, same_bits, start, wait_for_round

FEDAVG = pytest.param(lambda model, cap: SeededFedAvg(), id="fedavg")
DELTA = pytest.param(delta, id="noise-delta")


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        ("sends_infinity", "NaN or infinity"),
        ("sends_pickle", "cannot be read"),
        ("sends_raw_pickle", "cannot be read"),
        ("sends_bomb", "cannot be read"),
        ("sends_many", "bytes; the model has"),
        ("sends_listed", r"loss is \[1.0, 2.0\]"),
        ("sends_two_records", "one ArrayRecord"),
    ],
)
@pytest.mark.parametrize("make", [FEDAVG, DELTA])
def test_a_malicious_reply_is_refused_by_node_and_reason(
    model, cap, make, app, reason, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDVEIL_INTRUDER", str(tmp_path / "was here"))
    strategy = make(model, cap)
    (_, after), _ = run(strategy, model, app, clients=3)
    node = next(c.node for c, _ in strategy.sent.assignment if c.partition == 1)
    assert len(strategy.refused) == 1
    assert re.match(f"node {node}: .*{reason}", strategy.refused[0]), strategy.refused
    assert strategy.averaged == (0, 2)
    for name, before in model.state_dict().items():
        assert torch.equal(after[name], before)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("make", [FEDAVG, DELTA])
def test_a_hugely_scaled_update_is_refused_and_the_others_are_averaged(model, cap, make):
    strategy = make(model, cap)
    strategy.acceptance = Acceptance(norm_limit=10)
    (_, after), _ = run(strategy, model, "sends_huge", clients=4, config={"add": True})
    assert strategy.averaged == (0, 2, 3)
    assert re.search(r"norm .* times the round's median; allowed: 10 times", strategy.refused[0])
    for name, before in model.state_dict().items():
        assert float((after[name] - before).abs().max()) < 0.05


def test_without_a_limit_one_client_moves_the_model_as_far_as_it_likes(model, cap):
    strategy = delta(model, cap)
    (_, after), _ = run(strategy, model, "sends_huge", clients=4, config={"add": True})
    assert float((after["1.weight"] - model.state_dict()["1.weight"]).abs().max()) > 1e4


@pytest.mark.parametrize("average", ["median", "trimmed-mean"])
def test_a_robust_average_bounds_a_scaled_update_too(model, cap, average):
    strategy = delta(model, cap)
    strategy.acceptance = Acceptance(average=average)
    (_, after), _ = run(strategy, model, "sends_huge", clients=6, config={"add": True})
    for name, before in model.state_dict().items():
        assert float((after[name] - before).abs().max()) < 0.07


@pytest.mark.parametrize(
    "app", ["sends_nan", "sends_huge", "sends_pickle", "sends_stale", "sends_negative"]
)
def test_the_cap_holds_in_every_round_whatever_a_client_answers(
    model, cap, images, app, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDVEIL_INTRUDER", str(tmp_path / "was here"))
    strategy = delta(model, cap)
    strategy.acceptance = Acceptance(norm_limit=10)
    _, grid = run(strategy, model, app, clients=4, rounds=3, config={"add": True})
    sent = trains(grid)
    assert len(sent) == 12
    for message in sent:
        logits = torch.func.functional_call(model, weights_of(message), (images.pixels,))
        assert float((logits.argmax(1) == images.labels).float().mean()) < 0.8


def test_a_client_that_never_answers_is_named_and_the_round_goes_on(model):
    strategy = SeededFedAvg()
    history = []
    with LocalGrid("tests.federation.apps:never_answers", nodes=3, workers=3) as grid:
        strategy.start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=1,
            timeout=10,
            train_config=ConfigRecord({"add": True}),
            evaluate_fn=lambda _, arrays: history.append(arrays),
        )
    assert strategy.averaged == (0, 2)
    node = next(c.node for c, _ in strategy.sent.assignment if c.partition == 1)
    assert len(strategy.refused) == 1
    assert str(node) in strategy.refused[0]


def test_a_client_that_is_silent_altogether_is_named_too(model):
    strategy = SeededFedAvg()
    strategy.sent = strategy.distribute(1, model.state_dict(), [Client(0, 7, 5), Client(1, 8, 5)])
    with pytest.raises(FedveilError, match="node 7: no answer in time; node 8: no answer in time"):
        strategy.aggregate_train(1, [])


def test_a_node_that_cannot_take_part_is_named_at_the_start(caplog):
    with LocalGrid("tests.federation.apps:shy", nodes=3, workers=1) as grid:
        clients = query_roster(grid, ConfigRecord(), min_clients=3, timeout=60)
        missing = grid.get_node_ids()[1]
    assert [client.partition for client in clients] == [0, 2]
    # A busy machine also logs that it waits for nodes.
    (record,) = (r for r in caplog.records if "takes no part" in r.getMessage())
    assert record.getMessage().startswith(f"node {missing} takes no part: ")
    assert "'/srv/images' of this node does not exist" in record.getMessage()


def _updates(vectors):
    return [
        Update(Client(i, 100 + i, 1), {"x": torch.tensor(v)}, 1, 0.0) for i, v in enumerate(vectors)
    ]


@given(
    lengths=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=9),
    limit=st.floats(1, 100),
)
@settings(deadline=None)
def test_the_limit_is_so_many_medians(lengths, limit):
    updates = _updates([[length, 0.0] for length in lengths])
    received = {update.client: {"x": torch.zeros(2)} for update in updates}
    stay, refusals = refuse_large(updates, received, limit)
    middle = float(np.median(np.array(lengths, dtype=np.float64)))
    expected = [
        100 + i
        for i, length in enumerate(lengths)
        if len(lengths) >= 3 and middle > 0 and length > limit * middle
    ]
    assert [refusal.node for refusal in refusals] == expected
    assert len(stay) == len(updates) - len(expected)
    assert refuse_large(updates, received, None) == (updates, [])


@given(st.integers(1, 12), st.integers(0, 999))
@settings(deadline=None)
def test_robust_averages_are_numpys_and_scipys(clients, seed):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(3, 2, generator=generator) for _ in range(clients)]
    terms = [({"x": value}, float(i + 1)) for i, value in enumerate(values)]
    stacked = torch.stack(values).numpy()
    assert np.allclose(coordinate_median(terms)["x"], np.median(stacked, axis=0))
    assert np.allclose(trimmed_mean(terms)["x"], stats.trim_mean(stacked, 0.2), atol=1e-6)


def test_robust_averages_are_refused_where_the_strategy_is_defined_by_a_mean():
    with pytest.raises(FedveilError, match="noise-pair is defined by its weighted means"):
        TrainConfig.check({"strategy": "noise-pair", "average": "median"})


_EXPECTED = {"a": torch.zeros(3, 2), "b": torch.zeros((), dtype=torch.int64)}
_GOOD = ArrayRecord(_EXPECTED)


@given(
    name=st.sampled_from(["a", "b", "c", ""]),
    dtype=st.sampled_from(["float32", "int64", "object", "float16", "", "O8"]),
    shape=st.lists(st.integers(-(2**40), 2**40), max_size=3),
    stype=st.sampled_from(["numpy.ndarray", "pickle", "", "torch"]),
    data=st.one_of(
        st.binary(max_size=300),
        st.tuples(st.integers(0, 150), st.integers(0, 255), st.sampled_from(["a", "b"])).map(
            lambda change: _mutated(*change)
        ),
    ),
    metrics=st.dictionaries(
        st.sampled_from(["num-examples", "loss", "server-round", "other"]),
        st.one_of(
            st.integers(-(2**63), 2**63 - 1),
            st.floats(),
            st.lists(st.integers(0, 9), min_size=1, max_size=3),
        ),
    ),
)
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_answer_gets_past_the_checks_or_breaks_them(name, dtype, shape, stype, data, metrics):
    arrays = ArrayRecord(dict(_EXPECTED))
    arrays[name] = Array(dtype, tuple(shape), stype, data)
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
    reply = Message(content, dst_node_id=5, message_type="train")
    reply.metadata.__dict__["_src_node_id"] = 5
    updates, refusals = read_replies(
        [reply], asked={5: Client(0, 5, 9)}, expected=_EXPECTED, round_number=1
    )
    assert len(updates) + len(refusals) == 1
    for update in updates:
        assert 0 < update.examples <= 9
        for key, value in update.weights.items():
            assert value.shape == _EXPECTED[key].shape
            assert value.dtype == _EXPECTED[key].dtype
            assert bool(torch.isfinite(value).all())


def _mutated(place, byte, name):
    data = bytearray(_GOOD[name].data)
    data[place % len(data)] = byte
    return bytes(data)


def _write_for_ever(path):
    torch.set_num_threads(1)  # a forked process has none of its parent's other threads
    directory = RunDirectory(path)
    number = directory.checkpoint().round
    while True:
        number += 1
        weights = {"x": torch.full((50_000,), float(number))}
        state = StrategyState(base=weights, sigma=float(number), noisy=True)
        directory.write_checkpoint(Checkpoint(number, weights, state))


def test_a_kill_at_any_point_of_a_checkpoint_write_leaves_a_whole_checkpoint(tmp_path):
    directory, seen = RunDirectory(tmp_path), set()
    directory.write_checkpoint(Checkpoint(0, {"x": torch.zeros(50_000)}, StrategyState()))
    generator, kills = random.Random(0), 0
    while len(seen) <= 5:  # it was really killed at different points
        kills += 1
        assert kills < 1_000
        writer = multiprocessing.get_context("fork").Process(
            target=_write_for_ever, args=(tmp_path,)
        )
        writer.start()
        time.sleep(generator.uniform(0.01, 0.2))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = directory.checkpoint()
        assert torch.equal(found.weights["x"], torch.full((50_000,), float(found.round)))
        assert found.state.sigma == found.round
        seen.add(found.round)
    directory.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def _no_room():
    # Writes beyond the limit then fail as on a full disk, instead of ending the process.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_told_in_a_sentence_and_costs_nothing(tmp_path):
    options = [*FAST, "--rounds", 6, "--learning-rate", 0.1, "--no-archive"]
    killed = start("--out", tmp_path / "run", *options)
    wait_for_round(tmp_path / "run/rounds.jsonl", 2)
    killed.kill()
    before = (tmp_path / "run/checkpoint.safetensors").read_bytes()
    done = forked("train", "--resume", tmp_path / "run", before=_no_room)
    assert done.returncode == 2
    assert "checkpoint.safetensors could not be written: File too large" in done.stderr
    assert "--resume" in done.stderr
    assert (tmp_path / "run/checkpoint.safetensors").read_bytes() == before
    fedveil("--resume", tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*.part"))
    key = tmp_path / "run/noise.key"
    fedveil("--out", tmp_path / "whole", *options, "--noise-key", key)
    assert same_bits(tmp_path / "run", tmp_path / "whole")
    assert outcomes(tmp_path / "run") == outcomes(tmp_path / "whole")
