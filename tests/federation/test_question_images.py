"""A public set of another kind, whose images clients answer."""

import pytest
import torch

from fedveil.errors import FedveilError
from fedveil.federation.question_images import in_shape, question_images
from fedveil.federation.server_app import load_job
from fedveil.runs.config import TrainConfig

SETTINGS = {"strategy": "protected", "dataset": "digits", "questions": "photos"}


def test_images_of_another_kind_are_brought_to_the_shape_of_the_clients():
    raw = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    grey = in_shape(raw, (1, 32, 32))
    assert (grey.float() - raw.float().mean(1, keepdim=True)).abs().max() <= 0.5
    small = in_shape(raw, (1, 8, 8))
    assert (small.shape, small.dtype) == ((5, 1, 8, 8), torch.uint8)
    assert abs(float(small.float().mean()) - float(raw.float().mean())) < 3
    assert torch.equal(in_shape(raw, (3, 32, 32)), raw)
    assert torch.equal(in_shape(grey, (3, 32, 32)), grey.expand(-1, 3, -1, -1))


def test_a_run_asks_about_as_many_of_them_as_it_calibrates_on():
    job = load_job(TrainConfig.check(SETTINGS | {"calibration_images": 50}))
    asked = question_images(job)
    assert asked.shape == (50, 1, 8, 8)
    assert torch.equal(asked, question_images(job))
    own = load_job(TrainConfig.check({"strategy": "protected", "dataset": "digits"}))
    assert question_images(own) is own.evaluation.calibration.raw


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"questions": "digits"}, "the clients' own data"),
        ({"label_share": 0.5}, "takes their place"),
        ({"strategy": "fedavg"}, "questions is of strategy protected"),
    ],
)
def test_questions_that_cannot_be_are_refused(change, says):
    with pytest.raises(FedveilError, match=says):
        TrainConfig.check(SETTINGS | change)
