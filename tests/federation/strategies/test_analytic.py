"""``--strategy analytic`` over real worker processes: exact, private to the sum, and refused."""

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file
from sklearn.linear_model import Ridge

from fedveil.analytic import FRACTION_BITS, Statistics, load_classifier, quantised
from fedveil.audit.settings import TheftSettings
from fedveil.audit.theft import run_theft_audit
from fedveil.data import parse_partition
from fedveil.data.partition import partition
from fedveil.errors import FedveilError
from fedveil.features import features_of
from fedveil.federation import client_app
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.secagg.client import INSISTS, MASKED, WORDS
from fedveil.federation.server_app import check_sums, prepare_job, run_rounds
from fedveil.runs.archive import Archive
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from tests.federation import apps
from tests.federation.test_train import RAY, fedveil, same_bits, start

SETTINGS = {
    "dataset": "digits",
    "clients": 8,
    "strategy": "analytic",
    "filters": 10,
    "secure_aggregation": False,
}
APP = "fedveil.federation.client_app:app"
ODD = "tests.federation.strategies.odd_sums"


def trained(path, app=APP, **settings):
    """Train on real workers; return the run, its last state, and every message."""
    directory = RunDirectory.create(path, TrainConfig.check(SETTINGS | settings))
    with LocalGrid(app, nodes=8, workers=2) as inner:
        grid = apps.RecordingGrid(inner)
        job = prepare_job(directory.config)
        run_rounds(grid, job, directory, on_round=lambda _: None)
    return directory, directory.checkpoint(), grid


def pooled(directory, clients=range(8)):
    """The sums of some clients' images, made in one go, and the features they are of."""
    config = directory.config
    dataset = prepare_job(config).dataset.train
    scheme = parse_partition(config.partition)
    parts = partition(dataset.labels, clients=config.clients, scheme=scheme, seed=config.seed)
    index = torch.cat([parts[client] for client in clients])
    rows = quantised(features_of(load_classifier(directory.model()).features, dataset.raw[index]))
    return rows, dataset.labels[index]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    path = tmp_path_factory.mktemp("secure") / "run"
    return trained(path, secure_aggregation=True)


def test_w_is_the_ridge_of_all_images_in_one_place(plain):
    directory, checkpoint, _ = plain
    rows, labels = pooled(directory)
    assert torch.equal(
        checkpoint.state.memory[WORDS], Statistics.of(rows, labels, classes=10).words
    )
    summary = json.loads((directory.path / "summary.json").read_text())
    features = rows.double().numpy() * 2.0**-FRACTION_BITS
    oracle = Ridge(alpha=summary["analytic"]["penalty"]).fit(features, np.eye(10)[labels.numpy()])
    w = directory.model()
    np.testing.assert_allclose(w["weight"], oracle.coef_, rtol=1e-4, atol=1e-5)
    assert summary["accuracy"] > 0.9
    assert summary["copies_max"] < 0.2
    assert summary["analytic"]["images"] == len(labels)
    assert "own sums" in summary["analytic"]["server_sees"]


@pytest.mark.parametrize(
    "other",
    [
        {"partition": "shards:2"},
        {"partition": "dirichlet:0.1"},
        {"fraction": 0.25, "rounds": 4},
    ],
)
def test_w_is_the_same_however_images_are_shared_out(plain, tmp_path, other):
    directory, checkpoint, _ = trained(tmp_path / "run", weight_limit=0, **other)
    assert torch.equal(checkpoint.state.memory[WORDS], plain[1].state.memory[WORDS])
    assert same_bits(directory.path, plain[0].path)


def test_under_secure_aggregation_w_is_the_same_and_only_the_sum_is_seen(plain, secure):
    assert same_bits(secure[0].path, plain[0].path)
    rows, labels = pooled(secure[0], [0])
    alone = Statistics.of(rows, labels, classes=10).words
    answers = [
        record[MASKED].numpy()
        for reply in secure[2].replies
        for record in reply.content.array_records.values()
        if MASKED in record
    ]
    assert len(answers) == 8
    for words in answers:
        # Uniform words: about half of all bits are set, whereas sums are small numbers.
        assert abs(np.unpackbits(words.view(np.uint8)).mean() - 0.5) < 0.01
        assert not (words == alone.numpy()).any()
    summary = json.loads((secure[0].path / "summary.json").read_text())
    assert "own sums" not in summary["analytic"]["server_sees"]


