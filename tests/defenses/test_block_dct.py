import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn, idctn
from torch import nn

from fedveil.defenses import BlockDCT, dct_matrix, parse_defense, zigzag_mask
from fedveil.errors import FedveilError


def _reference(image, mask):
    block = len(mask)
    result = image.clone()
    for top in range(0, image.shape[-2], block):
        for left in range(0, image.shape[-1], block):
            part = image[..., top : top + block, left : left + block].numpy()
            found = dctn(part, axes=(-2, -1), norm="ortho") * mask.numpy()
            back = torch.from_numpy(idctn(found, axes=(-2, -1), norm="ortho"))
            result[..., top : top + block, left : left + block] = back
    return result


@given(
    block=st.sampled_from([1, 2, 4, 8, 16]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_agrees_with_scipy(block, rows, columns, data):
    keep = data.draw(st.integers(1, block * block))
    images = torch.rand(2, 3, rows * block, columns * block, dtype=torch.float64)
    transform = BlockDCT(keep=keep, block=block)
    assert torch.allclose(transform(images), _reference(images, transform.mask), atol=1e-12)


@given(bits=st.lists(st.booleans(), min_size=16, max_size=16).filter(any))
@settings(max_examples=40, deadline=None)
def test_any_mask_is_an_orthogonal_projection(bits):
    transform = BlockDCT(mask=torch.tensor(bits).reshape(4, 4), block=4)
    x, y = torch.rand(2, 1, 8, 12, dtype=torch.float64)
    once = transform(x)
    assert torch.allclose(transform(once), once, atol=1e-12)
    assert torch.allclose((transform(x) * y).sum(), (x * transform(y)).sum())
    lost = (x - once).square().sum()
    assert torch.allclose(once.square().sum() + lost, x.square().sum())


@given(skip=st.integers(1, 15), more=st.integers(1, 15))
@settings(max_examples=40, deadline=None)
def test_what_is_skipped_is_the_rest(skip, more):
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    low, high = BlockDCT(keep=skip, block=4), BlockDCT(skip=skip, block=4)
    assert torch.allclose(low(images) + high(images), images, atol=1e-12)
    assert high.strength == pytest.approx(1 - low.strength)
    if more > skip:
        band = BlockDCT(keep=more, skip=skip, block=4)
        assert torch.allclose(band(images), BlockDCT(keep=more, block=4)(high(images)), atol=1e-12)


def test_all_coefficients_give_the_image_back():
    images = torch.rand(3, 3, 32, 32)
    assert torch.allclose(BlockDCT(keep=64)(images), images, atol=1e-5)


def test_matrix_is_the_papers():
    matrix = dct_matrix(8)
    assert torch.allclose(matrix @ matrix.T, torch.eye(8, dtype=torch.float64), atol=1e-14)
    assert matrix[0, 3] == pytest.approx((1 / 8) ** 0.5)
    assert matrix[2, 1] == pytest.approx(0.5 * torch.cos(torch.tensor(6 * torch.pi / 16)).item())


def test_zigzag_starts_as_in_jpeg():
    order = []
    for keep in range(1, 11):
        fresh = zigzag_mask(keep) & ~(zigzag_mask(keep - 1) if keep > 1 else zigzag_mask(64) ^ True)
        order.append(tuple(torch.nonzero(fresh)[0].tolist()))
    assert order == [
        (0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0),
    ]  # fmt: skip


def test_cutoff_keeps_low_frequencies():
    mask = BlockDCT(cutoff=0.3).mask
    assert mask[0, 2]
    assert mask[1, 2]
    assert not mask[0, 3]
    assert not mask[2, 2]


@pytest.mark.parametrize("size", [(30, 32), (32, 29), (9, 13)])
def test_other_sizes_are_padded_by_reflection_and_cropped(size):
    height, width = size
    images = torch.rand(2, 3, height, width, dtype=torch.float64)
    transform = BlockDCT(keep=10)
    padded = nn.functional.pad(images, (0, -width % 8, 0, -height % 8), mode="reflect")
    expected = _reference(padded, transform.mask)[..., :height, :width]
    assert torch.allclose(transform(images), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_dtype_and_leading_dimensions(dtype):
    transform = BlockDCT(keep=5)
    assert transform(torch.rand(8, 8, dtype=dtype)).dtype == dtype
    assert transform(torch.rand(2, 5, 3, 16, 24, dtype=dtype)).shape == (2, 5, 3, 16, 24)


def test_takes_views_that_are_not_contiguous():
    images = torch.rand(2, 32, 32, 3, dtype=torch.float64).permute(0, 3, 1, 2)
    transform = BlockDCT(keep=6)
    assert torch.allclose(transform(images), transform(images.contiguous()))


def test_is_differentiable():
    images = torch.rand(1, 1, 8, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(BlockDCT(keep=7), (images,))
    assert torch.autograd.gradgradcheck(BlockDCT(keep=7), (images,))


def test_works_under_vmap():
    images = torch.rand(3, 2, 8, 8)
    transform = BlockDCT(keep=7)
    assert torch.allclose(torch.func.vmap(transform)(images), transform(images), atol=1e-6)


def test_many_images_are_handled_in_parts():
    images = torch.rand(400, 1, 32, 32, dtype=torch.float64)
    transform = BlockDCT(keep=5)
    together = transform(images)
    assert torch.allclose(together[::100], transform(images[::100]))
    assert torch.allclose(transform(images.requires_grad_()), together)
    energy = torch.func.grad(lambda x: transform(x).square().sum() / 2)(images.detach())
    assert torch.allclose(energy, together)


def test_coefficients_and_back():
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    transform = BlockDCT(keep=9)
    found = transform.coefficients(images)
    assert found.shape == (2, 3, 2, 3, 8, 8)
    assert torch.allclose(transform.from_coefficients(found), images)
    assert torch.allclose(transform.from_coefficients(found * transform.mask), transform(images))


def test_ycbcr_keeps_grey_and_drops_colour_detail():
    transform = BlockDCT(keep=64, chroma_keep=1)
    grey = torch.rand(1, 1, 16, 16, dtype=torch.float64).expand(1, 3, 16, 16)
    assert torch.allclose(transform(grey), grey, atol=1e-5)
    colour = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    once = transform(colour)
    assert not torch.allclose(once, colour, atol=1e-2)
    assert torch.allclose(transform(once), once, atol=1e-9)


def test_commutes_with_normalisation_by_channel():
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    scale, shift = torch.tensor([2.0, 3.0, 4.0])[:, None, None], torch.randn(3, 1, 1)
    transform = BlockDCT(keep=6)
    assert torch.allclose(transform(images * scale + shift), transform(images) * scale + shift)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockDCT(keep=0), "keep=0 is out of range"),
        (lambda: BlockDCT(keep=65), "1 to 64"),
        (lambda: BlockDCT(mask=torch.ones(4, 4)), "has shape \\(4, 4\\)"),
        (lambda: BlockDCT(mask=torch.zeros(8, 8)), "no coefficient would be kept"),
        (lambda: BlockDCT(), "exactly one"),
        (lambda: BlockDCT(skip=64), "skip=64 is out of range"),
        (lambda: BlockDCT(keep=3, skip=3), "no coefficient would be kept"),
        (lambda: BlockDCT(keep=9, skip=3, chroma_keep=2), "no coefficient would be kept"),
        (lambda: BlockDCT(keep=3, cutoff=0.5), "exactly one"),
        (lambda: BlockDCT(keep=1, block=0), "block=0"),
        (lambda: BlockDCT(keep=1)(torch.zeros(8, 8, dtype=torch.uint8)), "convert them to floats"),
        (lambda: BlockDCT(keep=1)(torch.full((8, 8), torch.nan)), "NaN"),
        (lambda: BlockDCT(keep=1)(torch.zeros(3, 4, 4)), "cannot be padded"),
        (lambda: BlockDCT(keep=1)(torch.zeros(8)), "height and a width"),
        (lambda: BlockDCT(keep=1, chroma_keep=1)(torch.zeros(1, 8, 8)), "RGB"),
        (lambda: parse_defense("dtc:keep=3"), "did you mean 'dct'"),
        (lambda: parse_defense("dct:kept=3"), "no option 'kept'"),
        (lambda: parse_defense("dct:keep=x"), "keep needs a whole number"),
        (lambda: parse_defense("dct:keep=99"), "keep=99 is out of range"),
        (lambda: parse_defense("dct"), "exactly one"),
    ],
)
def test_says_what_to_change(make, message):
    with pytest.raises(FedveilError, match=message):
        make()


def test_parses_what_the_command_line_takes():
    assert parse_defense("none").transform is None
    defense = parse_defense("dct:keep=21,block=4".replace("21", "9"))
    assert defense.label == "dct:keep=9,block=4"
    assert int(defense.transform.mask.sum()) == 9
