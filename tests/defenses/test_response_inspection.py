import pytest
import torch
from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedveil.attacks.inversion import bait, binned
from fedveil.data import load_dataset
from fedveil.defenses.model_inspection import ModelInspection, inspect_model
from fedveil.defenses.response_inspection import ResponseInspection
from fedveil.errors import FedveilError
from fedveil.models import MODELS, MnistCNN, build_model
from tests.defenses.test_model_inspection import _message

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def own():
    images = load_dataset("digits").train[torch.arange(32)]
    return images.pixels


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("imprint")])
def test_fresh_models_pass(name, own):
    model = build_model(name, SHAPE, 10, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training = model.training
    assert ResponseInspection().objection(model, own) is None
    assert model.training == training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_head_that_fishes_is_seen_by_whoever_is_not_fished_for(noise, own):
    model = bait(build_model("cnn", SHAPE, 10, seed=0), SHAPE, 7, noise=noise)
    assert ModelInspection()(model.state_dict()) == ()
    reason = ResponseInspection().objection(model, own)
    assert reason is not None
    assert "one class reaches this client's images" in reason


def test_a_head_whose_other_rows_are_all_alike_is_seen_too(own):
    """What all classes share moves nothing, so it disguises nothing."""
    model = bait(build_model("cnn", SHAPE, 10, seed=0), SHAPE, 7, noise=0.05)
    with torch.no_grad():
        model.output.weight += torch.randn(model.output.weight.shape[1])
    assert ResponseInspection().objection(model, own) is not None


def test_dominance_is_that_of_a_closed_form(own):
    """Of one linear layer the gradient of a centred logit is its row less their mean."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 10)
    with torch.no_grad():
        layer.weight[3] *= 5
    lengths = (layer.weight - layer.weight.mean(dim=0)).norm(dim=1).detach()
    wanted = float(lengths.max() / lengths.median())
    seen = ResponseInspection()(nn.Sequential(nn.Flatten(), layer), own)
    assert seen.dominance == pytest.approx(wanted, rel=1e-4)


def test_disturbed_bins_pass_the_weights_and_not_the_trial(own):
    torch.manual_seed(0)
    model = binned(MnistCNN(SHAPE, 10), SHAPE, own, noise=1.2)
    assert ModelInspection()(model.state_dict()) == ()
    reason = ResponseInspection(correlation=0.9).objection(model, own)
    assert reason is not None
    assert "outputs of layer hidden say the same" in reason


def test_too_few_images_are_refused(own):
    with pytest.raises(FedveilError, match="give at least 16"):
        ResponseInspection()(build_model("cnn", SHAPE, 10, seed=0), own[:15])


def test_the_mod_tries_what_it_was_sent_on_the_clients_images(own):
    trained = []
    fresh = build_model("cnn", SHAPE, 10, seed=1)
    app = ClientApp(mods=[inspect_model(own=lambda _context: (fresh, own))])

    @app.train()
    def train(message, _context):
        trained.append(message)
        return Message(RecordDict({"m": MetricRecord({"n": 1})}), reply_to=message)

    context = Context(0, 0, {}, RecordDict(), {})
    honest = build_model("cnn", SHAPE, 10, seed=0)
    assert not app(_message(honest, MessageType.TRAIN), context).has_error()
    reply = app(_message(bait(honest, SHAPE, 3), MessageType.TRAIN), context)
    assert reply.has_error()
    assert "would be of that class's images alone" in reply.error.reason
    assert len(trained) == 1
