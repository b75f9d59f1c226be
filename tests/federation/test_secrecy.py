"""What leaves the server: every message of a real run is read."""

import logging

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.common.serde import message_to_proto

from fedveil.copies.noise import NoiseKey
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.server_app import prepare_job, run_rounds
from fedveil.federation.strategies.fedavg import SeededFedAvg, clone
from fedveil.federation.task import ClientTask
from fedveil.models import batch_statistics_names
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from tests.federation.apps import RecordingGrid

TOLD = {
    "dataset",
    "partition",
    "model",
    "epochs",
    "batch-size",
    "batch-statistics",
    "learning-rate",
    "momentum",
    "clip",
    "decay",
    "augment",
    "repeat",
    "defense",
    "seed",
    "server-round",
}


def train(path, **settings):
    config = TrainConfig.check(
        {
            "dataset": "digits",
            "clients": 6,
            "fraction": 1.0,
            "rounds": 6,
            "epochs": 2,
            "learning_rate": 0.1,
            "clip": 5.0,
            "strategy": "noise-delta",
            "sigma_limit": 1e6,
        }
        | settings
    )
    directory = RunDirectory.create(
        path, config, noise_key=NoiseKey(b"this key is never sent any place")
    )
    job = prepare_job(config)
    delivered = []
    with LocalGrid("fedveil.federation.client_app:app", nodes=6, workers=2) as inner:
        grid = RecordingGrid(inner)

        def keep(record):
            delivered.append((record, directory.checkpoint().weights, len(grid.sent)))

        run_rounds(grid, job, directory, on_round=keep)
    return job, directory, grid, delivered


def rounds_sent(grid, delivered):
    """Yield (record, w before the round, the round's messages to clients)."""
    for i, (record, _, end) in enumerate(delivered):
        begin = delivered[i - 1][2] if i else 0
        before = delivered[i - 1][1] if i else None
        messages = [m for m in grid.sent[begin:end] if "arrays" in m.content.array_records]
        yield record, before, messages


def arrays(message):
    return message.content.array_records["arrays"].to_torch_state_dict()


@pytest.mark.parametrize("strategy", ["noise-delta", "noise-pair"])
@pytest.mark.parametrize("noise", ["all", "output.*"])
def test_no_message_carries_the_key_or_a_clean_model(tmp_path, strategy, noise, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    _, directory, grid, delivered = train(
        tmp_path / "run", strategy=strategy, noise=noise, sigma_step=1.0, fingerprint=0
    )
    key = directory.noise_key().secret
    noisy = [item for item in rounds_sent(grid, delivered) if item[0].sigma > 0]
    assert noisy, "the run never passed the cap, so it proves nothing"
    for record, before, messages in noisy:
        assert len(messages) == 6
        for message in messages:
            changed = [
                n for n, value in arrays(message).items() if not torch.equal(value, before[n])
            ]
            named = [n for n in before if noise == "all" or n.startswith("output")]
            if strategy == "noise-delta":  # whose copies are made from w itself
                assert sorted(changed) == sorted(named)
            for name in named:
                gap = (arrays(message)[name] - before[name]).double().norm()
                assert gap > 0.05 * before[name].double().norm(), (record.round, name)
    printed = capfd.readouterr()
    seen = "\n".join([caplog.text, printed.out, printed.err])
    for message in grid.sent:
        wire = message_to_proto(message).SerializeToString()
        assert key not in wire
        assert key.hex().encode() not in wire
        assert set(message.content.config_records["config"]) <= TOLD
        for array in next(iter(message.content.array_records.values()), {}).values():
            assert key not in array.data
    assert key.hex() not in seen
    assert repr(key) not in seen


def test_only_the_run_directory_is_written(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(tmp_path / "run", rounds=2)
    assert not list((tmp_path / "elsewhere").iterdir())
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "run").iterdir()}
    assert {modes[n] for n in ("noise.key", "checkpoint.safetensors", "model.safetensors")} == {
        0o600
    }


def test_batch_statistics_are_the_copys_own(tmp_path):
    """Neither w's running statistics nor any client's are in what the next round sends."""
    job, _, grid, delivered = train(
        tmp_path / "run",
        model="tests.audit.small_models:batch_norms",
        noise="all",
        rounds=2,
        cap=0.3,
        fingerprint=0,  # which is added to parameters, after the statistics were measured
    )
    noisy = [item for item in rounds_sent(grid, delivered) if item[0].sigma > 0]
    assert noisy
    pixels = job.evaluation.calibration.pixels[:500]
    for _, before, messages in noisy:
        for message in messages:
            sent = arrays(message)
            for name in sent:
                if name.endswith("running_mean"):
                    assert not torch.allclose(sent[name], before[name], rtol=1e-3)
            # They are those of the copy's own weights on the server's images.
            first = job.model.normalise(pixels)
            output = torch.conv2d(first, sent["stem.weight"], padding=1)
            measured = output.mean(dim=(0, 2, 3))
            assert torch.allclose(sent["stem_norm.running_mean"], measured, rtol=1e-3, atol=1e-4)


def test_w_of_a_batch_norm_model_works_with_the_statistics_it_is_delivered_with(tmp_path):
    _, _, _, delivered = train(
        tmp_path / "run",
        model="tests.audit.small_models:batch_norms",
        rounds=3,
        learning_rate=0.2,
    )
    assert delivered[-1][0].accuracy > 0.6
    assert max(max(record.copies) for record, _, _ in delivered) < 0.6


@pytest.mark.parametrize("strategy", ["fedavg", "noise-delta"])
def test_no_client_sends_back_what_its_batches_were(tmp_path, strategy):
    """The server measures w's statistics itself, so those that it sent come back."""
    job, _, grid, _ = train(
        tmp_path / "run",
        model="tests.audit.small_models:batch_norms",
        strategy=strategy,
        rounds=1,
    )
    names = batch_statistics_names(job.model)
    assert "stem_norm.running_mean" in names
    trained = [one for one in grid.replies if "arrays" in one.content.array_records]
    received = {
        one.metadata.dst_node_id: arrays(one)
        for one in grid.sent
        if "arrays" in one.content.array_records
    }
    assert trained
    for reply in trained:
        own, sent = arrays(reply), received[reply.metadata.src_node_id]
        assert all(torch.equal(own[name], sent[name]) for name in names)
        assert not torch.equal(own["stem.weight"], sent["stem.weight"])


def test_a_strategy_that_measures_no_statistics_is_sent_the_clients(tmp_path):
    model = "tests.audit.small_models:batch_norms"
    given = {"dataset": "digits", "model": model, "clients": 3, "strategy": "fedavg"}
    job = prepare_job(TrainConfig.check(given))
    names = batch_statistics_names(job.model)
    task, before = ClientTask.of(job.config, job.dataset), clone(job.model.state_dict())
    for measured in (None, lambda weights: weights):
        with LocalGrid("fedveil.federation.client_app:app", nodes=3, workers=1) as grid:
            strategy = SeededFedAvg(sampling=job.sampling, statistics=measured)
            result = strategy.start(grid, ArrayRecord(before), 1, train_config=task.to_record())
        mean = result.arrays.to_torch_state_dict()
        moved = [
            not torch.equal(mean[name], before[name])
            for name in names
            if before[name].is_floating_point()
        ]
        assert all(moved) if measured is None else not any(moved)
