"""``--strategy analytic --epsilon``: what leaves clients has the noise that is promised."""

import json
import math

import pytest
import torch
from flwr.app import Context, RecordDict

from fedveil.analytic import Statistics
from fedveil.analytic.privacy import GaussianRelease
from fedveil.errors import FedveilError
from fedveil.federation import client_app
from fedveil.federation.secagg.client import WORDS
from fedveil.federation.server_app import privacy_of_sums
from fedveil.runs.config import TrainConfig
from tests.federation.strategies.test_analytic import ODD, SETTINGS, pooled, trained

PRIVATE = {"epsilon": 2.0, "components": 12}


def noise_of(directory, checkpoint, clients=range(8)):
    """What the sums hold besides the clients' images, H's part, in units of φ = 1."""
    rows, labels = pooled(directory, clients)
    sums = Statistics.of(rows, labels, classes=10)
    noisy = Statistics(sums.layout, checkpoint.state.memory[WORDS])
    return noisy.moments - sums.moments, noisy.counts


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone") / "run", **PRIVATE)


def test_an_answer_seen_alone_has_all_of_the_noise(alone):
    directory, checkpoint, _ = alone
    noise, counts = noise_of(directory, checkpoint)
    each = GaussianRelease(2.0).scale(1)
    assert float(noise.std()) == pytest.approx(each * math.sqrt(8), rel=0.35)
    assert not counts.any()
    summary = json.loads((directory.path / "summary.json").read_text())
    assert summary["privacy"]["epsilon"] == pytest.approx(2.0)
    assert summary["privacy"]["adjacency"].startswith("one image of a client")
    assert set(summary["privacy"]["clients"]) == {str(client) for client in range(8)}
    assert summary["analytic"]["dimension"] == 12


@pytest.mark.parametrize(
    ("app", "clients"), [("fedveil.federation.client_app:app", 8), (f"{ODD}:without_two", 6)]
)
def test_a_sum_has_the_noise_that_half_of_its_clients_make(tmp_path, app, clients):
    directory, checkpoint, _ = trained(
        tmp_path / "run", app=app, secure_aggregation=True, epsilon=8.0, components=12
    )
    noise, _ = noise_of(directory, checkpoint, range(8 - clients, 8))
    promised = GaussianRelease(8.0).scale(1) * math.sqrt(clients / 4)
    assert float(noise.std()) == pytest.approx(promised, rel=0.35)
    summary = json.loads((directory.path / "summary.json").read_text())
    assert summary["privacy"]["noise_from"] == 0.5
    assert summary["analytic"]["noise"] == pytest.approx(promised)
    assert summary["accuracy"] > 0.5  # of 1,438 images; 10 % is chance


def test_a_whole_client_is_hidden_by_as_much_noise_as_its_images_take(tmp_path):
    directory, checkpoint, _ = trained(
        tmp_path / "run", epsilon=8.0, components=12, privacy_unit="client", weight_limit=1.0
    )
    noise, _ = noise_of(directory, checkpoint)
    each = GaussianRelease(8.0, unit="client").scale(179)
    assert float(noise.std()) == pytest.approx(each * math.sqrt(8), rel=0.35)
    summary = json.loads((directory.path / "summary.json").read_text())
    assert summary["privacy"]["adjacency"].startswith("one client's images")


def test_who_was_asked_twice_has_given_more_away():
    release = GaussianRelease(2.0)
    told = privacy_of_sums(release, [{0: 10, 1: 10}, {1: 10, 2: 10}])
    assert told["clients"]["0"] == pytest.approx(2.0)
    assert told["clients"]["1"] == told["epsilon"] == release.spent(2) > 2.5
    assert privacy_of_sums(release, [])["epsilon"] is None


def test_a_node_bounds_epsilon_itself(alone):
    message = next(m for m in alone[2].sent if m.metadata.message_type == "train.statistics")

    def asked(**config):
        node = {"partition-id": 0, "num-partitions": 8, **config}
        state = RecordDict()
        context = Context(run_id=1, node_id=2, node_config=node, state=state, run_config={})
        return client_app.app(message, context).content["arrays"][WORDS].numpy()

    one, other = (torch.from_numpy(asked(**{"most-epsilon": 2.0})) for _ in range(2))
    assert not torch.equal(one, other)  # fresh noise, whatever the seed of the run
    with pytest.raises(FedveilError, match="a lower --epsilon"):
        asked(**{"most-epsilon": 1.0})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"strategy": "fedavg", "filters": None},
            "of strategies analytic and protected",
        ),
        ({"privacy_unit": "client", "weight_limit": 0}, "weight-limit above 0"),
        ({"components": 0}, "components"),
    ],
)
def test_settings_that_promise_nothing_are_refused(change, says):
    with pytest.raises(FedveilError, match=says):
        TrainConfig.check(SETTINGS | PRIVATE | change)
