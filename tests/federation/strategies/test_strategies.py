"""The strategies against what their formulas say, over real worker processes."""

import math
import re

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.federation import (
    Cap,
    NoiseDelta,
    NoisePair,
    RaisingLoop,
    Sampling,
    SeededFedAvg,
    SigmaSearch,
)
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.replies import Update
from fedveil.federation.roster import Client, sample_clients
from fedveil.federation.strategies.fedavg import Distribution, weighted_mean
from fedveil.runs.directory import StrategyState
from tests.federation import apps

KEY = NoiseKey(bytes(range(32)))
APPS = "tests.federation.apps:"


def run(strategy, model, app, *, rounds=1, clients=6, config=None):
    """Run a strategy over real workers; return w after each round, and the grid."""
    history = []
    with LocalGrid(APPS + app, nodes=clients, workers=2) as inner:
        grid = apps.RecordingGrid(inner)
        strategy.start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=rounds,
            timeout=60,
            train_config=ConfigRecord(config or {}),
            evaluate_fn=lambda _, arrays: history.append(arrays.to_torch_state_dict()),
        )
    return history, grid


def delta(model, cap, **options):
    usual = {"noise": "all", "temperature": None, "search": SigmaSearch(start=1.0)}
    return NoiseDelta(model=model, cap=cap, key=KEY, **(usual | options))


def pair(model, cap, **options):
    schedule = RaisingLoop(start=0.5, step=0.5, limit=1e4)
    return NoisePair(model=model, cap=cap, key=KEY, schedule=schedule, noise="all", **options)


def trains(grid):
    return [message for message in grid.sent if message.metadata.message_type == "train"]


def weights_of(message):
    return next(iter(message.content.array_records.values())).to_torch_state_dict()


def test_fedavg_is_the_weighted_mean_of_what_came_back(model):
    (_, after), _ = run(SeededFedAvg(), model, "add")
    counts = [apps.examples(client) for client in range(6)]
    step = sum(n * 0.01 * (client + 1) for client, n in enumerate(counts)) / sum(counts)
    for name, before in model.state_dict().items():
        assert torch.allclose(after[name], before + step, atol=1e-6)


@pytest.mark.parametrize("silent", ["[]", "[2]", "[0, 5]"])
def test_delta_noise_leaves_the_mean_bit_for_bit_with_unequal_counts_and_missing_replies(
    model, cap, silent
):
    strategy = delta(model, cap)
    (_, after), grid = run(strategy, model, "echo", config={"silent": silent})
    assert strategy.sent.sigma > 0
    for name, before in model.state_dict().items():
        assert torch.equal(after[name], before)
    for message in trains(grid):
        assert not torch.equal(weights_of(message)["1.weight"], model.state_dict()["1.weight"])


@pytest.mark.parametrize("silent", [[], [1, 4]])
def test_delta_adds_the_weighted_mean_of_the_changes(model, cap, silent):
    (_, after), _ = run(delta(model, cap), model, "add", config={"silent": str(silent)})
    there = [client for client in range(6) if client not in silent]
    total = sum(apps.examples(client) for client in there)
    step = sum(apps.examples(client) * 0.01 * (client + 1) for client in there) / total
    for name, before in model.state_dict().items():
        assert torch.allclose(after[name], before + step, atol=2e-5)


@given(
    counts=st.lists(st.integers(1, 10_000), min_size=1, max_size=8),
    sigma=st.floats(0.01, 50),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=50, deadline=None)
