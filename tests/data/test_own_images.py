"""One party's own folder of images, in a federation that numbers the classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedveil.data import load_own_images
from fedveil.errors import FedveilError

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("train/owl/1.png", "train/owl/2.png", "train/dog/3.png", "test/owl/4.png"):
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return tmp_path / "site"


def test_every_image_is_there_under_the_federations_labels(folder):
    images = load_own_images(str(folder), classes=CLASSES, shape=(1, 8, 8))
    expected = {}
    for path in folder.rglob("*.png"):
        expected[np.asarray(Image.open(path)).tobytes()] = CLASSES.index(path.parent.name)
    found = {
        image[0].numpy().tobytes(): int(label)
        for image, label in zip(images.raw, images.labels, strict=True)
    }
    assert found == expected
    assert len(images) == 4


def test_one_class_alone_keeps_its_number(folder):
    images = load_own_images(str(folder / "test"), classes=CLASSES, shape=(1, 8, 8))
    assert images.labels.tolist() == [2]


def test_grey_images_stand_in_for_colour(folder):
    grey = load_own_images(str(folder), classes=CLASSES, shape=(1, 8, 8))
    colour = load_own_images(str(folder), classes=CLASSES, shape=(3, 8, 8))
    assert torch.equal(colour.raw, grey.raw.repeat(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("classes", "shape", "words"),
    [
        (("cat", "dog"), (1, 8, 8), "'owl', which is no class"),
        (CLASSES, (1, 28, 28), "are 8x8 with 1 channel, those of the federation 28x28"),
    ],
)
def test_what_does_not_fit_is_named(folder, classes, shape, words):
    with pytest.raises(FedveilError, match=words):
        load_own_images(str(folder), classes=classes, shape=shape)


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FedveilError, match="does not exist"):
        load_own_images(str(tmp_path / "no"), classes=CLASSES, shape=(1, 8, 8))
