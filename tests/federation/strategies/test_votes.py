"""``--strategy protected --epsilon``: clients vote, with the noise that is promised."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedveil.errors import FedveilError
from fedveil.federation import EnsembleDistillation
from fedveil.federation.secagg.client import WORDS
from fedveil.federation.server_app import prepare_job, privacy_of_sums
from fedveil.federation.votes import VoteRelease, shares, vote_fault
from fedveil.runs.config import TrainConfig
from fedveil.secure_random import SecureGenerator
from tests.federation.strategies.test_ensemble_distillation import PROTECTED, ask, linear
from tests.federation.test_secrecy import rounds_sent, train

PRIVATE = PROTECTED | {"epsilon": 8.0, "privacy_unit": "client", "rounds": 1, "epochs": 1}
PRIVATE |= {"distillation_steps": 5}
QUESTIONS = 179


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "run"
    return train(path, **PRIVATE, secure_aggregation=False)


def summary_of(directory):
    return json.loads((directory.path / "summary.json").read_text())


def spread(directory):
    """Standard deviation of what is in the sum of six clients' votes."""
    return float((directory.checkpoint().state.memory[WORDS].double() / 2**24).std())


@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_no_two_clients_differ_by_more_than_the_noise_is_for(questions, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randint(classes, (2, questions), generator=generator)
    apart = (F.one_hot(one, classes) - F.one_hot(other, classes)).double().norm()
    worst = (F.one_hot(one, classes) - F.one_hot((one + 1) % classes, classes)).double().norm()
    release = VoteRelease(2.0)
    assert float(apart) <= release.scale(questions) / release.multiplier + 1e-9
    assert float(worst) == pytest.approx(release.scale(questions) / release.multiplier)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("releases", [1, 3])
def test_epsilon_is_what_another_accountant_finds(epsilon, releases):
    from dp_accounting import dp_event
    from dp_accounting.pld import pld_privacy_accountant

    release = VoteRelease(epsilon, 1e-5)
    accountant = pld_privacy_accountant.PLDAccountant()
    accountant.compose(dp_event.GaussianDpEvent(release.multiplier), releases)
    assert accountant.get_epsilon(1e-5) == pytest.approx(release.spent(releases), rel=2e-3)


def test_a_vote_is_exact_but_for_its_noise():
    release = VoteRelease(2.0)
    votes = torch.arange(2_000) % 10
    words = release.noised(votes, 10, SecureGenerator(), 20).double() / 2**24
    left = words - F.one_hot(votes, 10)
    assert float(left.std()) == pytest.approx(release.scale(2_000) / math.sqrt(10), rel=0.03)
    assert abs(float(left.mean())) < 5 * float(left.std()) / math.sqrt(left.numel())
    with pytest.raises(FedveilError, match="more than 64-bit words hold"):
        VoteRelease(1e-9, 1e-9).noised(votes, 10, SecureGenerator(), 20)


@given(st.integers(2, 6), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_shares_are_the_nearest_probabilities(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randn(3, classes, generator=generator, dtype=torch.float64) * 7
    found = shares(counts, 5)
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))
    others = torch.rand(200, 1, classes, generator=generator, dtype=torch.float64)
    others /= others.sum(2, keepdim=True)
    told = counts / 5
    # Nearest of a convex set: no other point lies beyond the plane through it.
    assert float(((told - found) * (others - found)).sum(2).max()) <= 1e-9


def test_votes_that_are_right_teach_and_others_are_refused():
    counts = F.one_hot(torch.arange(3), 3).double() * 10
    assert torch.equal(shares(counts, 10), torch.eye(3, dtype=torch.float64))
    words = (counts * 2**24).long()
    assert vote_fault(words, clients=10, noise=0.0) is None
    assert "none of 9 votes" in str(vote_fault(words, clients=9, noise=0.0))


def test_a_vote_seen_alone_has_all_of_the_noise(alone):
    _, directory, grid, delivered = alone
    promised = VoteRelease(8.0).scale(QUESTIONS)
    assert spread(directory) == pytest.approx(promised * math.sqrt(6), rel=0.1)
    summary = summary_of(directory)
    assert summary["answers"]["noise"] == pytest.approx(promised * math.sqrt(6))
    assert summary["privacy"]["epsilon"] == pytest.approx(8.0)
    assert summary["privacy"]["adjacency"].startswith("one client's images replaced by any others")
    for reply in grid.replies:
        for record in reply.content.metric_records.values():
            assert set(record) <= {"partition-id", "num-examples", "server-round"}
    message = next(rounds_sent(grid, delivered))[2][0]
    one, other = (ask(message, set(message.content)).content["answers"][WORDS] for _ in range(2))
    assert one.data != other.data  # fresh noise, whatever the seed of the run
    with pytest.raises(FedveilError, match="a lower --epsilon"):
        ask(message, set(message.content), **{"most-epsilon": 4.0})


def test_a_sum_has_the_noise_that_half_of_its_clients_make(tmp_path):
    _, directory, _, _ = train(tmp_path / "run", **PRIVATE)
    promised = VoteRelease(8.0).scale(QUESTIONS) * math.sqrt(2)
    assert spread(directory) == pytest.approx(promised, rel=0.1)
    summary = summary_of(directory)
    assert (summary["privacy"]["noise_from"], summary["privacy"]["unit"]) == (0.5, "client")
    assert summary["answers"]["server_sees"] == "sums of a round's clients"


def test_nobody_votes_twice_and_who_does_has_given_more_away(tmp_path):
    _, directory, _, _ = train(tmp_path / "run", **PRIVATE | {"rounds": 2, "fraction": 0.5})
    asked = [client for record in directory.rounds() for client in record.clients]
    assert sorted(asked) == list(range(6))
    assert summary_of(directory)["privacy"]["epsilon"] == pytest.approx(8.0)
    with pytest.raises(FedveilError, match="asked once"):
        prepare_job(TrainConfig.check(PRIVATE | {"clients": 6, "fraction": 1.0, "rounds": 2}))
    twice = privacy_of_sums(VoteRelease(8.0), [{0: 10, 1: 10}, {1: 10}])
    assert twice["clients"]["1"] == twice["epsilon"] == VoteRelease(8.0).spent(2) > 10


def test_enough_clients_vote_a_good_w():
    """Four hundred clients who are right two times in three, at epsilon 2."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (60,), generator=generator)
    release, total = VoteRelease(2.0), torch.zeros(60, 3, dtype=torch.int64)
    for _ in range(400):
        wrong = torch.rand(60, generator=generator) > 2 / 3
        votes = torch.where(wrong, torch.randint(0, 3, (60,), generator=generator), truth)
        total += release.noised(votes, 3, SecureGenerator(), 400)
    assert float((shares(total.double() / 2**24, 400).argmax(1) == truth).double().mean()) > 0.95


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"privacy_unit": "image"}, "give privacy-unit client"),
        ({"shared_rounds": 1}, "shared-rounds 1 sends models back"),
        ({"defense": "dp-sgd:noise=1"}, "has an epsilon of its own"),
        ({"answer_temperature": 2.0}, "clients vote"),
        ({"strategy": "fedavg"}, "of strategies analytic and protected"),
    ],
)
def test_settings_that_promise_nothing_are_refused(change, says):
    with pytest.raises(FedveilError, match=says):
        TrainConfig.check(PRIVATE | change)


def test_defaults_ask_every_client_once():
    config = TrainConfig.check({"strategy": "protected", "epsilon": 4.0, "clients": 60})
    assert (config.rounds, config.fraction, config.privacy_unit) == (1, 1.0, "client")
    assert (config.secure_aggregation, config.key_shares) == (True, 15)
    plain = TrainConfig.check({"strategy": "protected"})
    assert (plain.secure_aggregation, plain.key_shares, plain.rounds) == (True, None, 20)
    few = TrainConfig.check({"strategy": "protected", "clients": 2})
    assert not few.secure_aggregation


def test_models_that_votes_do_not_hide_are_not_shared():
    images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(FedveilError, match="shared_rounds send models"):
        EnsembleDistillation(
            model=linear(torch.zeros(3, 16)),
            unlabelled=images,
            release=VoteRelease(2.0),
            shared_rounds=1,
        )
