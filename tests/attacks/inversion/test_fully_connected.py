import pytest
import torch
from torch import nn

from fedveil.attacks.inversion import FullyConnected
from fedveil.audit.metrics import exact, match
from fedveil.errors import FedveilError
from fedveil.models import CNN, Imprint
from fedveil.models.normalise import Normalise
from tests.attacks.inversion.conftest import CLASSES, observe

SHAPE = (3, 16, 16)
LABELS = torch.tensor([3, 0, 9, 3, 1, 2, 7, 5])


def _mlp(hidden):
    torch.manual_seed(0)
    return nn.Sequential(
        Normalise(), nn.Flatten(), nn.Linear(768, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )


def _found(seen, images):
    result = FullyConnected()(seen)
    batches = images.split(seen.images)
    pairs = zip(result.images.float(), batches, strict=True)
    return torch.cat([match(found, own) for found, own in pairs])


def test_one_image_is_divided_out_exactly(photos):
    seen = observe(_mlp(32), photos, LABELS)
    assert exact(_found(seen, photos), photos).all()
    result = FullyConnected()(seen)
    assert torch.equal(result.labels[:, 0], LABELS)
    assert (result.loss < 1e-8).all()
    assert (result.iterations == 0).all()


def test_neurons_that_fire_for_one_image_agree(photos):
    """Of two images some neurons see one alone; that they agree tells them from the mixtures."""
    images = photos[[0, 3, 4, 7]]
    seen = observe(_mlp(256), images, LABELS[[0, 3, 4, 7]], batch=2)
    assert exact(_found(seen, images), images).all()


def test_an_imprint_gives_the_images_of_a_batch(photos):
    torch.manual_seed(0)
    bins = photos.mean((1, 2, 3)).sort().values
    assert (bins.diff() > 1e-3).all()
    model = Imprint(CNN(SHAPE, CLASSES), SHAPE, bins=2048, mean=0.5, deviation=0.3)
    seen = observe(model, photos, LABELS, batch=8)
    assert exact(_found(seen, photos), photos).all()
    coarse = Imprint(CNN(SHAPE, CLASSES), SHAPE, bins=3, mean=0.5, deviation=0.3)
    assert not exact(_found(observe(coarse, photos, LABELS, batch=8), photos), photos).all()


def test_an_imprinted_model_sees_nearly_the_image(photos):
    torch.manual_seed(0)
    inner = CNN(SHAPE, CLASSES)
    model = Imprint(inner, SHAPE)
    assert torch.allclose(model(photos), inner(photos), atol=0.1)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: CNN(SHAPE, CLASSES), r"first layer body\.0 \(Conv2d\) is no linear layer"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES, bias=False)),
            "no linear layer with a bias",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Sigmoid(), nn.Linear(768, CLASSES)),
            "more than each pixel scaled and shifted",
        ),
        (
            lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(192, CLASSES)),
            "more than each pixel scaled and shifted",
        ),
    ],
)
def test_models_it_does_not_read(model, words, photos):
    with pytest.raises(FedveilError, match=words):
        FullyConnected()(observe(model(), photos[:1], LABELS[:1]))
