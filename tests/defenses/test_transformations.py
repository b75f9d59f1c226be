"""Image transformations, against second implementations."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_image

from fedveil.defenses import (
    JPEG,
    BlockDCT,
    DownSampling,
    GaussianBlur,
    RandomBlockDCT,
    parse_defense,
)
from fedveil.errors import FedveilError

SPECS = ["dct:keep=10", "dct-random:drop=0.5", "jpeg:quality=30", "blur:sigma=1.5", "down:factor=2"]


@pytest.fixture(scope="module")
def photos():
    """Two photographs, [2, 3, 32, 32]."""
    raw = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    return torch.stack([raw[:, 100:132, 200:232], raw[:, 200:264:2, 300:364:2]]).float() / 255


def _block_spectrum(images):
    blocks = images.double().numpy().reshape(*images.shape[:2], 4, 8, 4, 8).swapaxes(3, 4)
    return dctn(blocks, axes=(-2, -1), norm="ortho")


def test_random_dct_drops_whole_coefficients_of_an_image(photos):
    before = _block_spectrum(photos)
    after = _block_spectrum(RandomBlockDCT(drop=0.5)(photos))
    kept = np.isclose(after, before, atol=1e-5)
    gone = np.isclose(after, 0, atol=1e-5)
    assert (kept | gone).all()
    for image in range(2):
        shared = kept[image].all(axis=(0, 1, 2))
        assert shared[0, 0]
        assert gone[image][..., ~shared].all()
        assert 15 < shared.sum() < 49
    assert (kept[0].all(axis=(0, 1, 2)) != kept[1].all(axis=(0, 1, 2))).any()


def test_random_dct_of_an_image_is_the_same_in_every_round(photos):
    transform = RandomBlockDCT(drop=0.7)
    assert torch.equal(transform(photos)[1], RandomBlockDCT(drop=0.7)(photos[1:])[0])
    assert not torch.equal(transform(photos), RandomBlockDCT(drop=0.7, seed=1)(photos))
    surrogate = transform.surrogate
    assert not torch.equal(surrogate(photos), surrogate(photos))


@pytest.mark.parametrize(("drop", "keep"), [(0.0, 64), (0.0, 6), (1.0, 64)])
def test_random_dct_at_its_ends_is_the_fixed_one(photos, drop, keep):
    fixed = BlockDCT(keep=1 if drop else keep)
    assert torch.allclose(RandomBlockDCT(drop=drop, keep=keep)(photos), fixed(photos), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(1, 64))
def test_the_strength_of_a_random_dct_is_the_mean_share_dropped(drop, keep):
    transform = RandomBlockDCT(drop=drop, keep=keep)
    flat = torch.zeros(400, 1, 8, 8)
    flat[:, 0, 0, 0] = 1  # a point holds every frequency
    after = transform.surrogate(flat)
    spectrum = dctn(after.double().numpy(), axes=(-2, -1), norm="ortho")
    dropped = (np.abs(spectrum) < 1e-6).mean()
    assert dropped == pytest.approx(transform.strength, abs=0.03)


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_jpeg_is_what_a_viewer_shows(photos, quality):
    got = JPEG(quality=quality)(photos)
    for image, found in zip(photos, got, strict=True):
        buffer = io.BytesIO()
        raw = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(raw).save(buffer, "JPEG", quality=quality)
        shown = np.asarray(Image.open(buffer).convert("RGB"))
        assert np.array_equal((found * 255).round().byte().permute(1, 2, 0).numpy(), shown)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [20, 60])
def test_the_surrogate_of_jpeg_is_close_to_it_and_differentiable(photos, quality, channels):
    images = photos[:, :channels].clone().requires_grad_()
    jpeg = JPEG(quality=quality)
    found = jpeg.surrogate(images)
    distance = (found - jpeg(images)).square().mean()
    assert distance < 0.35 * (images - jpeg(images)).square().mean()
    found.square().sum().backward()
    assert images.grad.abs().sum() > 0


def test_blur_is_a_gaussian(photos):
    got = GaussianBlur(sigma=1.5)(photos).numpy()
    expected = gaussian_filter(
        photos.double().numpy(), sigma=1.5, axes=(2, 3), mode="mirror", radius=5
    )
    assert np.allclose(got, expected, atol=1e-5)


def test_down_sampling_averages_squares_and_interpolates(photos):
    got = DownSampling(factor=4)(photos)
    means = photos.reshape(2, 3, 8, 4, 8, 4).mean(dim=(3, 5))
    # Between the centres of squares 1.5 pixels from either border, the value is linear.
    assert torch.allclose(got[..., 5, 5], _bilinear(means, 5, 5), atol=1e-6)
    assert torch.allclose(got[..., 17, 10], _bilinear(means, 17, 10), atol=1e-6)
    assert torch.equal(DownSampling(factor=1)(photos), photos)


def _bilinear(means, row, column):
    def weights(place):
        at = (place + 0.5) / 4 - 0.5
        return int(at), at - int(at)

    (i, a), (j, b) = weights(row), weights(column)
    top = means[..., i, j] * (1 - b) + means[..., i, j + 1] * b
    bottom = means[..., i + 1, j] * (1 - b) + means[..., i + 1, j + 1] * b
    return top * (1 - a) + bottom * a


@pytest.mark.parametrize("spec", SPECS)
def test_images_are_transformed_one_by_one_and_not_in_place(photos, spec):
    transform = parse_defense(spec).transform
    before = photos.clone()
    together = transform(photos)
    assert torch.equal(photos, before)
    assert together.shape == photos.shape
    assert together.dtype == photos.dtype
    alone = torch.cat([transform(image[None]) for image in photos])
    assert torch.allclose(together, alone, atol=1e-6)
    stacked = transform(photos[None])
    assert torch.allclose(stacked[0], together, atol=1e-6)


@pytest.mark.parametrize(
    "weak_strong",
    [
        ("dct:keep=28", "dct:keep=3"),
        ("dct-random:drop=0.3", "dct-random:drop=0.9"),
        ("jpeg:quality=80", "jpeg:quality=5"),
        ("blur:sigma=0.5", "blur:sigma=3"),
        ("down:factor=2", "down:factor=8"),
    ],
)
def test_more_strength_leaves_less(photos, weak_strong):
    weak, strong = (parse_defense(spec) for spec in weak_strong)
    assert weak.strength < strong.strength
    missed = [(d.transform(photos) - photos).square().mean() for d in (weak, strong)]
    assert missed[0] < missed[1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jpeg:quality=0", "quality=0"),
        ("jpeg", "needs its option quality"),
        ("blur:sigma=0", "sigma=0"),
        ("blur:sigma=nan", "sigma=nan"),
        ("down:factor=0", "factor=0"),
        ("dct-random:drop=1.5", "drop=1.5"),
        ("dct-random:keep=3", "needs its option drop"),
        ("jpg:quality=3", "did you mean 'jpeg'"),
        ("none:keep=1", "no option 'keep'"),
        ("blur:sigma=big", "sigma needs a number"),
    ],
)
def test_specs_that_cannot_be(spec, message):
    with pytest.raises(FedveilError, match=message):
        parse_defense(spec)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("jpeg:quality=50", (1, 2, 8, 8), "grey or RGB"),
        ("blur:sigma=3", (1, 1, 8, 8), "needs images of more than 9 pixels"),
        ("down:factor=9", (1, 1, 8, 8), "larger than images"),
    ],
)
def test_images_that_do_not_fit(spec, shape, message):
    with pytest.raises(FedveilError, match=message):
        parse_defense(spec).transform(torch.rand(shape))