def test_delta_mean_does_not_depend_on_the_noise(counts, sigma, seed):
    generator = torch.Generator().manual_seed(seed)
    base = {"1.weight": torch.randn(5, 3, generator=generator)}
    noise = torch.randn(5, 3, generator=generator)
    changes = [torch.randn(5, 3, generator=generator) for _ in counts]
    clients = [Client(i, i, n) for i, n in enumerate(counts)]
    copies = tuple({"1.weight": base["1.weight"] + s * noise} for s in (sigma, -sigma))
    sent = Distribution(copies, tuple((client, i % 2) for i, client in enumerate(clients)), sigma)
    updates = [
        Update(client, {"1.weight": copies[i % 2]["1.weight"] + changes[i]}, client.examples, 0.0)
        for i, client in enumerate(clients)
    ]
    strategy = NoiseDelta.__new__(NoiseDelta)
    strategy.state = StrategyState(base=base)
    strategy._parameters = frozenset(base)
    strategy._batch_norm = False
    strategy.temperature = None
    strategy.smoothing = 0.0
    after = strategy.combine(1, sent, updates)["1.weight"].double()
    expected = base["1.weight"].double() + sum(
        n * change.double() for n, change in zip(counts, changes, strict=True)
    ) / sum(counts)
    # A float32 copy of size σ|N| cannot hold a change more finely than its own rounding.
    assert float((after - expected).abs().max()) < 1e-6 * (10 + 5 * sigma)


@given(
    counts=st.lists(st.integers(1, 10_000), min_size=1, max_size=8),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None)
def test_weighted_mean_is_numpys_average(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(4, 2, generator=generator) for _ in counts]
    terms = [({"x": value}, n) for value, n in zip(values, counts, strict=True)]
    expected = np.average(torch.stack(values).double().numpy(), axis=0, weights=counts)
    assert np.allclose(weighted_mean(terms)["x"].numpy(), expected, atol=1e-6)


def test_the_temperature_changes_no_answer_and_fixes_the_scale_of_the_copies(model, cap, images):
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )
    net.load_state_dict(model.state_dict())
    start = (
        torch.cat([net[3].weight.detach().flatten(), net[3].bias.detach()]).square().mean().sqrt()
    )
    strategy = delta(net, cap, noise="output", temperature=10.0)
    history, _ = run(strategy, net, "add", rounds=2)
    after, base = history[2], strategy.state.base
    scale = torch.cat([base["3.weight"].flatten(), base["3.bias"]]).square().mean().sqrt()
    assert float(scale) == pytest.approx(float(start) / 10, rel=1e-5)
    assert all(torch.equal(after[name], base[name]) for name in ("1.weight", "1.bias"))
    answers = [
        torch.func.functional_call(net, dict(weights), (images.pixels,)).argmax(1)
        for weights in (after, base)
    ]
    assert torch.equal(*answers)
    ratio = after["3.weight"] / base["3.weight"]
    assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4)


def test_smoothing_averages_what_is_delivered_and_not_what_copies_start_from(model, cap):
    strategy = delta(model, cap, smoothing=0.75)
    (start, first, second), _ = run(strategy, model, "add", rounds=2)
    total = sum(apps.examples(client) for client in range(6))
    step = sum(apps.examples(client) * 0.01 * (client + 1) for client in range(6)) / total
    for name, before in start.items():
        assert torch.allclose(first[name], before + 0.25 * step, atol=2e-4)
        assert torch.allclose(
            second[name], 0.75 * first[name] + 0.25 * (before + 2 * step), atol=2e-4
        )
        assert torch.allclose(strategy.state.base[name], before + 2 * step, atol=2e-4)


def test_pair_keeps_the_papers_residue_of_the_noise_in_base(model, cap):
    """Unlike deltas, the mean of returned weights holds (n+ - n-)/n of the noise."""
    strategy = pair(model, cap, server_clients=0)
    (_, after), _ = run(strategy, model, "echo")
    plus, minus = strategy.sent.copies
    counts = [0, 0]
    for client, copy in strategy.sent.assignment:
        counts[copy] += client.examples
    for name in plus:
        expected = (counts[0] * plus[name] + counts[1] * minus[name]) / sum(counts)
        assert torch.allclose(after[name], expected, atol=1e-4 * strategy.sent.sigma)


