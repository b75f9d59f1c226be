import dataclasses

import pytest
import torch
from torch import nn

from fedveil.attacks.inversion import Fishing, LatentBins, bait, binned, build_attack
from fedveil.audit.metrics import exact, match
from fedveil.errors import FedveilError
from fedveil.models import CNN, LeNet, MnistCNN
from fedveil.models.normalise import Normalise
from tests.attacks.inversion.conftest import CLASSES, observe, psnr

SHAPE = (3, 16, 16)
LABELS = torch.tensor([3, 0, 9, 3, 1, 2, 7, 5])
ONCE = 2  # the place of class 9, which is there once


def test_the_one_image_of_a_class_is_fished_out_of_a_batch_exactly(lenet, photos):
    seen = observe(bait(lenet, SHAPE, 9), photos, LABELS, batch=8)
    result = Fishing()(seen)
    assert result.untold is not None
    assert not result.untold.any()
    assert exact(result.images[0, :1].float(), photos[ONCE : ONCE + 1]).all()
    assert result.loss[0] < 1e-7


def test_what_is_caught_is_counted_by_what_the_server_sees(lenet, photos):
    """Class 3 is there twice and class 6 not at all: grey, and no answer."""
    for target in (3, 6):
        result = Fishing()(observe(bait(lenet, SHAPE, target), photos, LABELS, batch=8))
        assert result.untold is not None
        assert result.untold.all()
        assert (result.images == 0.5).all()


def test_bait_leaves_the_model_and_the_layers_before_its_head_alone(lenet):
    before = {name: value.clone() for name, value in lenet.state_dict().items()}
    baited = bait(lenet, SHAPE, 4)
    assert all(torch.equal(value, before[name]) for name, value in lenet.state_dict().items())
    changed = {n for n, value in baited.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"fc.weight", "fc.bias"}
    assert torch.equal(baited.fc.weight[4], lenet.fc.weight[4])


def test_other_images_hardly_move_what_is_before_a_baited_head(photos):
    torch.manual_seed(0)
    model = bait(CNN(SHAPE, CLASSES), SHAPE, 9)
    alone = observe(model, photos[ONCE : ONCE + 1], LABELS[ONCE : ONCE + 1]).gradients
    together = observe(model, photos, LABELS, batch=8).gradients
    for name in set(alone) - {"output.weight", "output.bias"}:
        assert torch.allclose(8 * together[name], alone[name], atol=1e-6), name


def test_who_fishes_nothing_is_told(lenet, photos):
    with pytest.raises(FedveilError, match="no row of its head fc stands out"):
        Fishing()(observe(lenet, photos, LABELS, batch=8))
    with pytest.raises(FedveilError, match="target=10 is no class"):
        bait(lenet, SHAPE, 10)


def test_making_a_class_unlikely_is_enough_to_read_what_its_image_gave_the_head(photos):
    """No row is touched, so no inspection of rows or of what they do to images can see it."""
    torch.manual_seed(0)
    model = CNN(SHAPE, CLASSES)
    with torch.no_grad():
        model.output.bias[9] = -30
    gradients = observe(model, photos, LABELS, batch=8).gradients
    read = gradients["output.weight"][0, 9] / gradients["output.bias"][0, 9]
    given: list[torch.Tensor] = []
    model.output.register_forward_pre_hook(lambda _m, inputs: given.append(inputs[0].detach()))
    model(photos)
    assert torch.allclose(read, given[0][ONCE], atol=1e-5)


def test_a_search_inverts_what_was_caught_from_a_network_with_relus(photos):
    torch.manual_seed(0)
    seen = observe(bait(CNN(SHAPE, CLASSES), SHAPE, 9), photos, LABELS, batch=8)
    attack = build_attack("fish-ig")
    attack = dataclasses.replace(attack, then=dataclasses.replace(attack.then, steps=300))
    own = psnr(attack(seen).images[0, :1].float(), photos[ONCE : ONCE + 1])
    others = psnr(photos, photos[ONCE : ONCE + 1].expand_as(photos))
    assert own[0] > others[torch.arange(8) != ONCE].max() + 2


def _wide():
    torch.manual_seed(0)
    return nn.Sequential(
        Normalise(), nn.Flatten(), nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, CLASSES)
    )


def _public(photos):
    """Stretched and mixed photographs, whose quantiles are as dense as a larger set's."""
    mixed = torch.rand(600, 8, generator=torch.Generator().manual_seed(1)).pow(4) @ photos.flatten(
        1
    )
    return (mixed / mixed.mean() * photos.mean()).reshape(-1, *SHAPE).clamp(0, 1)


def _bins(model, layer, photos):
    """The bin of each image, by how many neurons fire for it."""
    fired = []
    hook = layer.register_forward_hook(lambda _m, _i, output: fired.append(output > 0))
    model(photos)
    hook.remove()
    assert (fired[0].long().diff(dim=1) <= 0).all(), "an image fires up to its own bin"
    return fired[0].sum(dim=1)


def test_images_alone_in_their_bins_come_back_from_a_sum(photos):
    model = binned(_wide(), SHAPE, _public(photos))
    bins = _bins(model, model[2], photos)
    alone = ((bins[:, None] == bins).sum(dim=1) == 1) & (bins > 0)  # below all none fires
    assert alone.sum() >= 4
    result = LatentBins(steps=600, smoothness=0.0)(observe(model, photos, LABELS, batch=8))
    found = match(result.images[0], photos)
    assert exact(found, photos)[alone].all()
    order = torch.cdist(photos.flatten(1), result.images[0].flatten(1)).argmin(dim=1)
    assert torch.equal(result.labels[0][order][alone], LABELS[alone])


def test_bins_are_in_order_and_see_convolved_images(photos):
    torch.manual_seed(0)
    model = binned(MnistCNN(SHAPE, CLASSES), SHAPE, _public(photos))
    assert len(_bins(model, model.hidden, photos).unique()) >= 6


def test_bins_need_a_relu_between_two_linear_layers(photos):
    with pytest.raises(FedveilError, match="does not end in a linear layer, a ReLU"):
        binned(LeNet(SHAPE, CLASSES), SHAPE, photos)