def test_nothing_that_was_learnt_is_sent(plain):
    directory, _, grid = plain
    sent = [m for m in grid.sent if m.metadata.message_type == "train.statistics"]
    assert len(sent) == 8
    for message in sent:
        (record,) = message.content.array_records.values()
        assert set(record) == {"filters", "offset"}
    again = prepare_job(directory.config).model.features
    assert torch.equal(record.to_torch_state_dict()["filters"], again.filters)


def test_an_audit_of_theft_refuses_an_archive_that_holds_more_than_the_map(plain, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(plain[0].path, copied)
    archive = Archive.open(copied, RunDirectory.open(copied).noise_key())
    entry = archive.read(1)
    bent = {**entry.copies[0], "weight": torch.ones(2)}
    archive.write(replace(entry, copies=(bent,)))
    settings = TheftSettings(run=copied, labels=(0,), colluders=(1,))
    with pytest.raises(FedveilError, match="something else"):
        run_theft_audit(settings, out=tmp_path / "audit")


def test_w_needs_nothing_but_its_file(plain):
    directory = plain[0]
    w = load_classifier(load_file(directory.path / "model.safetensors"))
    report = prepare_job(directory.config).evaluation.report
    found = float((w(report.pixels).argmax(1) == report.labels).double().mean())
    summary = json.loads((directory.path / "summary.json").read_text())
    assert found == summary["accuracy"]
    likelihood = torch.nn.functional.cross_entropy(w(report.pixels), report.labels)
    assert float(likelihood) < 1.0  # calibrated: of plain ridge scores it is 1.7


def test_who_was_away_is_asked_next_time_and_nobody_twice(tmp_path, plain):
    directory, checkpoint, _ = trained(tmp_path / "run", app=f"{ODD}:without_two")
    assert set(checkpoint.state.memory["heard"].tolist()) == set(range(2, 8))
    rows, labels = pooled(directory, range(2, 8))
    assert torch.equal(
        checkpoint.state.memory[WORDS], Statistics.of(rows, labels, classes=10).words
    )
    fedveil("--resume", directory.path, "--rounds", 2)
    assert same_bits(directory.path, plain[0].path)
    refused = fedveil("--resume", directory.path, "--rounds", 3, check=False)
    assert refused.returncode == 2
    assert "every one of 8 clients is in the sum already" in refused.stderr


def test_a_sum_goes_on_without_clients_that_drop_out_of_it(tmp_path):
    directory, checkpoint, _ = trained(
        tmp_path / "run", app=f"{ODD}:without_two", secure_aggregation=True
    )
    rows, labels = pooled(directory, range(2, 8))
    assert torch.equal(
        checkpoint.state.memory[WORDS], Statistics.of(rows, labels, classes=10).words
    )


def test_too_few_images_left_in_a_sum_keep_it_hidden(tmp_path):
    # 1,438 images for 80 features of 17 images each: without two of eight clients they are too few.
    with pytest.raises(FedveilError, match="the sum stays hidden"):
        trained(
            tmp_path / "run",
            app=f"{ODD}:without_two",
            secure_aggregation=True,
            images_per_feature=17.0,
        )


@pytest.mark.parametrize("kind", ["too_many", "negative", "huge", "floats", "short", "twice_all"])
def test_a_liars_sums_are_left_out(tmp_path, kind):
    directory, checkpoint, _ = trained(tmp_path / "run", app=f"{ODD}:{kind}")
    refused = directory.rounds()[0].refused
    assert len(refused) == 1
    rows, labels = pooled(directory, range(1, 8))
    assert torch.equal(
        checkpoint.state.memory[WORDS], Statistics.of(rows, labels, classes=10).words
    )


def test_under_secure_aggregation_an_impossible_sum_is_refused(tmp_path):
    with pytest.raises(FedveilError, match="a client of it lied"):
        trained(tmp_path / "run", app=f"{ODD}:negative", secure_aggregation=True)


def test_a_client_with_many_more_images_sums_some_of_them(tmp_path):
    _, checkpoint, grid = trained(tmp_path / "run", partition="dirichlet:0.1", weight_limit=1.0)
    told = [
        int(record["num-examples"])
        for reply in grid.replies
        for record in reply.content.metric_records.values()
        if "server-round" in record
    ]
    assert max(told) == sorted(told)[len(told) // 2]
    assert sum(told) == int(checkpoint.state.memory[WORDS][-10:].sum())


def asked(plain, **node_config):
    """Answer the message that a client was sent, under another node config."""
    _, _, grid = plain
    message = next(m for m in grid.sent if m.metadata.message_type == "train.statistics")
    config = {"partition-id": 0, "num-partitions": 8, **node_config}
    context = Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
    return client_app.app(message, context)


def test_a_node_answers_to_its_own_map_and_with_others_only_if_it_says_so(plain):
    assert isinstance(asked(plain), Message)
    digest = json.loads((plain[0].path / "summary.json").read_text())["analytic"][
        "feature_map_sha256"
    ]
    assert isinstance(asked(plain, features=digest), Message)
    with pytest.raises(FedveilError, match="choose one that singles somebody out"):
        asked(plain, features="0" * 64)
    with pytest.raises(FedveilError, match="update of its own"):
        asked(plain, **{INSISTS: True})


def test_a_client_refuses_a_sum_that_would_show_its_images(tmp_path):
    # 1,438 images, and 760 features: a server that asks all the same.
    directory = RunDirectory.create(
        tmp_path / "run", TrainConfig.check(SETTINGS | {"secure_aggregation": True, "filters": 95})
    )
    config = directory.config
    with pytest.raises(FedveilError, match="not to show single ones: give fewer --filters"):
        prepare_job(config)
    loose = config.model_copy(update={"secure_aggregation": False})
    asking = replace(prepare_job(loose), config=config)
    with (
        LocalGrid(APP, nodes=8, workers=2) as grid,
        pytest.raises(FedveilError, match="of 760 features it takes"),
    ):
        run_rounds(grid, asking, directory, on_round=lambda _: None)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rounds": 2}, "asked once"),
        ({"defense": "dct:keep=8"}, "for clients that train"),
        ({"backbone": "efficientnet-lite0"}, "leave out either"),
        ({"backbone": "nobody:here", "filters": None}, "could not be imported"),
        ({"stages": 2}, "stages are of backbone efficientnet-lite0"),
        ({"backbone": "fresh", "filters": None}, "could not be imported"),
        ({"images_per_feature": 3.9}, "at least 4"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, settings, says):
    chosen = {key: value for key, value in (SETTINGS | settings).items() if value is not None}
    with pytest.raises(FedveilError, match=says):
        prepare_job(TrainConfig.check(chosen))


def test_each_client_is_asked_once(plain):
    strategy_config = TrainConfig.check(SETTINGS | {"fraction": 0.5, "rounds": 2})
    from fedveil.copies.noise import NoiseKey
    from fedveil.federation.server_app import build_strategy
    from fedveil.federation.strategies.fedavg import Resume

    job = prepare_job(strategy_config)
    check_sums(build_strategy(job, Resume(), NoiseKey.generate()), strategy_config, [100] * 8)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, plain):
    options = ["--dataset", "digits", "--clients", 8, "--strategy", "analytic", "--filters", 10]
    rounds = ["--fraction", 0.125, "--rounds", 8, "--weight-limit", 0]
    killed = start(*map(str, [*options, *rounds, "--out", tmp_path / "killed"]))
    noted = tmp_path / "killed" / "rounds.jsonl"
    deadline = time.monotonic() + 120
    while not noted.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    done = fedveil("--resume", tmp_path / "killed")
    assert same_bits(tmp_path / "killed", plain[0].path)
    assert "--secure-aggregation it sees the sum" in done.stderr


def test_ray_gives_the_same_bits(tmp_path):
    options = ["--dataset", "digits", "--clients", 3, "--strategy", "analytic", "--filters", 4]
    fedveil("--out", tmp_path / "local", *options)
    fedveil("--out", tmp_path / "run", *options, *RAY)
    assert same_bits(tmp_path / "run", tmp_path / "local")