def test_pair_removes_sigma_and_redraws_it_every_round(model, cap):
    strategy = pair(model, cap, server_clients=0)
    rounds = []
    original = strategy.distribute

    def spy(round_number, weights, clients):
        base = dict(strategy.state.base or weights)
        sent = original(round_number, weights, clients)
        rounds.append((base, sent))
        return sent

    strategy.distribute = spy
    run(strategy, model, "echo", rounds=3)
    draws = []
    for base, sent in rounds:
        plus, minus = sent.copies
        for name, value in base.items():
            # Nothing of an earlier σ or an earlier draw is left: the two copies straddle base.
            assert torch.allclose((plus[name] + minus[name]) / 2, value, atol=1e-4 * sent.sigma)
        assert (sent.sigma / 0.5) == pytest.approx(round(sent.sigma / 0.5))
        draws.append(((plus["1.weight"] - minus["1.weight"]) / (2 * sent.sigma)).flatten())
    for i in range(3):
        assert float(draws[i].std()) == pytest.approx(1, rel=0.25)
        for j in range(i):
            assert abs(float(torch.corrcoef(torch.stack([draws[i], draws[j]]))[0, 1])) < 0.5


def test_server_side_clients_hold_the_previous_w_with_a_drawn_count(model, cap):
    """w = (Σ real nₖ rₖ + Σ drawn nₛ w) / Σ all, while base has no server-side clients."""
    strategy = pair(model, cap, server_clients=3)
    (_, after), _ = run(strategy, model, "add", clients=4)
    counts = strategy._server_counts(1, [])
    assert len(counts) == 3
    assert set(counts) <= {apps.examples(client) for client in range(4)}
    real = sum(apps.examples(client) for client in range(4))
    base = strategy.state.base
    for name, before in model.state_dict().items():
        expected = (real * base[name].double() + sum(counts) * before.double()) / (
            real + sum(counts)
        )
        assert torch.allclose(after[name].double(), expected, atol=1e-4)
        assert not torch.allclose(after[name], base[name], atol=1e-4)


def test_a_new_server_side_client_is_drawn_for_every_round_and_seed(model, cap):
    strategy = pair(model, cap, server_clients=50, sampling=Sampling(seed=3))
    strategy.clients = tuple(Client(i, i, i + 1) for i in range(1000))
    assert strategy._server_counts(1, []) != strategy._server_counts(2, [])
    assert strategy._server_counts(1, []) == strategy._server_counts(1, [])


@pytest.mark.parametrize("make", [delta, pair])
def test_while_w_is_below_the_cap_the_copies_are_w_and_w_is_base(model, images, make):
    torch.nn.init.zeros_(model[3].weight)  # a coin toss: 50 % of two classes
    strategy = make(model, Cap(0.8, images))
    (_, after), grid = run(strategy, model, "add")
    assert strategy.sent.sigma == 0
    assert len(strategy.sent.copies) == 1
    for message in trains(grid):
        for name, value in weights_of(message).items():
            assert torch.equal(value, model.state_dict()[name])
    for name, value in after.items():
        assert torch.equal(value, strategy.state.base[name])


@pytest.mark.parametrize("make", [delta, pair])
def test_half_the_clients_receive_each_sign_and_nobody_anothers(model, cap, make):
    strategy = make(model, cap)
    _, grid = run(strategy, model, "spoil", clients=6)
    plus, minus = strategy.sent.copies
    assigned = {client.node: copy for client, copy in strategy.sent.assignment}
    assert sorted(assigned.values()) == [0, 0, 0, 1, 1, 1]
    for message in trains(grid):
        expected = (plus, minus)[assigned[message.metadata.dst_node_id]]
        # Although every client overwrote what it received.
        for name, value in weights_of(message).items():
            assert torch.equal(value, expected[name])


def test_an_echo_of_each_copy_comes_from_the_client_that_got_it(model, cap):
    strategy = delta(model, cap)
    _, grid = run(strategy, model, "echo")
    assigned = {client.node: copy for client, copy in strategy.sent.assignment}
    for reply in grid.replies:
        if reply.metadata.message_type == "train":
            copy = strategy.sent.copies[assigned[reply.metadata.src_node_id]]
            for name, value in weights_of(reply).items():
                assert torch.equal(value, copy[name])


