"""Feature maps against slow second implementations, and what pins them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedveil.analytic import AnalyticClassifier, Head, load_classifier, rows_of, steepness_for
from fedveil.data import load_dataset
from fedveil.errors import FedveilError
from fedveil.features import (
    DictionaryOptions,
    EfficientNetLite0,
    MapDescription,
    Mirrored,
    OwnFeatures,
    blocks_of_features,
    features_of,
    learn_dictionary,
    names_of,
    project,
    rebuild,
)

PLAIN = DictionaryOptions(filters=7, patch=3, stride=1, threshold=0.3, pool=2)


def photos(count=12, side=9):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def by_loops(dictionary, image):
    """One image's features from the words of the paper, a patch at a time."""
    how, pixels = dictionary.settings, image.double().numpy() / 255
    side = pixels.shape[1] - how.patch + 1
    filters, offset = (t.double().numpy() for t in (dictionary.filters, dictionary.offset))
    values = np.zeros((side, side, 2, how.filters))
    for row in range(side):
        for column in range(side):
            patch = pixels[:, row : row + how.patch, column : column + how.patch].ravel()
            patch = (patch - patch.mean()) / np.sqrt(patch.var() + 10 / 255**2)
            product = filters @ patch - offset
            values[row, column, 0] = np.maximum(0, product - how.threshold)
            values[row, column, 1] = np.maximum(0, -product - how.threshold)
    half = (side + 1) // 2
    cells = [
        values[r, c]
        for r in (slice(half), slice(-half, None))
        for c in (slice(half), slice(-half, None))
    ]
    return np.stack([cell.mean((0, 1)) for cell in cells], 1).ravel()


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("made_of", ["means", "noise", "patches"])
def test_a_dictionary_is_what_the_paper_says(side, made_of):
    images = photos(side=side)
    dictionary = learn_dictionary(images, replace(PLAIN, made_of=made_of), seed=1)
    found = features_of(dictionary, images)
    assert found.shape == (12, 7 * 8)
    for row, image in zip(found, images, strict=True):
        np.testing.assert_allclose(row, by_loops(dictionary, image), rtol=1e-4, atol=1e-5)


def test_filters_are_whitened():
    images = load_dataset("photos", seed=0).train.raw[:50]
    dictionary = learn_dictionary(images, replace(PLAIN, filters=2000, made_of="noise"), seed=0)
    patches = nn.functional.unfold(images.float() / 255, 3).transpose(1, 2).reshape(-1, 27)
    patches = patches - patches.mean(1, keepdim=True)
    patches = patches / (patches.square().mean(1, keepdim=True) + 10 / 255**2).sqrt()
    some = patches[torch.randperm(len(patches))[:20_000]]
    powers = (some @ dictionary.filters.T - dictionary.offset).square().mean(0)
    plain = (some @ nn.functional.normalize(torch.randn(2000, 27), dim=1).T).square().mean(0)
    # Of whitened patches every direction has about the same power, of others not.
    assert powers.std() / powers.mean() < 0.5 * plain.std() / plain.mean()


@pytest.mark.parametrize("side", [8, 9])
def test_an_image_and_its_mirror_image_have_the_same_features(side):
    images = photos(side=side)
    mirrored = learn_dictionary(images, replace(PLAIN, mirrored=True), seed=0)
    one, other = features_of(mirrored, images), features_of(mirrored, images.flip(3))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    plain = learn_dictionary(images, PLAIN, seed=0)
    assert not torch.allclose(
        features_of(plain, images), features_of(plain, images.flip(3)), rtol=1e-2
    )


def test_a_client_makes_the_very_map_it_is_told_of():
    images = photos()
    dictionary = learn_dictionary(images, PLAIN, seed=0)
    told = MapDescription.from_record(MapDescription.of(dictionary).to_record())
    made = rebuild(told, dictionary.sent())
    assert torch.equal(features_of(made, images), features_of(dictionary, images))
    bent = dictionary.filters.clone()
    bent[0, 0] += 1e-7
    with pytest.raises(FedveilError, match="another one here"):
        rebuild(told, {**dictionary.sent(), "filters": bent})
    with pytest.raises(FedveilError, match="another one here"):
        rebuild(replace(told, options=told.options.replace("0.3", "0.4")), dictionary.sent())
    with pytest.raises(FedveilError, match="cannot be read"):
        rebuild(told, {})
    with pytest.raises(FedveilError, match="unknown"):
        rebuild(replace(told, name="nobody's"), dictionary.sent())
    with pytest.raises(FedveilError, match="no JSON"):
        rebuild(replace(told, options="["), dictionary.sent())
    with pytest.raises(FedveilError, match="no feature map"):
        MapDescription.from_record({**told.to_record(), "dimension": 0})


