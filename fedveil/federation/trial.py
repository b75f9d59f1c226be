"""One step of a run before there is a run: what would fail in every client fails here, by name.

What a client and the server will do is done once, on two images and on as many as the smallest
minibatch will have: the model is built as clients build it, its state travels as a message, it is
trained, defended and answered by the client's own code, copied by the strategy's, and the answer is
read by the server's checks. Nothing is written.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, Metadata, RecordDict, UserConfig
from flwr.app.constants import DEFAULT_TTL
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID
from torch import Tensor, nn
from torch.func import functional_call

from fedveil.analytic import Statistics
from fedveil.copies.batch_statistics import reestimate_batch_norm
from fedveil.copies.fingerprint import Fingerprint
from fedveil.copies.noise import NoiseKey, add_noise
from fedveil.data import Images
from fedveil.errors import FedveilError
from fedveil.federation import client_app
from fedveil.federation.answers import QUESTIONS, digest_of
from fedveil.federation.replies import read_replies
from fedveil.federation.roster import Client
from fedveil.federation.secagg.client import ANSWERS, STATISTICS, WORDS
from fedveil.federation.strategies.analytic import Analytic
from fedveil.federation.strategies.ensemble_distillation import EnsembleDistillation
from fedveil.federation.strategies.fedavg import SeededFedAvg, clone
from fedveil.federation.strategies.noisy_fedavg import NoisyFedAvg
from fedveil.federation.task import UNLABELLED, ClientTask
from fedveil.federation.threads import torch_threads
from fedveil.federation.training import LocalTraining, batch_sizes, train_locally
from fedveil.models import check_sendable, has_batch_norm
from fedveil.types import Weights

_NODE = 1
_ROUND = 1


@dataclass(frozen=True)
class Trial:
    """What a trial needs to know of a run.

    Attributes:
        model: The server's model, freshly built; it is left as it is.
        images: The training images.
        classes: Number of classes.
        shares: How many of them each client holds, by partition.
        task: What clients will be told.
        strategy: Makes the copies; asked for them only.
        fingerprint: Strength of the copies' fingerprint; 0 for none.
    """

    model: nn.Module
    images: Images
    classes: int
    shares: tuple[int, ...]
    task: ClientTask
    strategy: SeededFedAvg
    fingerprint: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.raw.shape[1:]
        return channels, height, width


def try_out(trial: Trial) -> list[str]:
    """Do once what a run will do with its model, in well under a second for a small model.

    Returns:
        What the user should know though it hinders nothing: sentences.

    Raises:
        FedveilError: Names the step, the module or tensor, and what to change.
    """
    check_sendable(trial.model)
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        own = _as_clients_build_it(trial)
        sent = clone(trial.model.state_dict())
        _check_alike("a client's copy", _copy(trial), sent)
        smallest, client = _smallest_batch(trial)
        try:
            for count, who in ((2, 0), (smallest, client)):
                _train(trial, own, sent, trial.images[:count], who)
            return _repeats(trial, own, trial.images[:2])
        finally:
            # A memory layout that stays behind rounds otherwise in the clients of this process.
            client_app.forget_models()


def try_sums(trial: Trial, strategy: Analytic) -> list[str]:
    """Do once what a client of an analytic run does, on two images, and read its answer.

    Returns:
        What the user should know though it hinders nothing: nothing.

    Raises:
        FedveilError: Names what is wrong with the map, or the answer.
    """
    sent, images = strategy.model.features.sent(), trial.images[:2]
    strategy.clients = (Client(0, _NODE, len(images)),)
    message = _message(sent, trial.task, f"train.{STATISTICS}", strategy.attachments())
    with torch_threads(1), _named(strategy.model, "fails on two images of the dataset"):
        reply = client_app.answer_sums(message, _context(trial), images)
    asked = {_NODE: Client(0, _NODE, len(images))}
    expected = {WORDS: torch.zeros(strategy.layout.length, dtype=torch.int64)}
    updates, refusals = read_replies([reply], asked=asked, expected=expected, round_number=_ROUND)
    fault = refusals[0].reason if refusals else None
    if updates and strategy.release is None:
        sums = Statistics(strategy.layout, updates[0].weights[WORDS])
        fault = sums.fault(images=len(images))
    if fault:
        raise FedveilError(f"every client's answer would be refused: {fault}; mend the backbone")
    return []


def try_answers(trial: Trial, strategy: EnsembleDistillation) -> None:
    """Do once what a client of a protected run does, on two images and about two; read its answer.

    Raises:
        FedveilError: Every client's answer would be refused.
    """
    asked, images = strategy.unlabelled[:2], trial.images[:2]
    strategy.clients = (Client(0, _NODE, len(images)),)
    beside: dict[str, ArrayRecord | ConfigRecord] = {
        UNLABELLED: ArrayRecord({"images": asked}),
        QUESTIONS: strategy.question(digest_of(asked)).to_record(),
    }
    task = trial.task.model_copy(update={"epochs": 1, "batch_size": len(images)})
    message = _message(clone(trial.model.state_dict()), task, f"train.{ANSWERS}", beside)
    try:
        with torch_threads(1), torch.random.fork_rng(devices=[]):
            reply = client_app.answer_asked(message, _context(trial), images)
    finally:
        client_app.forget_models()
    expected = {WORDS: torch.zeros(len(asked) * strategy.classes, dtype=torch.int64)}
    told = {_NODE: strategy.clients[0]}
    _, refusals = read_replies([reply], asked=told, expected=expected, round_number=_ROUND)
    if refusals:
        raise FedveilError(f"every client's answer would be refused: {refusals[0].reason}")


def _as_clients_build_it(trial: Trial) -> nn.Module:
    """Return the model as clients build and load it; it must be the server's by its state alone."""
    own = client_app.model_of(trial.task, trial.shape, trial.classes)
    state = trial.model.state_dict()
    _check_alike("the model, when it is built again,", own.state_dict(), state)
    arrived = ArrayRecord({k: v.clone() for k, v in state.items()}).to_torch_state_dict()
    _check_alike("the model, after it travelled as a message,", arrived, state)
    try:
        own.load_state_dict(arrived)
    except Exception as error:  # the user's own hooks may raise anything
        raise _failure("cannot be loaded from its own state", own, None, error) from error
    pixels = trial.images[:2].pixels
    one, other = (_answers(model, pixels) for model in (trial.model, own))
    # Another memory layout rounds otherwise.
    if not torch.allclose(one, other, rtol=1e-2, atol=1e-4, equal_nan=True):
        raise FedveilError(
            f"model {type(own).__name__} answers otherwise when it is built again and given the "
            "same state: it holds something drawn at random, or counted, outside its state; "
            "register it as a buffer (register_buffer, persistent)"
        )
    return own