@pytest.mark.parametrize("make", [delta, pair])
def test_every_copy_is_below_the_cap_on_images_it_was_not_calibrated_on(model, images, make):
    strategy = make(model, Cap(0.8, images[:400]))
    run(strategy, model, "echo", rounds=3)
    other = images[400:]
    for copy in strategy.sent.copies:
        logits = torch.func.functional_call(model, dict(copy), (other.pixels,))
        assert float((logits.argmax(1) == other.labels).float().mean()) < 0.8


def test_without_labels_the_copies_are_below_the_cap_too(model, images):
    hidden = Cap(0.8, type(images)(images.raw, torch.zeros_like(images.labels)), bound="agreement")
    strategy = delta(model, hidden)
    run(strategy, model, "echo", rounds=3)
    assert strategy.sent.sigma > 0
    for copy in strategy.sent.copies:
        logits = torch.func.functional_call(model, dict(copy), (images.pixels,))
        assert float((logits.argmax(1) == images.labels).float().mean()) < 0.8


def test_the_label_free_bound_is_refused_where_it_has_no_meaning(model, images):
    with pytest.raises(FedveilError, match="noise-pair"):
        pair(model, Cap(0.8, images, bound="agreement"))


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        ("sends_nan", "NaN"),
        ("sends_shape", r"torch.float32 \(1, 1\), not torch.float32 \(8, 16\)"),
        ("sends_dtype", "float64"),
        ("sends_name", "intruder"),
        ("sends_negative", "-5"),
        ("sends_absurd", "1000000000"),
        ("sends_stale", "for round 0, not 1"),
    ],
)
@pytest.mark.parametrize("make", [lambda model, cap: SeededFedAvg(), delta])
def test_a_bad_reply_is_left_out_by_name_and_never_averaged(model, cap, make, app, reason):
    strategy = make(model, cap)
    (_, after), _ = run(strategy, model, app, clients=3)
    assert len(strategy.refused) == 1
    assert re.search(reason, strategy.refused[0])
    assert strategy.averaged == (0, 2)
    for name, before in model.state_dict().items():
        assert torch.equal(after[name], before)


def test_a_round_without_a_usable_reply_says_why(model):
    with pytest.raises(FedveilError, match=r"round 1.*client 0 is silent"):
        run(SeededFedAvg(), model, "echo", clients=2, config={"silent": "[0, 1]"})


@given(clients=st.integers(1, 300), fraction=st.floats(0.001, 1), seed=st.integers(0, 99))
def test_sampling_takes_the_papers_number_of_distinct_clients(clients, fraction, seed):
    everyone = [Client(i, 1000 + i, 1) for i in range(clients)]
    chosen = sample_clients(everyone, fraction=fraction, seed=seed, round_number=5)
    assert len(set(chosen)) == len(chosen) == max(math.floor(fraction * clients + 1e-9), 1)
    assert chosen == sample_clients(everyone, fraction=fraction, seed=seed, round_number=5)


def test_every_client_gets_its_turn():
    everyone = [Client(i, i, 1) for i in range(20)]
    seen = {
        client.partition
        for number in range(60)
        for client in sample_clients(everyone, fraction=0.1, seed=0, round_number=number)
    }
    assert seen == set(range(20))


def test_an_ordinary_flower_app_that_answers_no_query_and_names_no_round_works(model, cap):
    for strategy in (delta(model, cap), pair(model, cap, server_clients=2), SeededFedAvg()):
        (_, after), _ = run(strategy, model, "ordinary", clients=4)
        assert strategy.averaged == (0, 1, 2, 3)
        if not isinstance(strategy, NoisePair):
            assert torch.equal(after["1.weight"], model.state_dict()["1.weight"])


def test_a_cap_that_too_few_images_could_check_is_refused_at_the_start(model, images):
    with pytest.raises(FedveilError, match=r"40 calibration images are too few.*--cap"):
        delta(model, Cap(0.6, images[:40]))
