import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.defenses.model_inspection import ModelInspection, inspect_model
from fedveil.errors import FedveilError
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.roster import Sampling
from fedveil.federation.strategies.fedsgd import WatchingFedSGD
from fedveil.federation.task import ClientTask
from fedveil.models import CNN, MODELS, Imprint, build_model

SHAPE = (3, 16, 16)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("imprint")])
def test_fresh_models_pass(name):
    assert ModelInspection()(build_model(name, (3, 32, 32), 10, seed=0).state_dict()) == ()


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("imprint")])
def test_imprint_blocks_do_not(name):
    (found,) = ModelInspection()(build_model(name, (3, 32, 32), 10, seed=0).state_dict())
    assert (found.layer, found.rows, found.of) == ("measure", 128, 128)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    planted=st.integers(9, 40),
    honest=st.integers(0, 60),
    noise=st.floats(0, 0.3),
)
def test_planted_rows_are_found_wherever_and_however_scaled(seed, planted, honest, noise):
    torch.manual_seed(seed)
    direction = torch.randn(200)
    rows = direction + noise * torch.randn(planted, 200)
    scales = (torch.rand(planted) + 0.5) * torch.where(torch.rand(planted) < 0.5, -1, 1)
    thresholds = torch.arange(planted) / planted
    place = torch.randperm(planted + honest)
    weight = torch.cat([rows * scales[:, None], torch.randn(honest, 200)])[place]
    bias = torch.cat([thresholds * scales * 14, torch.randn(honest)])[place]
    state = {"deep.layer.weight": weight, "deep.layer.bias": bias}
    (found,) = ModelInspection()(state)
    assert (found.layer, found.rows, found.of) == ("deep.layer", planted, planted + honest)


def test_copies_of_a_neuron_are_no_measurement():
    """Rows that also share the threshold, as dead or duplicated neurons do, separate nothing."""
    row = torch.randn(1, 100)
    state = {"l.weight": row.expand(64, -1), "l.bias": torch.full((64,), 0.3)}
    assert ModelInspection()(state) == ()
    assert ModelInspection()({**state, "l.weight": torch.zeros(64, 100)}) == ()


def _message(model, kind):
    metadata = Metadata(0, "", 0, 0, "", "", 0.0, 1e12, kind, 0, None)
    return make_message(metadata, RecordDict({"arrays": ArrayRecord(model.state_dict())}))


def test_the_mod_answers_with_a_reason_and_trains_nothing():
    trained = []
    app = ClientApp(mods=[inspect_model()])

    def use(message, context):
        trained.append(message.metadata.message_type)
        return Message(RecordDict({"m": MetricRecord({"n": 1})}), reply_to=message)

    app.train()(use)
    app.evaluate()(use)
    context = Context(0, 0, {}, RecordDict(), {})
    torch.manual_seed(0)
    plain = CNN(SHAPE, 10)
    reply = app(_message(Imprint(plain, SHAPE), MessageType.TRAIN), context)
    assert reply.has_error()
    assert "128 of 128 rows of layer measure" in reply.error.reason
    assert trained == []
    assert not app(_message(plain, MessageType.TRAIN), context).has_error()
    app(_message(Imprint(plain, SHAPE), MessageType.EVALUATE), context)
    assert trained == [MessageType.TRAIN, MessageType.EVALUATE]


def _run(name):
    model = build_model(name, (1, 8, 8), 10, seed=0)
    task = ClientTask(
        dataset="digits", partition="iid", model=name, epochs=1, batch_size=4, learning_rate=0.1,
        seed=0,
    )  # fmt: skip
    strategy = WatchingFedSGD(
        victims=[0],
        parameters=[name for name, _ in model.named_parameters()],
        sampling=Sampling(min_clients=2),
    )
    with LocalGrid("tests.defenses.inspecting_app:app", nodes=2, workers=1) as grid:
        strategy.start(
            grid, ArrayRecord(model.state_dict()), num_rounds=1, train_config=task.to_record()
        )
    return strategy


def test_a_federation_of_inspecting_clients():
    assert len(_run("cnn").exchanges) == 1
    with pytest.raises(FedveilError, match="rows of layer measure measure the same direction"):
        _run("imprint-cnn")