@pytest.mark.parametrize(
    ("change", "names"), [({"patch": 10}, "patch"), ({"pool": 8}, "pool"), ({"filters": 0}, "filt")]
)
def test_options_out_of_range_are_named(change, names):
    with pytest.raises(FedveilError, match=names):
        learn_dictionary(photos(), replace(PLAIN, **change), seed=0)


def tiny(shape):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 5))


def unlike(shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 5))


def endless(shape):
    return nn.Sequential(nn.Flatten(), nn.Hardtanh(float("nan"), float("nan")))


def test_the_users_own_frozen_model():
    images = photos()
    own = OwnFeatures((3, 9, 9), f"{__name__}:tiny")
    assert own.dimension == 5
    told = MapDescription.of(own)
    assert torch.equal(features_of(rebuild(told, {}), images), features_of(own, images))
    with pytest.raises(FedveilError, match="another one here"):
        rebuild(MapDescription.of(OwnFeatures((3, 9, 9), f"{__name__}:unlike")), {})
    with pytest.raises(FedveilError, match="could not be imported"):
        OwnFeatures((3, 9, 9), f"{__name__}:missing")


def test_w_is_made_anew_from_its_state_alone():
    images = photos().float() / 255
    dictionary = learn_dictionary(images, PLAIN, seed=0)
    classifier = AnalyticClassifier(dictionary, 4)
    assert not classifier(images).any()  # what a client could make of what it is sent: nothing
    head = Head(torch.randn(4, 56).double(), torch.randn(4).double(), 1.0, 0.5)
    state = classifier.with_head(head, steepness=3.0)
    loaded = load_classifier(state)
    classifier.load_state_dict(state)
    assert torch.equal(loaded(images), classifier(images))
    assert loaded(images).any()
    with pytest.raises(FedveilError, match="no analytic"):
        load_classifier({"weight": head.weight})


def test_steepness_makes_scores_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert steepness_for(logits / 40, labels) == pytest.approx(40, rel=0.05)


def test_efficientnet_lite0_answers_as_its_publishers():
    network = EfficientNetLite0((3, 224, 224), 224)
    network.train()  # and it stays as it is
    found = network(torch.full((1, 3, 224, 224), 0.25))
    # From the package beside the weights, efficientnet-lite-pytorch 0.1.0, which gives the same
    # numbers bit for bit on random images of this size.
    assert float(found.detach().sum()) == pytest.approx(57.6801, abs=1e-2)
    assert float(found.detach().norm()) == pytest.approx(9.4191, abs=1e-3)
    small = EfficientNetLite0((1, 28, 28), 64)
    assert features_of(small, photos(2, 28)[:, :1]).shape == (2, 1280)
    assert MapDescription.of(network).digest != MapDescription.of(small).digest
    with pytest.raises(FedveilError, match="resolution"):
        EfficientNetLite0((3, 32, 32), 8)
    with pytest.raises(FedveilError, match="channels"):
        EfficientNetLite0((2, 32, 32))
    with pytest.raises(FedveilError, match="8 stages are out of range: give 1 to 7"):
        EfficientNetLite0((3, 32, 32), stages=8)


