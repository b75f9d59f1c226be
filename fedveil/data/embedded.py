"""Datasets that come with scikit-learn: no download, no folder."""

from importlib.metadata import version

import torch
from torch import Tensor

from fedveil.data.images import Images
from fedveil.data.source import Decoded, Source

_PATCH = 32
_STRIDE = 16
# Columns of a photograph take turns: a band only training patches may touch, one only test patches.
_TRAIN_BAND = 128
_TEST_BAND = 32

_PHOTO_CLASSES = ("sky", "pavilion", "garden", "leaves", "dahlia")


def digits() -> Source:
    """Return 1,797 handwritten digits: grey, 8x8, values 0 to 16 stretched to 0 to 255.

    scikit-learn has no test split of them, so the seed draws one.
    """
    return Source(("digits", version("scikit-learn")), _read_digits)


def photos() -> Source:
    """Return 1,400 training and 200 test patches of two photographs: colour, 32x32.

    The class says what the centre of a patch shows: sky, pavilion or garden (lake and trees) of
    ``china.jpg``, leaves or dahlia of ``flower.jpg``. Patches are 16 pixels apart, so neighbours of
    one split share pixels, but the splits come from separate columns of the photographs and share
    none. Few and easy: made for demonstrations and for attacks, not to rank models.
    """
    return Source(("photos", version("scikit-learn")), _read_photos)


def _read_digits() -> Decoded:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    values = torch.from_numpy(bunch.images)
    raw = (values * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    return Decoded(Images(raw, labels), None, tuple(str(name) for name in bunch.target_names))


def _read_photos() -> Decoded:
    from sklearn.datasets import load_sample_image

    regions = {"china.jpg": _china, "flower.jpg": _flower}
    splits: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
    for file, region in regions.items():
        photo = torch.from_numpy(load_sample_image(file).copy()).permute(2, 0, 1)
        for test, parts in splits.items():
            corners = _corners(photo.shape[1], photo.shape[2], test=test)
            patches = [photo[:, y : y + _PATCH, x : x + _PATCH] for y, x in corners]
            names = [region(y + _PATCH // 2, x + _PATCH // 2) for y, x in corners]
            labels = torch.tensor([_PHOTO_CLASSES.index(name) for name in names])
            parts.append((torch.stack(patches), labels))
    train, test_images = (_join(splits[test]) for test in (False, True))
    return Decoded(train, test_images, _PHOTO_CLASSES)


def _corners(height: int, width: int, *, test: bool) -> list[tuple[int, int]]:
    """Return (top, left) of each patch that lies wholly within one band of its split."""
    period = _TRAIN_BAND + _TEST_BAND
    start, band = (_TRAIN_BAND, _TEST_BAND) if test else (0, _TRAIN_BAND)
    lefts = [
        left
        for origin in range(start, width, period)
        for left in range(origin, min(origin + band, width) - _PATCH + 1, _STRIDE)
    ]
    return [(top, left) for top in range(0, height - _PATCH + 1, _STRIDE) for left in lefts]


def _china(y: int, x: int) -> str:
    if 85 <= x <= 345 and 35 <= y <= 385:
        return "pavilion"
    return "sky" if y < 205 else "garden"


def _flower(y: int, x: int) -> str:
    return "dahlia" if (y - 220) ** 2 + (x - 307) ** 2 <= 135**2 else "leaves"


def _join(parts: list[tuple[Tensor, Tensor]]) -> Images:
    raw, labels = zip(*parts, strict=True)
    return Images(torch.cat(raw).contiguous(), torch.cat(labels))
