"""What is said before the first round, and of too little data."""

import numpy as np
import pytest
from PIL import Image

from fedveil.errors import FedveilError
from fedveil.federation.server_app import outlook, prepare_job
from fedveil.runs.config import TrainConfig


def _folder(root, images):
    random = np.random.default_rng(0)
    for number in range(images):
        path = root / f"{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return str(root)


@pytest.mark.parametrize(
    ("clients", "partition", "words"),
    [
        (5, "iid", "320 training images: 64 a client; 5 of 5 clients a round; 40 images to cal"),
        (40, "iid", "320 training images: 8 a client; 10 of 40 clients a round (--fraction 1 a"),
        (100, "iid", "320 training images: 3 to 4 a client; 10 of 100 clients a round (--frac"),
        (1, "iid", "320 training images: 320 a client; 1 of 1 client a round; 40 images to cal"),
    ],
)
def test_the_first_line_says_what_a_round_will_be(tmp_path, clients, partition, words):
    job = prepare_job(
        TrainConfig(
            dataset=_folder(tmp_path, 400), clients=clients, partition=partition, strategy="fedavg"
        )
    )
    assert words in outlook(job)
    assert outlook(job).startswith("4 classes, ")
    assert outlook(job).endswith("40 images to calibrate on, 40 to report on")


def test_too_few_test_images_are_told_what_would_do(tmp_path):
    name = _folder(tmp_path, 160)
    with pytest.raises(FedveilError, match=f"has 32 images.*--dataset {name}@1/3") as refusal:
        prepare_job(TrainConfig(dataset=name, clients=5))
    advised = str(refusal.value).rpartition("--dataset ")[2]
    assert len(prepare_job(TrainConfig(dataset=advised, clients=5)).dataset.test) >= 40


def test_far_too_few_images_are_told_how_many_are_needed(tmp_path):
    with pytest.raises(FedveilError, match="add images: 80 for training"):
        prepare_job(TrainConfig(dataset=_folder(tmp_path, 60), clients=5))
