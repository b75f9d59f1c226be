"""Fingerprints against the normal distribution and against themselves on other machines."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from fedveil.copies.fingerprint import Fingerprint
from fedveil.copies.noise import NoiseKey

KEY = NoiseKey(b"thirty-two bytes of a secret key")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 200)
    )


def test_the_values_are_standard_normal_and_unrelated_between_clients_rounds_and_keys():
    mark = Fingerprint.of(network(), KEY, strength=0.1)
    other = Fingerprint.of(network(), NoiseKey(b"another secret key of 32 bytes.."), strength=0.1)
    first = mark.pattern(20_000, round_number=1, client=1)
    assert stats.kstest(first.numpy(), "norm").pvalue > 1e-3
    patterns = [
        first,
        mark.pattern(20_000, round_number=1, client=2),
        mark.pattern(20_000, round_number=2, client=1),
        mark.pattern(20_000, round_number=1, client=11),
        mark.pattern(20_000, round_number=11, client=1),
        other.pattern(20_000, round_number=1, client=1),
    ]
    between = np.corrcoef(torch.stack(patterns).numpy())[np.triu_indices(6, 1)]
    assert np.abs(between).max() < 4 / np.sqrt(20_000)


def test_every_parameter_is_marked_in_units_of_its_layer_and_nothing_else_is():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    marked = Fingerprint.of(net, KEY, strength=0.05).apply(before, round_number=3, client=7)
    parameters = {name for name, _ in net.named_parameters()}
    for name, value in before.items():
        assert torch.equal(value, net.state_dict()[name])
        if name not in parameters:
            assert marked[name] is value
    for layer in ("0", "1", "4"):
        both = [f"{layer}.weight", f"{layer}.bias"]
        size = torch.cat([before[name].flatten() for name in both]).double().square().mean().sqrt()
        for name in both:
            change = (marked[name] - before[name]).double() / size
            # χ²: the standard deviation of n values lies within these bounds but once in 10⁵.
            low, high = stats.chi2.ppf((5e-6, 1 - 5e-6), change.numel())
            assert low < float((change / 0.05).square().sum()) < high


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_copies_do_not_depend_on_the_number_of_threads(threads):
    weights = {f"layer.{i}": torch.randn(300_000, generator=torch.Generator().manual_seed(i))
               for i in range(2)}  # fmt: skip
    mark = Fingerprint(KEY, 0.05, (("layer.0", "layer.1"),))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        copy = mark.apply(weights, round_number=1, client=1)
    finally:
        torch.set_num_threads(before)
    # The definition, in NumPy.
    scale = np.sqrt(
        np.mean(np.concatenate([w.numpy() for w in weights.values()]).astype(float) ** 2)
    )
    values = mark.pattern(600_000, round_number=1, client=1).numpy()
    expected = weights["layer.1"].numpy() + values[300_000:] * np.float32(0.05 * scale)
    assert np.array_equal(copy["layer.1"].numpy(), expected)


@given(client=st.integers(0, 10**6), number=st.integers(1, 10**6), count=st.integers(1, 500))
@settings(deadline=None, max_examples=50)
def test_a_shorter_pattern_is_the_beginning_of_a_longer_one(client, number, count):
    mark = Fingerprint(KEY, 0.05, ())
    short = mark.pattern(count, round_number=number, client=client)
    assert torch.equal(short, mark.pattern(count + 9, round_number=number, client=client)[:count])
    assert float(short.abs().max()) < 4.4
