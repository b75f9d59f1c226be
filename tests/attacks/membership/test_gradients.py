"""Membership by gradient: against least squares by hand, and where nothing is there to tell."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.attacks.inversion import Observation
from fedveil.attacks.membership import per_image
from fedveil.attacks.membership.gradients import GradientMembership
from fedveil.audit.leakage import audit_leakage
from fedveil.audit.membership import picked_out
from fedveil.audit.settings import LeakageSettings, Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import Images, load_dataset
from fedveil.defenses import parse_defense
from fedveil.models import build_model
from fedveil.secure_random import SecureGenerator

SHAPE, CLASSES = (1, 6, 6), 4


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(36, 9)
        self.output = nn.Linear(9, CLASSES)

    def forward(self, x):
        return self.output(torch.tanh(self.body(x.flatten(1))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


def _images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, *SHAPE, generator=generator)
    return Images(pixels, torch.randint(CLASSES, (count,), generator=generator))


def _gradient(model, images):
    loss = F.cross_entropy(model(images.pixels), images.labels)
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def _flat(gradient):
    return torch.cat([value.flatten() for value in gradient.values()]).double().numpy()


def _observation(model, batches, **more):
    gradients = [_gradient(model, batch) for batch in batches]
    together = {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]}
    return Observation(model, together, SHAPE, CLASSES, len(batches[0]), **more)


def _by_hand(update, candidates, public, ridge):
    """Regress by numpy's least squares on rows appended for the ridge."""
    rows = np.stack([row / np.linalg.norm(row) for row in public])
    design = np.concatenate([rows.T, np.sqrt(ridge) * np.eye(len(rows))])
    nothing = np.zeros(len(rows))
    scores = []
    for row in candidates:
        wide = np.concatenate([row, nothing])
        left = wide - design @ np.linalg.lstsq(design, wide, rcond=None)[0]
        scores.append(left @ np.concatenate([update, nothing]) / np.sqrt(left @ wide))
    return np.array(scores)


def test_scores_are_those_of_a_regression_by_hand(model, monkeypatch):
    monkeypatch.setattr(per_image, "_FEWEST", 3)  # images at once: seven candidates are three parts
    monkeypatch.setattr(per_image, "_MOST", 3)
    batches, candidates, public = [_images(3, 1), _images(3, 2)], _images(7, 3), _images(5, 4)
    attack = GradientMembership(ridge=0.2, public=5)
    found = attack(_observation(model, batches), candidates, public)
    rows = [_flat(_gradient(model, candidates[i : i + 1])) for i in range(7)]
    known = [_flat(_gradient(model, public[i : i + 1])) for i in range(5)]
    for victim, batch in enumerate(batches):
        expected = _by_hand(_flat(_gradient(model, batch)), rows, known, 0.2)
        np.testing.assert_allclose(found[victim].numpy(), expected, rtol=1e-3, atol=1e-6)


def test_large_images_are_few_at_once_whatever_the_networks_size():
    pooled = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for size, parts in ((160, [16, 16, 8]), (16, [40])):
        images = Images(torch.rand(40, 1, size, size), torch.zeros(40, dtype=torch.int64))
        seen = _observation(pooled, [images[:2]])
        gradients = per_image.PerImageGradients.of(seen, images, torch.device("cpu"))
        assert [len(part) for part in gradients.each(images)] == parts


def test_only_what_was_sent_is_compared(model):
    """Scores are those of the masked gradients; what a sanitiser destroyed tells nothing."""
    batch, candidates, public = _images(3, 1), _images(4, 3), _images(5, 4)
    pruning = parse_defense("prune:share=0.7").sanitizer
    sent = pruning(_gradient(model, batch), SecureGenerator())
    observation = Observation(
        model, {k: v[None] for k, v in sent.items()}, SHAPE, CLASSES, 3, sanitizer=pruning
    )
    found = GradientMembership(ridge=0.2)(observation, candidates, public)[0]
    mask = _flat(sent) != 0
    rows = [_flat(_gradient(model, candidates[i : i + 1])) * mask for i in range(4)]
    known = [_flat(_gradient(model, public[i : i + 1])) * mask for i in range(5)]
    expected = _by_hand(_flat(sent), rows, known, 0.2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-6)


def test_few_public_images_and_memory_for_fewer_still(model, monkeypatch):
    batch, candidates, public = _images(3, 1), _images(4, 3), _images(6, 4)
    three = GradientMembership(public=3)(_observation(model, [batch]), candidates, public)
    weights = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("fedveil.attacks.membership.gradients.MOST_NUMBERS", 3 * weights)
    limited = GradientMembership()(_observation(model, [batch]), candidates, public)
    torch.testing.assert_close(limited, three)


def _audit(defense, **changes):
    digits = load_dataset("digits")
    settings = LeakageSettings(
        **{
            "clients": 4,
            "images": 32,
            "batch": 8,
            "attacks": ("ig:steps=2",),
            "defenses": (defense,),
            **changes,
        }
    )
    return audit_leakage(digits, build_model("cnn", digits.shape, 10, seed=0), settings).rows


def test_noise_that_ruins_a_reconstruction_hides_nothing_from_who_has_candidates():
    row = _audit("noise:ratio=3")[0].summary()
    assert row["picked_out"] > 0.25  # by chance 0.01; the noise is another in every run
    assert row["picked_out_low"] <= row["picked_out"] <= row["picked_out_high"]


def test_a_known_transformation_is_applied_to_the_candidates():
    naive, aware = (row.summary() for row in _audit("dct:skip=6"))
    assert aware["picked_out"] > 0.6
    assert naive["picked_out"] < aware["picked_out"]


def test_of_a_sum_each_clients_images_are_told():
    row = _audit("none", aggregate=4)[0].summary()
    assert row["images"] == 32
    assert row["picked_out"] > 0.5


def _by_gradient(found):
    return next(one.picked for one in found if one.adaptive and one.attack == "gradient")


def test_a_part_of_a_large_round_is_scored_like_the_whole():
    digits, none = load_dataset("digits"), parse_defense("none")
    model = build_model("cnn", digits.shape, 10, seed=0)
    watched = WatchedFederation(digits, model, Watching(clients=4, victim=1, images=80, batch=40))
    seen, used = watched.observe(none), watched.ground_truth()
    whole = _by_gradient(picked_out(none, seen, digits, used, seed=0))
    part = _by_gradient(picked_out(none, seen, digits, used, seed=0, scored=30))
    assert (whole.shape, part.shape) == ((2, 40), (2, 30))
    assert float(part.mean()) == pytest.approx(float(whole.mean()), abs=0.15)


def test_where_the_update_says_nothing_no_image_stands_out():
    """Noise a thousand times the update: every image is as likely to be first as any other."""
    shares = [row.scores["picked_out"].mean() for row in _audit("noise:ratio=1e4", images=160)]
    assert max(shares) < 0.06
