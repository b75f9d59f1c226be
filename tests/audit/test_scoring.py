import dataclasses

import pytest
import torch

from fedveil.attacks.inversion import Inversion
from fedveil.audit.leakage import Row
from fedveil.audit.membership import _Lineup, table, untold
from fedveil.audit.scoring import Scorer, strangers_to
from fedveil.data import Images, load_dataset
from fedveil.defenses import BlockDCT
from fedveil.errors import FedveilError


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def _found(images, labels):
    batches = torch.ones(len(images), dtype=torch.float64)
    return Inversion(
        images=images, labels=labels, loss=batches, seconds=batches, iterations=batches.long()
    )


@pytest.mark.parametrize("knows", [False, True])
def test_other_photographs_reach_the_floor_and_no_more(digits, knows):
    transform = BlockDCT(keep=6) if knows else None
    scorer = Scorer.of(digits, torch.arange(64), transform, 0)
    pixels = digits.train[1000:1064]
    made = pixels.pixels if transform is None else transform(pixels.pixels)
    result = _found(made.reshape(4, 16, 1, 8, 8), pixels.labels.reshape(4, 16))
    _, scores = scorer.score(result, knows=knows)
    floors = scorer.floors(16, knows=knows)
    assert float(floors["identified"].mean()) < 0.025
    assert float(scores["identified"].mean()) < 0.06
    for name in ("psnr_original", "label_accuracy"):
        assert float(floors[name].mean()) > float(scores[name].mean()) - 0.5
    assert set(floors) <= set(scores)
    assert all(values.shape == (64,) for values in floors.values())


def test_the_truth_is_far_above_every_floor(digits):
    scorer = Scorer.of(digits, torch.arange(64), None, 0)
    own = digits.train[:64]
    result = _found(own.pixels.reshape(4, 16, 1, 8, 8), own.labels.reshape(4, 16))
    _, scores = scorer.score(result, knows=False)
    floors = scorer.floors(16, knows=False)
    for name, worst in (("identified", 0.9), ("label_accuracy", 0.3), ("exact", 0.9)):
        assert float(scores[name].mean() - floors[name].mean()) > worst


def test_strangers_and_photographs_of_a_floor_are_apart(digits):
    everything = torch.arange(len(digits.train))
    scorer = Scorer.of(digits, everything, None, 0)
    strangers = {bytes(image.numpy().tobytes()) for image in scorer.strangers}
    assert len(strangers) > 50
    assert not strangers & {bytes(image.numpy().tobytes()) for image in scorer.public.pixels}


def test_doubles_of_used_images_are_neither_strangers_nor_the_attackers_own(digits):
    used = torch.arange(8)
    mixed = dataclasses.replace(digits, test=Images.joined([digits.train[:30], digits.test]))
    own = {image.numpy().tobytes() for image in digits.train[used].pixels}
    scorer = Scorer.of(mixed, torch.arange(len(digits.train)), None, 0)
    everything = {image.numpy().tobytes() for image in digits.train.pixels}
    lineup = _Lineup.of(mixed, used[None], 0, None)
    for images, theirs in (
        (scorer.public.pixels, everything),
        (scorer.strangers, everything),
        (lineup.public.pixels, own),
        (lineup.unseen.pixels, own),
    ):
        assert not theirs & {image.numpy().tobytes() for image in images}
    copied = dataclasses.replace(digits, test=digits.train[used])
    with pytest.raises(FedveilError, match="every test image of digits is a double"):
        _Lineup.of(copied, used[None], 0, None)
    with pytest.raises(FedveilError, match="of its test images 0 are no doubles"):
        Scorer.of(copied, torch.arange(len(digits.train)), None, 0)


def test_of_one_update_no_interval_is_told(digits):
    row = Row(
        "lm", "none", False, torch.zeros(4, 1, 2, 2), torch.zeros(1, dtype=torch.float64),
        {"psnr_original": torch.arange(4.0).double(), "identified": torch.ones(4).double()},
        {"psnr_original": torch.ones(4).double(), "identified": torch.full((4,), 0.5).double()},
    )  # fmt: skip
    told = row.summary()
    assert told["psnr_original_low"] is told["psnr_original_high"] is None
    assert (told["identified_low"], told["identified_high"]) == (0, 1)
    assert (told["psnr_original_floor"], told["identified_floor"]) == (1, 0.5)
    two = dataclasses.replace(row, loss=torch.zeros(2, dtype=torch.float64)).summary()
    assert two["psnr_original_low"] <= two["psnr_original"] <= two["psnr_original_high"]


def test_a_double_of_a_used_image_is_no_stranger(digits):
    """As where the auditor names the images that were trained on, beside the whole dataset."""
    raw = torch.cat([digits.train.raw[:40], digits.train.raw[:3]])
    train = Images(raw, torch.cat([digits.train.labels[:40], digits.train.labels[:3]]))
    found = strangers_to(train, torch.tensor([40, 41, 42]), torch.Generator().manual_seed(0))
    assert sorted(found.tolist()) == list(range(3, 40))


def test_where_nobody_is_left_to_tell_from_it_is_said():
    told = table({"none": (), "dct:keep=3": ()})
    assert len(told) == 1
    assert "not told under none, dct:keep=3" in told[0]
    assert "every training image was" in told[-1]
    assert table({}) == []
    assert untold({}) == ()
