"""Membership in what a returned model was trained on, beside computations of its own."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import LocalSteps, Observation
from fedveil.attacks.membership import ReturnedGradientNorm, ReturnedLoss
from fedveil.audit.membership import picked_out
from fedveil.audit.metrics import area
from fedveil.audit.settings import Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import Images, load_dataset
from fedveil.defenses import Defense
from fedveil.errors import InapplicableAttackError

LOCAL = LocalSteps(epochs=60, batch_size=8, learning_rate=0.3)
SHAPE, CLASSES = (1, 4, 4), 3


def images(count, seed):
    """Images that tell nothing of their labels: what is learnt is learnt by heart."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, *SHAPE, generator=generator)
    return Images(pixels, torch.randint(CLASSES, (count,), generator=generator))


def fresh(*middle):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.Flatten(), nn.Linear(16, 48), *middle, nn.ReLU()]
        return nn.Sequential(*first, nn.Linear(48, CLASSES)).train()


def returned(sent, used):
    """Train as a client does; an independent loop."""
    model = copy.deepcopy(sent)
    descent = torch.optim.SGD(model.parameters(), lr=LOCAL.learning_rate)
    generator = torch.Generator().manual_seed(7)
    for _ in range(LOCAL.epochs):
        for index in torch.randperm(len(used), generator=generator).split(LOCAL.batch_size):
            descent.zero_grad()
            F.cross_entropy(model(used[index].pixels), used[index].labels).backward()
            descent.step()
    return model


def observed(sent, *models, used):
    length = LOCAL.learning_rate * LOCAL.steps(used)
    after = [dict(model.named_parameters()) for model in models]
    update = {
        name: torch.stack([(value - one[name]).detach().double() / length for one in after])
        for name, value in sent.named_parameters()
    }
    return Observation(sent, update, SHAPE, CLASSES, used, local=LOCAL)


def test_without_shadows_the_score_is_the_residual_of_scikit_learns_ridge():
    used, others, public = images(40, 1), images(60, 2), images(80, 3)
    sent = fresh()
    model = returned(sent, used)
    candidates = Images(
        torch.cat([used.pixels, others.pixels]), torch.cat([used.labels, others.labels])
    )
    attack = ReturnedLoss(shadows=0)
    scores = attack(observed(sent, model, used=40), candidates, public)[0]

    def odds(one, these):
        with torch.no_grad():
            own = one(these.pixels).double().softmax(1).gather(1, these.labels[:, None])[:, 0]
        return (own / (1 - own)).log().numpy()

    def known(these):
        return np.c_[np.eye(CLASSES)[these.labels.numpy()], odds(sent, these)]

    ridge = Ridge(alpha=1.0).fit(known(public), odds(model, public))
    by_hand = odds(model, candidates) - ridge.predict(known(candidates))
    assert scores.numpy() == pytest.approx(by_hand, abs=1e-3)


def test_the_gradient_norm_is_autograds():
    used = images(20, 1)
    sent = fresh()
    model = returned(sent, used)
    told = ReturnedGradientNorm().fits(observed(model, model, used=20), used)
    for place in range(20):
        loss = F.cross_entropy(model(used.pixels[[place]]), used.labels[[place]])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        square = sum(float(part.double().square().sum()) for part in parts)
        assert float(told[place]) == pytest.approx(-np.log(square), abs=1e-3)


@pytest.mark.parametrize("middle", [(), (nn.BatchNorm1d(48),), (nn.Dropout(0.2),)])
@pytest.mark.parametrize("attack", [ReturnedLoss(), ReturnedGradientNorm()])
def test_long_local_training_tells_its_images(attack, middle):
    own, other, strangers, public = (images(40, seed) for seed in (1, 2, 3, 4))
    sent = fresh(*copy.deepcopy(middle))
    seen = observed(sent, returned(sent, own), returned(sent, other), used=40)
    parts = (own, other, strangers)
    together = Images(
        torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts])
    )
    scores = attack(seen, together, public)
    assert torch.equal(scores, attack(seen, together, public))
    assert area(scores[0, :40], scores[0, 40:]).low > 0.65
    assert area(scores[1, 40:80], scores[1, 80:]).low > 0.65
    assert area(scores[0, 40:80], scores[0, 80:]).value < 0.7  # nobody's but the other client's


def test_a_shadow_is_never_compared_with_what_it_held():
    """Otherwise public images would all seem to be fitted worse than they are."""
    public = images(60, 4)
    attack, sent = ReturnedLoss(shadows=4), fresh()
    pairs = [held for held, _ in attack._trained(sent, LOCAL, public)]
    assert [int(held.sum()) for held in pairs] == [30] * 4
    assert torch.equal(pairs[0], ~pairs[1])
    assert not torch.equal(pairs[0], pairs[2])
    strangers = images(200, 5)
    seen = observed(sent, returned(sent, images(40, 1)), used=40)
    known, given = attack._difficulty(seen, strangers, public)
    assert abs(float(known[:, -1].mean() - given[:, -1].mean())) < 1.0


def test_a_single_gradient_has_no_returned_model():
    sent = fresh()
    update = {name: value[None].detach() for name, value in sent.named_parameters()}
    with pytest.raises(InapplicableAttackError, match="one gradient or step"):
        ReturnedLoss()(Observation(sent, update, SHAPE, CLASSES, 4), images(4, 0), images(4, 1))


def test_an_audit_of_long_local_training_names_the_loss():
    digits = load_dataset("digits")
    labels = torch.randint(10, (len(digits.train),), generator=torch.Generator().manual_seed(4))
    random = copy.copy(digits)
    object.__setattr__(random, "train", Images(digits.train.raw, labels))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    watching = Watching(
        clients=2, images=160, batch=80, update="fedavg", epochs=40, learning_rate=0.3, workers=1
    )
    watched = WatchedFederation(random, model, watching)
    none = Defense("none")
    found = picked_out(none, watched.observe(none), random, watched.ground_truth(), seed=0)
    told = {one.attack: one.strangers.roc() for one in found if one.adaptive}
    assert set(told) == {"gradient", "span", "loss", "gradient-norm"}
    assert told["loss"].auc.value > 0.8
    assert told["loss"].auc.value > told["gradient"].auc.value


def test_shadows_that_diverge_are_left_out():
    """A client's few images may converge where the many of a shadow do not."""
    sent, used = fresh(), images(8, 0)
    seen = observed(sent, returned(sent, used), used=len(used))
    wild = dataclasses.replace(seen, local=dataclasses.replace(LOCAL, learning_rate=1e30))
    _, given = ReturnedLoss()._difficulty(wild, images(10, 1), images(64, 2))
    assert given.shape == (10, CLASSES + 1)
    assert bool(given.isfinite().all())
    assert ReturnedLoss()._difficulty(seen, images(10, 1), images(64, 2))[1].shape[1] == CLASSES + 2
