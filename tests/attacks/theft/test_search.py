"""The thief's own yardstick, and the fairness of the two arms."""

import numpy as np
import torch

from fedveil.attacks.theft import ATTACKS, TheftObservation
from fedveil.attacks.theft import descent as descent_module
from fedveil.attacks.theft.descent import recipes, search
from fedveil.attacks.theft.holdout import folds, score
from tests.attacks.theft.conftest import Small, accuracy


def test_folds_divide_the_labels():
    for count, parts in ((2, 2), (10, 5), (50, 3), (100, 1), (600, 1)):
        divided = folds(count, seed=1)
        assert len(divided) == parts
        for fold in divided:
            assert sorted([*fold.train.tolist(), *fold.held_out.tolist()]) == list(range(count))
        if parts > 1:
            held = torch.cat([fold.held_out for fold in divided])
            assert sorted(held.tolist()) == list(range(count))
    assert len(folds(600, seed=0)[0].held_out) == 150


def test_a_score_does_not_depend_on_the_scale_of_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 10, generator=generator)
    labels = logits.argmax(1)
    labels[:20] = 3
    one, other = score(logits, labels), score(logits * 16, labels)
    assert one.accuracy == other.accuracy
    assert abs(one.confidence - other.confidence) < 1e-6
    # Who knows nothing is as unsure as the number of classes, and never worse.
    assert abs(score(torch.randn(5000, 10), torch.arange(5000) % 10).confidence + np.log(10)) < 0.01


def test_halving_spends_less_than_trying_everything_to_the_end(observe, monkeypatch):
    steps = []
    until = descent_module._Descent.until

    def counted(self, target):
        steps.append(target - self._steps)
        return until(self, target)

    monkeypatch.setattr(descent_module._Descent, "until", counted)
    search(observe(labels=100), recipes(["output.weight", "output.bias"]))
    # Four recipes for 30 steps, two on to 90, one on to 270, and the winner anew.
    spent = sum(steps[:7])
    assert spent == 4 * 30 + 2 * 60 + 180
    assert len(steps) == 8
    assert steps[-1] in (30, 90, 270)


def test_held_out_labels_are_never_trained_on(observe, monkeypatch):
    """A copy that knows nothing, and labels without sense: the holdout must say so."""
    generator = torch.Generator().manual_seed(0)
    seen = observe(labels=200)
    labels = torch.randint(10, (200,), generator=generator)
    seen = TheftObservation(
        **{**vars(seen), "labelled": type(seen.labelled)(seen.labelled.raw, labels)}
    )
    for name in ("probe", "fine-tune", "distil", "local-epochs"):
        assert ATTACKS[name](seen).score.accuracy < 0.3, name


def test_a_copy_that_holds_nothing_gives_no_advantage(observe, dataset):
    """The fairness of the two arms: another fresh initialisation is no better than one's own."""
    advantages = []
    for seed in range(2):
        alone = observe(labels=100, seed=seed)
        copied = observe(Small(100 + seed).state_dict(), labels=100, seed=seed)
        best = [
            max(
                accuracy(attack(seen).weights, dataset.test)
                for attack in ATTACKS.values()
                if attack.applies(seen)
            )
            for seen in (copied, alone)
        ]
        advantages.append(best[0] - best[1])
    assert abs(np.mean(advantages)) < 0.04
