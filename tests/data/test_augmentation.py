import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.data.augmentation import Augmentation, parse_augmentation
from fedveil.errors import FedveilError


def windows(image, margin):
    """All crops of one padded image, [C, H, W] each, by plain slicing."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)))
    return [
        padded[:, i : i + height, j : j + width]
        for i in range(2 * margin + 1)
        for j in range(2 * margin + 1)
    ]


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 3),
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    margin=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_image_becomes_a_window_of_itself_or_of_its_mirror(
    channels, size, margin, flip, seed
):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(5, channels, *size, generator=generator)
    before = pixels.clone()
    changed = Augmentation(margin, flip)(pixels, generator)
    assert torch.equal(pixels, before)
    assert changed.shape == pixels.shape
    for image, found in zip(pixels.numpy(), changed.numpy(), strict=True):
        allowed = windows(image, margin)
        allowed += [window[..., ::-1] for window in allowed] if flip else []
        assert any(np.array_equal(found, window) for window in allowed)


def test_all_windows_and_both_mirrorings_come_up_about_equally_often():
    image = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    changed = Augmentation(1, flip=True)(
        image.expand(9_000, -1, -1, -1), torch.Generator().manual_seed(0)
    )
    kinds, counts = torch.unique(changed.flatten(1), dim=0, return_counts=True)
    assert len(kinds) == 18
    # Binomial with mean 500 and standard deviation 21.7; six of those either way.
    assert counts.min() > 370
    assert counts.max() < 630


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, Augmentation()),
        ("none", Augmentation()),
        ("crop:4", Augmentation(4)),
        ("flip", Augmentation(0, True)),
        ("crop:2,flip", Augmentation(2, True)),
    ],
)
def test_parse(text, expected):
    assert parse_augmentation(text) == expected


@pytest.mark.parametrize("text", ["crop", "crop:0", "crop:65", "crop:-1", "mirror", "flip:2"])
def test_parse_errors_name_the_text_and_what_is_allowed(text):
    with pytest.raises(FedveilError, match=r"crop:PIXELS") as error:
        parse_augmentation(text)
    assert repr(text) in str(error.value)
