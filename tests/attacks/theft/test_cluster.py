"""The thief that has no label, on a small model."""

from itertools import permutations

import pytest
import torch

from fedveil.attacks.theft import ATTACKS, Cluster, Direct
from fedveil.attacks.theft.cluster import _named, _Seen
from tests.attacks.theft.conftest import accuracy
from tests.attacks.theft.test_attacks import OUTPUT, noisy


def copies_of(trained, count, sigma):
    return [(n + 1, 0, noisy(trained, OUTPUT, sigma=sigma, seed=n)) for n in range(count)]


def test_without_a_label_noise_in_the_output_layer_is_undone(observe, dataset, trained):
    seen = observe(*copies_of(trained, 6, 2.5), labels=0, noised=OUTPUT)
    direct = accuracy(Direct()(seen).weights, dataset.test)
    assert direct < 0.6
    stolen = Cluster()(seen)
    assert accuracy(stolen.weights, dataset.test) > 0.75
    assert 0 < stolen.score.confidence <= 1


def test_only_the_output_layer_is_made_anew(observe, trained):
    (copy,) = copies_of(trained, 1, 1.5)
    stolen = Cluster()(observe(copy, labels=0)).weights
    assert {name for name in stolen if not torch.equal(stolen[name], copy[2][name])} == set(OUTPUT)


def test_scale_and_bias_of_an_answer_count_for_nothing(observe, trained):
    """What a temperature or noise in the bias does to a copy is standardised away."""
    one, *others = (weights for _, _, weights in copies_of(trained, 3, 1.5))
    moved = {
        **one,
        "output.weight": 1e-3 * one["output.weight"],
        "output.bias": 1e-3 * one["output.bias"] + 5 * torch.randn(10),
    }
    plain, changed = (
        Cluster()(observe(*((1, 0, copy) for copy in (first, *others)), labels=0)).weights
        for first in (one, moved)
    )
    for name in OUTPUT:
        assert torch.allclose(plain[name], changed[name], atol=1e-3)


def test_labels_name_what_the_votes_misname(observe, dataset, trained):
    """Of a head that is noise alone the names are chance, and forty labels put them right."""
    copy = noisy(trained, OUTPUT, sigma=1e3)
    blind = accuracy(Cluster()(observe(copy, labels=0)).weights, dataset.test)
    told = Cluster()(observe(copy, labels=40))
    assert blind < 0.45
    assert accuracy(told.weights, dataset.test) > 0.75
    assert told.score.accuracy > 0.6


def test_who_has_neither_copies_nor_labels_is_at_chance(observe, dataset):
    alone = observe(labels=0)
    assert {name for name, attack in ATTACKS.items() if attack.applies(alone)} == {
        "direct",
        "cluster",
    }
    for name in ("direct", "cluster"):
        assert accuracy(ATTACKS[name](alone).weights, dataset.test) < 0.35


@pytest.mark.parametrize("seed", range(3))
def test_names_are_the_best_of_all_permutations(seed):
    generator = torch.Generator().manual_seed(seed)
    votes = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    groups = torch.randint(4, (30,), generator=generator)
    labels = torch.randint(4, (5,), generator=generator)
    seen = _Seen(torch.zeros(30, 2), votes, labels, 4, 0)
    known = torch.tensor([0, 3])

    def agreed(names):
        means = sum(float(votes[groups == k, names[k]].mean()) for k in range(4))
        return means + sum(names[int(groups[i])] == int(labels[i]) for i in known)

    best = max(permutations(range(4)), key=agreed)
    assert _named(seen, groups, known).tolist() == [best[k] for k in groups.tolist()]
