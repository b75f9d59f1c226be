import pytest
import torch
from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from torch import nn

from fedveil.defenses import BlockDCT
from fedveil.defenses.mods import transform_inputs

IMAGES = torch.rand(2, 3, 16, 16)


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.inner(images)


def _message(kind):
    metadata = Metadata(0, "", 0, 0, "", "", 0.0, 1e12, kind, 0, None)
    return make_message(metadata, RecordDict({"m": MetricRecord({"n": 1})}))


def _app(model, mods, own_mods=None):
    app = ClientApp(mods=mods)

    def use(message, context):
        model(IMAGES)
        model(IMAGES)
        return Message(RecordDict({"m": MetricRecord({"n": 1})}), reply_to=message)

    app.train(mods=own_mods)(use)
    app.evaluate()(use)
    return app


def _context():
    return Context(0, 0, {}, RecordDict(), {})


@pytest.mark.parametrize("place", ["app", "train"])
def test_model_trains_on_transformed_images(place):
    model, transform = Recorder(), BlockDCT(keep=3)
    mod = [transform_inputs(transform)]
    app = _app(model, mod if place == "app" else [], mod if place == "train" else None)
    app(_message(MessageType.TRAIN), _context())
    assert len(model.seen) == 2
    for seen in model.seen:
        assert torch.equal(seen, transform(IMAGES))


def test_evaluation_sees_the_images_as_they_are():
    model = Recorder()
    app = _app(model, [transform_inputs(BlockDCT(keep=3))])
    app(_message(MessageType.EVALUATE), _context())
    assert torch.equal(model.seen[0], IMAGES)


def test_leaves_nothing_behind_even_after_an_error():
    model = Recorder()
    app = ClientApp(mods=[transform_inputs(BlockDCT(keep=3))])

    @app.train()
    def train(message, context):
        model(torch.zeros(1, 5, 16, 16))

    with pytest.raises(RuntimeError):
        app(_message(MessageType.TRAIN), _context())
    model.seen.clear()
    model(IMAGES)
    assert torch.equal(model.seen[0], IMAGES)


def test_recovers_its_place_when_the_app_catches_an_error():
    model, transform = Recorder(), BlockDCT(keep=3)
    app = ClientApp(mods=[transform_inputs(transform)])

    @app.train()
    def train(message, context):
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 5, 16, 16))
        model(IMAGES)
        return Message(RecordDict({"m": MetricRecord({"n": 1})}), reply_to=message)

    app(_message("train.twice".replace(".twice", "")), _context())
    assert torch.equal(model.seen[-1], transform(IMAGES))


def test_other_inputs_are_left_alone():
    seen = []
    linear = nn.Linear(4, 2)
    linear.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    app = ClientApp(mods=[transform_inputs(BlockDCT(keep=3))])
    table = torch.rand(3, 4)

    @app.train()
    def train(message, context):
        linear(table)
        return Message(RecordDict({"m": MetricRecord({"n": 1})}), reply_to=message)

    app(_message(MessageType.TRAIN), _context())
    assert seen[0] is table
