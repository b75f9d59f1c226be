"""Fingerprints inside a federation: they leave the mean, keep the cap, and reach one client."""

import pytest
import torch

from fedveil.copies.fingerprint import Fingerprint
from fedveil.federation import Cap, SeededFedAvg
from tests.federation import apps
from tests.federation.strategies.test_strategies import KEY, delta, pair, run, trains, weights_of
from tests.federation.test_secrecy import arrays, rounds_sent, train


def marked(strategy, model, strength=0.1):
    strategy.fingerprint = Fingerprint.of(model, KEY, strength=strength)
    return strategy


def plain(model, cap, **options):
    return SeededFedAvg(**options)


def one_sided(model, cap):
    return pair(model, cap, server_clients=0)


@pytest.mark.parametrize("silent", ["[]", "[2]", "[0, 5]"])
@pytest.mark.parametrize("make", [plain, delta])
def test_an_echo_leaves_the_mean_bit_for_bit_as_it_was(model, cap, make, silent):
    strategy = marked(make(model, cap), model)
    (_, after), grid = run(strategy, model, "echo", config={"silent": silent})
    for name, before in model.state_dict().items():
        assert torch.equal(after[name], before)
    sent = [weights_of(message)["1.weight"] for message in trains(grid)]
    assert len({tuple(w.flatten().tolist()) for w in sent}) == 6


@pytest.mark.parametrize("make", [plain, delta])
def test_what_clients_add_is_added_exactly(model, cap, make):
    (_, after), _ = run(marked(make(model, cap), model), model, "add")
    counts = [apps.examples(client) for client in range(6)]
    step = sum(n * 0.01 * (client + 1) for client, n in enumerate(counts)) / sum(counts)
    for name, before in model.state_dict().items():
        assert torch.allclose(after[name], before + step, atol=2e-5)


def test_of_a_pair_the_mean_keeps_the_papers_residue_and_no_fingerprint(model, cap):
    strategy = marked(one_sided(model, cap), model)
    (_, after), _ = run(strategy, model, "echo")
    shared = strategy.sent.shared
    counts = [0, 0]
    for client, copy in shared.assignment:
        counts[copy] += client.examples
    plus, minus = shared.copies
    for name in plus:
        expected = (counts[0] * plus[name].double() + counts[1] * minus[name].double()) / sum(
            counts
        )
        assert torch.allclose(after[name].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("make", [delta, one_sided])
@pytest.mark.parametrize("strength", [0.1, 1.0, 3.0])
def test_every_clients_own_copy_is_below_the_cap_on_other_images(model, images, make, strength):
    """However strong the fingerprint is: then it is these that σ is searched for."""
    strategy = marked(make(model, Cap(0.8, images[:400])), model, strength)
    run(strategy, model, "echo", rounds=3)
    assert len(strategy.sent.copies) == 6
    other = images[400:]
    for copy in strategy.sent.copies:
        logits = torch.func.functional_call(model, dict(copy), (other.pixels,))
        # noise-pair's loop takes a copy at the cap on the calibration images, as the paper's does.
        slack = 0.06 if make is one_sided else 0.0
        assert float((logits.argmax(1) == other.labels).float().mean()) < 0.8 + slack


def test_a_copy_above_the_cap_ends_the_rounds_without_noise(model, images, monkeypatch):
    """w is a coin toss, so it may go out bare; a client's copy that is none may not."""
    torch.nn.init.zeros_(model[3].weight)
    right = {name: value.clone() for name, value in model.state_dict().items()}
    right["3.weight"] = torch.eye(2, 8)
    strategy = marked(delta(model, Cap(0.8, images)), model)
    apply, drawn = Fingerprint.apply, []

    def lucky(self, weights, *, round_number, client):
        drawn.append(client)
        if drawn.count(3) == 1 and client == 3:
            return right
        return apply(self, weights, round_number=round_number, client=client)

    monkeypatch.setattr(Fingerprint, "apply", lucky)
    run(strategy, model, "echo")
    assert drawn.count(3) > 1
    assert strategy.state.noisy
    assert strategy.sent.sigma > 0


def test_a_client_is_sent_its_own_fingerprint_anew_each_round_and_no_key(tmp_path):
    _, directory, grid, delivered = train(tmp_path / "run", rounds=3, fingerprint=0.05)
    key = directory.noise_key()
    seen = []
    for record, _, messages in rounds_sent(grid, delivered):
        assert len(record.copies) == len(messages) == 6
        for message in messages:
            weights = arrays(message)
            assert all(key.secret not in value.numpy().tobytes() for value in weights.values())
            seen.append(torch.cat([value.flatten() for value in weights.values()]))
    assert len({tuple(values[:50].tolist()) for values in seen}) == 18
