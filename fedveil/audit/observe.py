"""From a federation's own messages to what its server can be said to have."""

import copy
import time
from collections.abc import Sequence

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.attacks.inversion import Observation
from fedveil.data import Images
from fedveil.defenses.mods import transform_inputs
from fedveil.errors import FedveilError

_TTL = 3600.0


def observation_from_records(
    model: nn.Module,
    sent: ArrayRecord,
    returned: Sequence[ArrayRecord],
    *,
    shape: tuple[int, int, int],
    classes: int,
    learning_rate: float | None = None,
    images: int = 1,
    knows: nn.Module | None = None,
) -> Observation:
    """Return what an honest-but-curious server has of clients that answered one model.

    Args:
        model: The architecture; its weights are not used.
        sent: The model as it went out.
        returned: What came back, one record a victim (or a round in which the same model went out):
            gradients, or weights.
        shape: (C, H, W) of one image.
        classes: Number of classes.
        learning_rate: Of the single local step after which the weights came back, as the server
            configured it; None where the records hold gradients.
        images: Images in a victim's batch, as the reply counts them.
        knows: The image transformation that is public knowledge.

    Raises:
        FedveilError: A record that lacks a weight of the model, or a learning rate of 0 or less.
    """
    if learning_rate is not None and learning_rate <= 0:
        raise FedveilError(
            f"learning rate {learning_rate} is out of range: weights that came back tell a "
            "gradient only after a step with a learning rate above 0"
        )
    before = sent.to_torch_state_dict()
    own = copy.deepcopy(model)
    own.load_state_dict(before)
    trained = [name for name, p in own.named_parameters() if p.requires_grad]
    updates = [record.to_torch_state_dict() for record in returned]
    gradients: dict[str, Tensor] = {}
    rounding = 0.0
    for name in trained:
        if any(name not in update for update in updates):
            raise FedveilError(
                f"a reply lacks {name}; the client must return every weight it was sent"
            )
        stacked = torch.stack([update[name] for update in updates]) if updates else torch.empty(0)
        if learning_rate is not None:
            # In float64, so that nothing is lost beyond what the client's own rounding lost.
            rounding += _rounding_energy(stacked) / learning_rate**2
            stacked = (before[name].double() - stacked.double()) / learning_rate
        gradients[name] = stacked
    size = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    return Observation(
        model=own,
        gradients=gradients,
        shape=shape,
        classes=classes,
        images=images,
        knows=knows,
        rounding=rounding / max(size, 1e-30),
    )


def _rounding_energy(weights: Tensor) -> float:
    # A float is off by a uniform error of one unit in the last place, which is eps·2^exponent.
    _, exponent = torch.frexp(weights)
    unit = torch.finfo(weights.dtype).eps * torch.exp2(exponent.double() - 1)
    return float(unit.square().sum() / 12)


def observe_clients(
    model: nn.Module,
    batches: Sequence[Images],
    *,
    classes: int,
    transform: nn.Module | None = None,
    learning_rate: float | None = None,
) -> Observation:
    """Let a Flower client train once on each batch, and return what its server has.

    Each batch is one round in which the same model went out: the client's app receives a train
    message, takes one step of gradient descent, and replies.

    Args:
        model: What the server sends.
        batches: What the client trains on in each round, all of one size.
        classes: Number of classes.
        transform: What the client's site has put between images and model.
        learning_rate: Of the step whose weights come back; None for a client that returns the
            gradient (FedSGD).

    Returns:
        The observation of an attacker who knows of ``transform``.

    Raises:
        FedveilError: No batches, or empty ones.
    """
    if not batches or len(batches[0]) == 0:
        raise FedveilError("there are no images to train on; give the victim at least one")
    mods = [] if transform is None else [transform_inputs(transform)]
    sent = ArrayRecord(copy.deepcopy(model).cpu().state_dict())
    context = Context(0, 0, {}, RecordDict(), {})
    records = []
    for batch in batches:
        app = _client(model, batch, mods)
        config = ConfigRecord({"learning-rate": learning_rate or 0.0})
        content = RecordDict({"arrays": sent, "config": config})
        reply = app(train_message(content), context)
        records.append(reply.content.array_records["arrays"])
        count = int(reply.content.metric_records["metrics"]["num-examples"])  # type: ignore[arg-type]
    channels, height, width = batches[0].raw.shape[1:]
    return observation_from_records(
        model,
        sent,
        records,
        shape=(channels, height, width),
        classes=classes,
        learning_rate=learning_rate,
        images=count,
        knows=transform,
    )


def train_message(content: RecordDict) -> Message:
    """Return a train message as a client receives it, made outside any running federation."""
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=_TTL,
        message_type=MessageType.TRAIN,
        src_task_id=0,
        dst_task_id=None,
    )
    return make_message(metadata, content)


def _client(model: nn.Module, batch: Images, mods: list) -> ClientApp:  # type: ignore[type-arg]
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        del context
        local = copy.deepcopy(model)
        local.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        rate = message.content.config_records["config"]["learning-rate"]
        loss = F.cross_entropy(local(batch.pixels), batch.labels)
        trained = {k: p for k, p in local.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()))
        answer = dict(zip(trained, gradients, strict=True))
        if rate:
            answer = {k: trained[k].detach() - float(rate) * g for k, g in answer.items()}  # type: ignore[arg-type]
        metrics = MetricRecord({"num-examples": len(batch)})
        content = RecordDict({"arrays": ArrayRecord(answer), "metrics": metrics})
        return Message(content, reply_to=message)

    return app
