"""What benchmarks compute by themselves: means of answers and of weights, and fair shadows."""

import sys
from pathlib import Path

import pytest
import torch

from fedveil.data import load_dataset
from fedveil.federation.answers import decoded, encoded, logits_of

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import analytic_finetuning
import analytic_released
import paired_logits


def test_what_is_seen_of_ten_clients_is_what_their_secure_sum_decodes_to():
    data = load_dataset("digits", seed=0)
    states = []
    for seed in range(10):
        model = paired_logits.untrained(data)
        torch.manual_seed(seed)
        states.append(
            {name: torch.randn_like(value) / 5 for name, value in model.state_dict().items()}
        )
    asked = data.test.pixels[:5]
    logits = [logits_of(paired_logits.untrained(data), state, asked) for state in states]
    summed = decoded(sum(encoded(some, 14.0) for some in logits), 140.0)
    torch.testing.assert_close(
        paired_logits.said(data, states, asked).exp().double(), summed, atol=1e-5, rtol=1e-4
    )


def test_clients_count_by_their_images():
    states = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}]
    assert analytic_finetuning.averaged(states, [300, 100])["w"].item() == pytest.approx(2.0)


def test_every_image_is_in_half_of_the_federations_and_each_has_half():
    held = analytic_released.halves(100, 6)
    assert held.sum(0).tolist() == [3] * 100
    assert held.sum(1).tolist() == [50] * 6
    assert torch.equal(held[0], ~held[1])
    assert not torch.equal(held[0], held[2])


def test_what_the_other_half_learnt_tells_nothing_of_a_federation():
    held = analytic_released.halves(200, 6)
    known = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)).double()
    changed = known.clone()
    changed[1] = torch.where(held[0], -50.0, 50.0)

    def of_first(found):
        return [row for _, number, row in analytic_released.by_w(found, held) if number == 0]

    assert of_first(known) == of_first(changed)
    assert of_first(known) != of_first(known + held.double())
