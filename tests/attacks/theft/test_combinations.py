"""Averaging and collusion against what the noise's algebra says."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.attacks.theft import AverageRounds, Collude, Last
from fedveil.attacks.theft.observation import distinct, mean_of
from fedveil.copies.noise import NoiseKey, add_noise, noise_target
from tests.attacks.theft.conftest import Small

ALL = noise_target(Small(0), (1, 8, 8), "all")


def noise(weights, number):
    return ALL.draw(weights, NoiseKey(bytes(32)), run="t", round_number=number, group="g")


@settings(deadline=None, max_examples=40)
@given(sigma=st.floats(0, 1e3), number=st.integers(1, 1000))
def test_both_signs_of_a_pair_give_the_base(sigma, number):
    base = Small(number).state_dict()
    drawn = noise(base, number)
    plus, minus = (add_noise(base, drawn, sign * sigma) for sign in (1, -1))
    mean = mean_of([plus, minus])
    for name, value in base.items():
        # What adding and taking away in float32 rounds off, and nothing else.
        rounding = 2**-23 * (value.abs() + sigma * drawn[name].abs())
        assert ((mean[name] - value).abs() <= rounding).all()


def test_colluders_find_the_round_in_which_they_hold_both_signs(observe, trained):
    first, second = noise(trained, 1), noise(trained, 2)
    other = {name: value + 1 for name, value in trained.items()}
    seen = observe(
        (1, 0, add_noise(trained, first, 5.0)),
        (1, 1, add_noise(trained, first, -5.0)),
        (1, 2, add_noise(trained, first, -5.0)),
        (2, 0, add_noise(other, second, 5.0)),
    )
    found = Collude()(seen).start
    for name, value in trained.items():
        assert torch.allclose(found[name], value, atol=1e-5)


def test_unequal_numbers_of_the_signs_still_cancel(observe, trained):
    """Three copies of one sign, two of the other, each with a small noise of its own."""
    drawn = noise(trained, 1)
    copies = [
        add_noise(add_noise(trained, drawn, 5.0 * sign), noise(trained, 10 + client), 0.1)
        for client, sign in enumerate((1, 1, -1, 1, -1))
    ]
    found = Collude()(observe(*[(1, client, copy) for client, copy in enumerate(copies)])).start

    def error(state):
        return sum(float((state[n] - v).square().sum()) for n, v in trained.items())

    assert error(found) < 0.01 * error(add_noise(trained, noise(trained, 9), 1.0))
    assert error(mean_of(copies)) > 100 * error(found)


def test_equal_signs_are_counted_once(trained):
    drawn = noise(trained, 1)
    plus, minus = (add_noise(trained, drawn, sign) for sign in (1.0, -1.0))
    assert len(distinct([plus, dict(plus), minus, plus])) == 2


def test_averaging_keeps_to_one_client_and_lowers_independent_noise(observe, trained):
    rounds = [(r, 0, add_noise(trained, noise(trained, r), 1.0)) for r in range(1, 9)]
    stranger = (5, 1, {name: value + 100 for name, value in trained.items()})
    seen = observe(*rounds[:5], stranger, *rounds[5:])
    weights = AverageRounds()(seen).start

    # A mean of the client's own last copies and of nothing else, as many as the holdout liked.
    own = [weights for _, _, weights in rounds]
    means = [mean_of(own[-count:]) for count in (2, 4, 8)]
    assert any(all(torch.equal(mean[n], weights[n]) for n in trained) for mean in means)

    def error(state):
        return sum(float((state[n] - v).square().sum()) for n, v in trained.items())

    assert error(weights) < 0.6 * error(own[-1])


def test_nothing_to_combine(observe, trained):
    one = observe((1, 0, trained), (2, 0, trained))
    assert Last().applies(one)
    assert not AverageRounds().applies(one)  # the same copy twice
    assert not Collude().applies(one)
    assert not Last().applies(observe())


def test_counters_and_missing_tensors():
    copies = [
        {"a": torch.ones(2) * i, "n": torch.tensor(i), f"b{i}": torch.ones(1)} for i in (1, 3)
    ]
    mean = mean_of(copies)
    assert set(mean) == {"a", "n"}
    assert mean["a"].tolist() == [2, 2]
    assert int(mean["n"]) == 3
