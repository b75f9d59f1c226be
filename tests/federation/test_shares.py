import pytest
import torch
from flwr.app import ArrayRecord, Context, MessageType, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from torch import nn

from fedveil.data import Images, load_dataset
from fedveil.data.partition import Iid, partition
from fedveil.defenses import BlockDCT, Defense
from fedveil.federation import client_app
from fedveil.federation.client_app import app
from fedveil.federation.shares import KeptShares, is_fixed, transformed
from fedveil.federation.task import ClientTask
from fedveil.federation.training import train_locally
from fedveil.models import build_model

CLIENTS = 30
TASK = ClientTask(
    dataset="photos",
    partition="iid",
    defense="dct:keep=3",
    model="lenet",
    epochs=2,
    batch_size=8,
    learning_rate=0.1,
    seed=4,
    server_round=1,
)


class Halved(nn.Module):
    """Random for all that the client app knows: it does not claim to be fixed."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return images / 2


@pytest.fixture
def dataset():
    return load_dataset("photos", seed=TASK.seed)


@pytest.fixture
def kept(monkeypatch):
    store = KeptShares(limit=2**24)
    monkeypatch.setattr(client_app, "_kept", store)
    return store


def _own(dataset, client):
    shares = partition(dataset.train.labels, clients=CLIENTS, scheme=Iid(), seed=TASK.seed)
    return dataset.train[shares[client]]


def _model(dataset):
    return build_model("lenet", dataset.shape, len(dataset.classes), seed=0)


def _trained(dataset, client, kind=MessageType.TRAIN, task=TASK):
    metadata = Metadata(0, "", 0, 0, "", "", 0.0, 1e12, kind, 0, None)
    content = RecordDict(
        {"arrays": ArrayRecord(_model(dataset).state_dict()), "config": task.to_record()}
    )
    content["config"]["server-round"] = task.server_round
    node = {"partition-id": client, "num-partitions": CLIENTS}
    reply = app(make_message(metadata, content), Context(0, 0, node, RecordDict(), {}))
    return reply.content["arrays"].to_torch_state_dict()


def _expected(dataset, client, transform):
    model = _model(dataset)
    generator = client_app._shuffler(TASK.seed, TASK.server_round, client)
    own = transformed(_own(dataset, client), transform)
    train_locally(model, own, TASK.training, generator=generator)
    return model.state_dict()


def test_the_client_trains_on_its_transformed_images_whether_kept_or_not(dataset, kept):
    first, second = _trained(dataset, 2), _trained(dataset, 2)
    for name, value in _expected(dataset, 2, BlockDCT(keep=3)).items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(first[name], second[name])
    plain = _trained(dataset, 2, task=TASK.model_copy(update={"defense": "none"}))
    assert any(not torch.allclose(plain[name], first[name], atol=1e-4) for name in first)


def test_the_gradient_is_of_transformed_images(dataset, kept):
    sent = _trained(dataset, 2, "train.gradient")
    model, own = _model(dataset), _own(dataset, 2)
    batch = own[client_app.fedsgd_batch(len(own), TASK, client=2)]
    loss = nn.functional.cross_entropy(model(BlockDCT(keep=3)(batch.pixels)), batch.labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(sent[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_transformation_that_is_not_fixed_is_applied_in_every_step(dataset, kept, monkeypatch):
    halved = Halved()
    monkeypatch.setattr(client_app, "_defense", lambda text: Defense("halved", transform=halved))
    sent = _trained(dataset, 2)
    images = len(_own(dataset, 2))
    # Before the steps come looks at the model itself, and at the memory layout it bears.
    steps = halved.batches[-2 * -(-images // 8) :]
    assert steps[:2] == [8, 8]
    assert sum(steps) == 2 * images
    for name, value in _expected(dataset, 2, Halved()).items():
        torch.testing.assert_close(sent[name], value, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_made_anew_and_pushes_nothing_out():
    made = []

    def share(client):
        made.append(client)
        return Images(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64))  # 64 bytes

    store = KeptShares(limit=150)
    for client in (0, 1, 2, 0, 1, 2):
        store.get("one", client, lambda client=client: share(client))
    assert made == [0, 1, 2, 2]
    store.get("another", 0, lambda: share(0))
    store.get("one", 0, lambda: share(0))
    assert made == [0, 1, 2, 2, 0, 0]


def test_blocks_make_no_difference(monkeypatch):
    raw = torch.randint(0, 256, (25, 3, 16, 16), dtype=torch.uint8)
    images = Images(raw, torch.arange(25))
    whole = BlockDCT(keep=6)(images.pixels)
    monkeypatch.setattr("fedveil.federation.shares._BLOCK", 10)
    parts = transformed(images, BlockDCT(keep=6))
    torch.testing.assert_close(parts.pixels, whole)
    assert torch.equal(parts.labels, images.labels)
    assert torch.equal(images[:3].pixels, raw[:3] / 255)


def test_only_a_transformation_that_says_so_is_fixed():
    assert is_fixed(BlockDCT(keep=1))
    assert not is_fixed(Halved())
