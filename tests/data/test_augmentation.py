import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from fedveil.data.augmentation import Augmentation, parse_augmentation, warp
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


def warped_by_scipy(image, degrees, scale, shear):
    """[C, H, W] through the map of ``warp``'s docstring, by scipy's own interpolation."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = scale * turn @ np.array([[1.0, shear], [0.0, 1.0]])
    backward = np.linalg.inv(forward)[::-1, ::-1]  # scipy counts rows first
    centre = (np.array(image.shape[1:]) - 1) / 2
    return np.stack(
        [
            affine_transform(
                np.pad(plane, 1),
                backward,
                centre + 1 - backward @ (centre + 1),
                order=1,
                mode="grid-constant",
            )[1:-1, 1:-1]
            for plane in image
        ]
    )


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    degrees=st.floats(-180, 180),
    scale=st.floats(0.3, 2),
    shear=st.floats(-1, 1),
    seed=st.integers(0, 2**31),
)
def test_warp_is_scipy_s(size, degrees, scale, shear, seed):
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    pixels = pixels.double()
    arguments = {"degrees": degrees, "scale": scale, "shear": shear}
    found = warp(pixels, **{k: torch.full((2,), v).double() for k, v in arguments.items()})
    for image, changed in zip(pixels.numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(changed, warped_by_scipy(image, **arguments), atol=1e-6)


def test_maps_are_drawn_evenly_up_to_their_largest_either_way():
    # A bar of light above the centre turns by the drawn angle; its angle is read from its moments.
    image = torch.zeros(1, 1, 31, 31)
    image[..., :15, 15] = 1.0
    changed = Augmentation(rotate=40)(
        image.expand(4_000, -1, -1, -1), torch.Generator().manual_seed(0)
    )
    axis = torch.arange(31.0) - 15
    mass = changed.sum((1, 2, 3))
    x = (changed[:, 0] * axis).sum((1, 2)) / mass
    y = (changed[:, 0] * axis[:, None]).sum((1, 2)) / mass
    degrees = torch.rad2deg(torch.atan2(x, -y))
    assert degrees.abs().max() < 40.5
    assert abs(degrees.mean()) < 6 * 40 / (3 * 4_000) ** 0.5
    # Uniform over [-40, 40]: a quarter of the draws in each quarter, six deviations of 27.
    counts = torch.histc(degrees, 4, -40, 40)
    assert counts.min() > 835
    assert counts.max() < 1165


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, Augmentation()),
        ("none", Augmentation()),
        ("crop:4", Augmentation(4)),
        ("flip", Augmentation(0, True)),
        ("crop:2,flip", Augmentation(2, True)),
        ("rotate:15", Augmentation(rotate=15.0)),
        (
            "crop:2, rotate:7.5, zoom:0.15, shear:0.2, flip",
            Augmentation(2, True, rotate=7.5, zoom=0.15, shear=0.2),
        ),
    ],
)
def test_parse(text, expected):
    assert parse_augmentation(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("crop", "crop:0", "crop:65", "crop:-1", "crop:1.5", "mirror", "flip:2", "flip,flip"),
        *("rotate:181", "rotate:nan", "zoom:1", "shear:-0.1", "crop:1,crop:2", "none,flip", ","),
    ],
)
def test_parse_errors_name_the_text_and_what_is_allowed(text):
    with pytest.raises(FedveilError, match=r"crop:PIXELS") as error:
        parse_augmentation(text)
    assert repr(text) in str(error.value)