def test_stages_of_efficientnet_are_the_rectified_channels_in_which_they_end():
    network = EfficientNetLite0((3, 32, 32), 32, stages=3)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = network(pixels)
    means = []

    def layer(convolution, norm, values, *, stride=1, groups=1, rectify=True):
        kernel = convolution.kernel_size[0]
        missing = max((-(-values.shape[-1] // stride) - 1) * stride + kernel - values.shape[-1], 0)
        near, far = missing // 2, missing - missing // 2
        values = F.pad(values, (near, far, near, far))
        values = F.conv2d(values, convolution.weight, stride=stride, groups=groups)
        values = F.batch_norm(
            values, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3
        )
        return F.relu6(values) if rectify else values

    values = layer(*network.stem, (pixels - 0.498) / 0.502, stride=2)
    for number, block in enumerate(network.blocks):
        wide = values if block.expand is None else layer(*block.expand, values)
        if number in (11, 15):  # the first blocks of stages 6 and 7
            means.append(wide.mean((2, 3)))
        stride = 2 if number in (1, 3, 5, 11) else 1
        deep = layer(*block.depthwise, wide, stride=stride, groups=wide.shape[1])
        narrow = layer(*block.project, deep, rectify=False)
        values = narrow + values if narrow.shape == values.shape else narrow
    means.append(layer(*network.head, values).mean((2, 3)))
    wanted = torch.cat([mean.sqrt() / mean.sqrt().norm(dim=1, keepdim=True) for mean in means], 1)
    assert network.dimension == 3104 == 1280 + 6 * 192 + 6 * 112
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    told = MapDescription.of(network)
    assert MapDescription.of(rebuild(told, {})) == told


def test_a_mirrored_map_tells_an_image_and_its_mirror_image_alike():
    images = photos(30, 4)
    inner = OwnFeatures((3, 4, 4), "tests.features.test_features:flat_map")
    told = Mirrored(project(inner, features_of(inner, images), 5))
    description = MapDescription.of(told)
    again = rebuild(description, told.sent())
    assert names_of(description) == ("mirrored", "projected", inner.name)
    upright, mirrored = (features_of(again, some) for some in (images, images.flip(3)))
    assert upright.shape == (30, 10)
    torch.testing.assert_close(upright[:, :5], mirrored[:, :5])
    torch.testing.assert_close(upright[:, 5:], -mirrored[:, 5:])
    torch.testing.assert_close(upright.norm(dim=1), torch.ones(30))
    one, other = (F.normalize(told.inner(images.float() / 255)), upright)
    torch.testing.assert_close(one, other[:, :5] + other[:, 5:])
    with pytest.raises(FedveilError, match="never beneath another"):
        rebuild(MapDescription.of(Mirrored(told)), Mirrored(told).sent())


class Counted(OwnFeatures):
    """A slow map that counts the images it is asked about."""

    slow = True
    asked = 0

    def forward(self, pixels):
        Counted.asked += len(pixels)
        return super().forward(pixels)


def flat_map(shape):
    return nn.Flatten()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_whitening_takes_a_share_of_how_much_components_differ(share):
    images = photos(200, 4)
    inner = OwnFeatures((3, 4, 4), "tests.features.test_features:flat_map")
    found = features_of(inner, images)
    plain = features_of(project(inner, found, 6), images).double().var(0)
    told = features_of(project(inner, found, 6, whitening=share), images).double().var(0)
    assert torch.allclose(told / told[0], (plain / plain[0]) ** (1 - share), rtol=1e-4)
    with pytest.raises(FedveilError, match="whitening"):
        project(inner, found, 6, whitening=1.5)


def test_features_of_a_slow_map_are_kept_by_content_block_by_block(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDVEIL_CACHE", str(tmp_path))
    monkeypatch.setattr(Counted, "asked", 0)
    images = photos(1_100, 4)
    features = Counted((3, 4, 4), "tests.features.test_features:flat_map")
    blocks = blocks_of_features(features, images)
    next(blocks)  # and the process is killed
    assert Counted.asked == 500
    found = torch.cat(list(blocks_of_features(features, images)))
    assert Counted.asked == 1_100
    assert torch.equal(found, images.flatten(1).float() / 255)
    projected = project(features, found, 5)
    told = []
    rows = rows_of(projected, images, on_block=told.append)
    assert Counted.asked == 1_100
    assert told == [500, 1_000, 1_100]
    monkeypatch.setattr(Counted, "slow", False)
    assert torch.equal(rows, rows_of(projected, images))
    assert Counted.asked == 2_200
    direct = rows_of(Mirrored(projected), images)
    monkeypatch.setattr(Counted, "slow", True)
    assert torch.equal(direct, rows_of(Mirrored(projected), images))
    assert Counted.asked == 5_500
    monkeypatch.setattr(Counted, "slow", True)
    changed = images.clone()
    changed[700] = 0
    assert torch.equal(
        torch.cat(list(blocks_of_features(features, changed))), changed.flatten(1).float() / 255
    )
    assert Counted.asked == 6_000
    for entry in tmp_path.glob("*.safetensors"):
        entry.write_bytes(entry.read_bytes()[:-3] + b"xyz")
    assert torch.equal(torch.cat(list(blocks_of_features(features, images))), found)


def test_a_map_is_made_anew_of_other_images_where_it_is_made_of_images():
    first, others = photos(12), photos(30).flip(0)
    inner = learn_dictionary(first, PLAIN, seed=0)
    for made in (inner, Mirrored(inner), project(inner, features_of(inner, first), 5)):
        again = made.remade(others, seed=1)
        assert type(again) is type(made)
        assert again.settings == PLAIN if made is inner else again.inner.settings == PLAIN
        assert again.dimension == made.dimension
        beneath = again if made is inner else again.inner
        assert torch.equal(beneath.filters, learn_dictionary(others, PLAIN, seed=1).filters)
    fewer = project(inner, features_of(inner, first), 11).remade(others[:4], seed=0)
    assert fewer.dimension == 3


def test_a_public_map_is_made_of_no_images():
    public = OwnFeatures((3, 9, 9), f"{__name__}:tiny")
    assert public.remade(photos(), seed=0) is public
