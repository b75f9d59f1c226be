import dataclasses

import pytest
import torch
from torch import nn

from fedveil.attacks.inversion import FullyConnected
from fedveil.audit.metrics import exact, match
from fedveil.defenses import BlockDCT, Clipping, Pruning
from fedveil.errors import FedveilError
from fedveil.models import CNN, Imprint
from fedveil.models.normalise import Normalise
from tests.attacks.inversion.conftest import CLASSES, observe, psnr, sanitised

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


def test_one_image_of_a_pruned_update_is_divided_out_of_what_was_sent(photos):
    """The naive attacker takes a pruned entry for a zero and mixes it with those that were sent."""
    seen = sanitised(observe(_mlp(32), photos[:4], LABELS[:4]), Pruning(share=0.7))
    naive = _found(dataclasses.replace(seen, sanitizer=None), photos[:4])
    aware = _found(seen, photos[:4])
    sent = (seen.gradients["2.weight"] != 0).any(dim=1).reshape(photos[:4].shape)
    assert sent.double().mean() > 0.5
    assert (aware - photos[:4])[sent].abs().max() < 1e-4
    assert (naive - photos[:4])[sent].abs().max() > 0.01
    assert (aware[~sent] == 0.5).all()


def test_pixels_that_a_reading_lost_come_from_those_that_agree(photos):
    images = photos[[0, 3, 4, 7]]
    seen = sanitised(observe(_mlp(256), images, LABELS[[0, 3, 4, 7]], batch=2), Pruning(share=0.7))
    naive = psnr(_found(dataclasses.replace(seen, sanitizer=None), images), images)
    aware = psnr(_found(seen, images), images)
    assert (aware > naive - 1e-6).all()
    assert aware.mean() > naive.mean() + 10


def test_differences_of_pruned_rows_are_of_what_both_sent(photos):
    torch.manual_seed(0)
    model = Imprint(CNN(SHAPE, CLASSES), SHAPE, bins=2048, mean=0.5, deviation=0.3)
    update = observe(model, photos, LABELS, batch=8)
    assert exact(_found(sanitised(update, Pruning(share=0.1)), photos), photos).all()
    seen = sanitised(update, Pruning(share=0.5))
    naive = psnr(_found(dataclasses.replace(seen, sanitizer=None), photos), photos)
    assert (psnr(_found(seen, photos), photos) > naive).all()


def test_clipping_hides_nothing_and_the_loss_says_so(photos):
    seen = sanitised(observe(_mlp(32), photos[:2], LABELS[:2]), Clipping(norm=0.01))
    result = FullyConnected()(seen)
    assert exact(result.images[:, 0].float(), photos[:2]).all()
    assert (result.loss < 1e-8).all()
    assert (FullyConnected()(dataclasses.replace(seen, sanitizer=None)).loss > 0.5).all()


def test_who_knows_the_transformation_reads_its_images(photos):
    transform = BlockDCT(keep=6)
    trained = transform(photos[:2])
    seen = observe(_mlp(32), trained, LABELS[:2], knows=transform)
    noisy = {k: g + 0.01 * g.std() * torch.randn_like(g) for k, g in seen.gradients.items()}
    seen = dataclasses.replace(seen, gradients=noisy)
    aware = psnr(_found(seen, trained), trained)
    assert (aware > psnr(_found(dataclasses.replace(seen, knows=None), trained), trained) + 3).all()


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