def _same(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def _answers(model: nn.Module, pixels: Tensor) -> Tensor:
    training = model.training
    model.eval()
    torch.manual_seed(0)  # layers that draw at random, the same
    try:
        with torch.no_grad(), _named(model, "fails on two images of the dataset"):
            logits: Tensor = model(pixels)
    finally:
        model.train(training)
    return logits


def _check_alike(what: str, found: Weights, wanted: Weights) -> None:
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        raise FedveilError(
            f"{what} has other tensors than the server's: {', '.join(odd[:3])}; give every tensor "
            "a name that does not change from one build to the next"
        )
    for name, value in found.items():
        if value.shape != wanted[name].shape or value.dtype != wanted[name].dtype:
            raise FedveilError(
                f"{what} has {name} as {value.dtype} {tuple(value.shape)}, not "
                f"{wanted[name].dtype} {tuple(wanted[name].shape)}; shapes and dtypes must not "
                "depend on chance"
            )


def _copy(trial: Trial) -> Weights:
    """Return a copy as the strategy makes one: noise of σ = 1, temperature, mark, statistics."""
    model, strategy = deepcopy(trial.model).eval(), trial.strategy
    weights: Weights = model.state_dict()
    key = NoiseKey.generate()
    with _named(model, "cannot be made a copy of for a client"):
        if isinstance(strategy, NoisyFedAvg):
            noise = strategy.target.draw(weights, key, run="trial", round_number=1, group="trial")
            weights = strategy.cool(add_noise(weights, noise, 1.0))
        if has_batch_norm(model):
            weights = reestimate_batch_norm(model, weights, trial.images[:2].pixels)
        if trial.fingerprint:
            mark = Fingerprint.of(model, key, strength=trial.fingerprint)
            weights = mark.apply(weights, round_number=1, client=0)
        functional_call(model, dict(weights), (trial.images[:2].pixels,), tie_weights=False)
    return weights


def _smallest_batch(trial: Trial) -> tuple[int, int]:
    """Return how many images the smallest minibatch of any client has, and that client."""
    sizes = {
        client: min(batch_sizes(trial.model, share, trial.task.batch_size))
        for client, share in enumerate(trial.shares)
        if share
    }
    client = min(sizes, key=lambda who: sizes[who])
    return sizes[client], client


def _train(trial: Trial, own: nn.Module, sent: Weights, images: Images, client: int) -> None:
    """Train, defend and answer as a client does, and read the answer as the server does."""
    task = trial.task.model_copy(update={"epochs": 1, "batch_size": len(images)})
    message = _message(sent, task)
    doing = f"fails in training on {len(images)} image{'s' if len(images) > 1 else ''} at once"
    if len(images) < 2:
        doing += f" (client {client} has {trial.shares[client]})"
    with _named(own, doing):
        reply = client_app.answer(message, _context(trial), images)
    _check_answer(own, trial.strategy, sent, reply, len(images))


def _check_answer(
    own: nn.Module, strategy: SeededFedAvg, sent: Weights, reply: Message, examples: int
) -> None:
    asked = {reply.metadata.src_node_id: Client(0, reply.metadata.src_node_id, examples)}
    updates, refusals = read_replies([reply], asked=asked, expected=sent, round_number=_ROUND)
    if refusals:
        raise FedveilError(
            f"model {type(own).__name__}: every client's answer would be refused after its first "
            f"step: {refusals[0].reason}; mend the model, or lower --learning-rate"
        )
    mean = strategy.average([(updates[0].weights, 1), (sent, 2)])
    _check_alike("the average of two answers", mean, sent)


def _repeats(trial: Trial, own: nn.Module, images: Images) -> list[str]:
    """Say so where a model draws from, or counts in, what no seed and no state reaches."""
    settings = LocalTraining(batch_size=2, learning_rate=0.01)
    ends = []
    for _ in range(2):
        own.load_state_dict(dict(trial.model.state_dict()))
        train_locally(own, images, settings, generator=torch.Generator().manual_seed(0))
        ends.append(clone(own.state_dict()))
    odd = [name for name, value in ends[0].items() if not _same(value, ends[1][name])]
    if not odd:
        return []
    return [
        f"model {type(own).__name__}: {odd[0]} ends otherwise when the same step is repeated: a "
        "layer draws from a generator of its own or counts outside the model's state, so the same "
        "seed will not give the same bits; draw with torch, and keep counts in buffers"
    ]


def _message(
    sent: Weights,
    task: ClientTask,
    kind: str = "train",
    beside: Mapping[str, ArrayRecord | ConfigRecord] | None = None,
) -> Message:
    config = ConfigRecord({**task.to_record(), "server-round": _ROUND})
    content = RecordDict({"arrays": ArrayRecord(dict(sent)), "config": config, **(beside or {})})
    # Not by Message(...), which is for a process that Flower has given a run already.
    metadata = Metadata(
        run_id=1,
        message_id="trial",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=_NODE,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=DEFAULT_TTL,
        message_type=kind,
    )
    return make_message(metadata, content)


def _context(trial: Trial) -> Context:
    config: UserConfig = {"partition-id": 0, "num-partitions": len(trial.shares)}
    return Context(run_id=1, node_id=_NODE, node_config=config, state=RecordDict(), run_config={})


@contextmanager
def _named(model: nn.Module, doing: str) -> Iterator[None]:
    """Turn whatever a model raises into a sentence that names the module it was in."""
    names = {id(module): name for name, module in model.named_modules()}
    inside: list[nn.Module] = []

    def enter(module: nn.Module, _inputs: object) -> None:
        if module is model:
            inside.clear()  # what an earlier try, given up, left behind
        inside.append(module)

    def leave(module: nn.Module, _inputs: object, _output: object) -> None:
        while inside and inside.pop() is not module:
            pass

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave)
    try:
        yield
    except FedveilError:
        raise
    except Exception as error:  # the user's own code may raise anything
        found = next((m for m in reversed(inside) if id(m) in names), None)
        where = None if found is None else names[id(found)]
        raise _failure(doing, model, where, error) from error
    finally:
        before.remove()
        after.remove()


def _failure(doing: str, model: nn.Module, where: str | None, error: Exception) -> FedveilError:
    place = f" in {where}, a {type(model.get_submodule(where)).__name__}" if where else ""
    reason = " ".join(str(error).split())[:300]
    return FedveilError(
        f"model {type(model).__name__} {doing}{place}: {type(error).__name__}: {reason}"
        f"; {_advice(reason)}"
    )


_ADVICE: Sequence[tuple[str, str]] = (
    ("Expected more than 1 value", "give every client two images or more, or use group norm"),
    ("view size is not compatible", "write reshape or flatten(1) for view"),
    ("modified by an inplace operation", "use layers with inplace=False"),
    ("does not require grad", "leave some parameter trainable, and do not detach the logits"),
    ("dtype", "make the model float32 (.float()), or convert the pixels in its forward"),
)


def _advice(reason: str) -> str:
    known = [advice for told, advice in _ADVICE if told in reason]
    return known[0] if known else "mend the model; no run was begun"
