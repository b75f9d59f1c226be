"""What a client of a ``protected`` federation does: its model answers, and stays with it."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

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
from flwr.clientapp.typing import ClientAppCallable
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fedveil.errors import FedveilError
from fedveil.federation.permission import check_epsilon
from fedveil.federation.replies import WEIGHT_KEY
from fedveil.federation.secagg.client import WORDS, announced_sum
from fedveil.federation.task import UNLABELLED
from fedveil.federation.votes import VoteRelease
from fedveil.models.layout import memory_layout
from fedveil.secure_random import SecureGenerator
from fedveil.types import Shape, Weights

QUESTIONS = "questions"
"""Record of a message, and key of a node config: what is asked, and the one digest answered to."""

MOST_QUESTIONS = "most-questions"
"""Key of a node config: this node answers no more images than so many at once."""

FRACTION_BITS = 24
"""A probability is a multiple of 2⁻²⁴, as fine as a float32 below 1."""

MOST_IMAGES = 2 ** (62 - FRACTION_BITS)
"""Images of a sum that fits 64-bit words, since none adds more than 2²⁴ to any of them."""

LARGEST_ASKED = 100_000
"""Images that any client answers at most."""

Told = dict[str, int | float | list[int] | list[float]]

_UNIT = float(2**FRACTION_BITS)
_BATCH = 250
_ALIKE = 0.02  # of the range of a pixel, root mean square


class QuestionTask(BaseModel):
    """What is asked of a client besides the images.

    Attributes:
        sha256: Digest of the images.
        classes: K.
        weight: Metric by which the client's answers are weighed.
        most: What they are weighed by at most; None for whatever the metric says.
        temperature: T of softmax(z/T); of no matter to votes.
        learn: Whether a client that lacks a class learns from the images, too.
        epsilon: ε of noisy votes; None for probabilities.
        delta: δ of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    classes: int = Field(ge=1)
    weight: str = WEIGHT_KEY
    most: float | None = Field(default=None, gt=0)
    temperature: float = Field(default=1.0, gt=0, le=1000)
    learn: bool = False
    epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)

    @property
    def release(self) -> VoteRelease | None:
        """The noise that is asked for."""
        return None if self.epsilon is None else VoteRelease(self.epsilon, self.delta)

    @classmethod
    def from_record(cls, record: ConfigRecord) -> "QuestionTask":
        """Read the record of a message."""
        return cls.model_validate(dict(record))

    def to_record(self) -> ConfigRecord:
        """Return the record for a message."""
        return ConfigRecord(self.model_dump(exclude_none=True))


@dataclass(frozen=True)
class Question:
    """A message's question, checked.

    Attributes:
        task: What is asked.
        images: uint8 [N, C, H, W], or floats as the model takes them.
    """

    task: QuestionTask
    images: Tensor

    @property
    def pixels(self) -> Tensor:
        """Floats as the model takes them."""
        return pixels_of(self.images)

    @classmethod
    def read(cls, message: Message, context: Context, *, shape: Shape | None = None) -> "Question":
        """Read and check what a message asks.

        Args:
            message: Holds the images and the task.
            context: Whose node config may pin the images, limit their number and ε.
            shape: (C, H, W) that images must have, of bytes; None for any numbers.

        Raises:
            FedveilError: Names what is asked, and what is allowed.
        """
        task = QuestionTask.from_record(message.content.config_records[QUESTIONS])
        images = message.content.array_records[UNLABELLED].to_torch_state_dict()["images"]
        most = min(int(context.node_config.get(MOST_QUESTIONS, LARGEST_ASKED)), LARGEST_ASKED)
        if not 0 < len(images) <= most:
            raise FedveilError(
                f"the server asks about {len(images)} images; this node answers 1 to {most} "
                f"({MOST_QUESTIONS} of its config); give fewer --calibration-images"
            )
        told = f"{images.dtype} {tuple(images.shape[1:])}"
        if shape is not None and (images.dtype != torch.uint8 or images.shape[1:] != shape):
            raise FedveilError(
                f"the server asks about images of {told}; this node's are torch.uint8 {shape}"
            )
        if images.dim() != 4 or not bool(torch.isfinite(images).all()):
            raise FedveilError(f"what the server asks about, {told}, are no finite images")
        _check_digest(task, images, context)
        check_epsilon(task.epsilon, context)
        return cls(task, images)


def _check_digest(task: QuestionTask, images: Tensor, context: Context) -> None:
    found, pinned = digest_of(images), context.node_config.get(QUESTIONS)
    if found != task.sha256:
        raise FedveilError(
            f"the server's images have SHA-256 {found}, and it says {task.sha256}: they were "
            "changed on the way"
        )
    if pinned is not None and pinned != found:
        raise FedveilError(
            f"this node's config allows questions with SHA-256 {pinned}, and the server asked "
            f"{found}; a server that chooses its questions freely can ask about one person's "
            "image: ask the site to allow them"
        )


def digest_of(images: Tensor) -> str:
    """Return the SHA-256 of images: of their dtype, shape and every number."""
    told = hashlib.sha256(json.dumps([str(images.dtype), list(images.shape)]).encode())
    told.update(images.contiguous().numpy().tobytes())
    return told.hexdigest()


def pixels_of(images: Tensor) -> Tensor:
    """Return images as a model takes them: bytes as floats in [0, 1], floats as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


def logits_of(model: nn.Module, weights: Weights, pixels: Tensor) -> Tensor:
    """Return the logits of a model in evaluation mode, [N, K]; it takes on the weights."""
    model.load_state_dict(dict(weights))
    model.eval()
    layout = memory_layout(model, pixels[:1])
    with torch.inference_mode():
        parts = [
            model(some.contiguous(memory_format=layout)) for some in torch.split(pixels, _BATCH)
        ]
    return torch.cat(parts)


def asked_about(own: Tensor, questions: Tensor) -> Tensor:
    """Return which of a client's images the questions hold, or an image hardly different.

    What a model was trained on it knows better than other images, so a server could ask about an
    image to learn whether it is a client's. A shifted or mirrored one is not found.

    Args:
        own: uint8 [M, C, H, W].
        questions: uint8 [N, C, H, W].

    Returns:
        bool [M].
    """
    other = pixels_of(questions).flatten(1) - 0.5
    lengths = other.square().sum(1)

    def alike(images: Tensor) -> Tensor:
        one = pixels_of(images).flatten(1) - 0.5
        squares = one.square().sum(1)[:, None] + lengths - 2 * one @ other.T
        return (squares < _ALIKE**2 * one.shape[1]).any(dim=1)

    # As many questions as a server may ask fill no memory, however many images are compared.
    return torch.cat([alike(images) for images in torch.split(own, _BATCH)])


def encoded(logits: Tensor, weight: float, temperature: float = 1.0) -> Tensor:
    """Return a client's probabilities times its weight, int64 [N, K] in units of 2⁻²⁴."""
    shares = torch.softmax(logits.double() / temperature, dim=1)
    return (shares * (weight * _UNIT)).round().to(torch.int64)


def decoded(words: Tensor, weight: float) -> Tensor:
    """Return the mean of the answers in a sum, float64, given what their weights add up to."""
    return words.double() / (weight * _UNIT)


def fault(words: Tensor, *, weight: float, clients: int) -> str | None:
    """Say what shows that a sum of answers is none of clients with such a weight, if anything does.

    Args:
        words: int64 [N, K], of all of them.
        weight: What their weights add up to.
        clients: How many they are.
    """
    rounding = clients * words.shape[1]
    rows = words.double().sum(1)
    if bool((words < 0).any()) or bool(((rows - weight * _UNIT).abs() > rounding).any()):
        return f"its answers are no probabilities that add up to its weight of {weight:g}"
    return None


def answering(
    train: ClientAppCallable, model: Callable[[], nn.Module], *, arrays: str = "arrays"
) -> ClientAppCallable:
    """Return what answers ``EnsembleDistillation`` for a Flower app that trains by ``train``.

    The app trains as it does; what it returns is answered with instead of sent.

    Args:
        train: The app's own function for train messages.
        model: Returns the module that its arrays are the state of.
        arrays: Name of the record in which the model comes.

    Example:
        >>> app.train("answers")(answering(train, Net))  # doctest: +SKIP
    """

    def answer(message: Message, context: Context) -> Message:
        asked = Question.read(message, context)
        return answer_with(train, model(), message, context, asked, arrays=arrays)

    return answer


def answer_with(
    train: ClientAppCallable,
    model: nn.Module,
    message: Message,
    context: Context,
    asked: Question,
    *,
    arrays: str = "arrays",
    weight: float | None = None,
) -> Message:
    """Let a client train, and return what its model answers.

    Args:
        train: Answers a message with one record of arrays, the model's state, and one of metrics.
        model: Takes on that state.
        message: What came.
        context: Of the client.
        asked: What is asked.
        arrays: Name of the record in which the model comes.
        weight: What the client says its answers weigh; None for what ``train`` says.

    Returns:
        int64 [N·K] as ``WORDS``, and what else ``train`` says; with votes nothing else.

    Raises:
        FedveilError: Training diverged, or its answer cannot be summed.
    """
    reply = train(_to_train(message, asked.task, arrays), context)
    if reply.has_error():
        return reply
    (state,) = reply.content.array_records.values()
    (metrics,) = reply.content.metric_records.values()
    logits = logits_of(model, state.to_torch_state_dict(), asked.pixels)
    if logits.shape != (len(asked.images), asked.task.classes):
        raise FedveilError(
            f"the model answers {tuple(logits.shape)}, and {asked.task.classes} classes of "
            f"{len(asked.images)} images were asked for"
        )
    if not bool(torch.isfinite(logits).all()):
        raise FedveilError(
            "the model answers NaN or infinity, so nothing was sent: its training diverged; lower "
            "--learning-rate, or give --clip 1"
        )
    told = dict(metrics)
    if weight is not None:
        told[asked.task.weight] = weight
    words, told = _released(logits, told, message, context, asked.task)
    content = RecordDict(
        {"answers": ArrayRecord({WORDS: words.flatten()}), "metrics": MetricRecord(told)}
    )
    if asked.task.release is None:
        content.config_records.update(reply.content.config_records)
    return Message(content, reply_to=message)


def _to_train(message: Message, task: QuestionTask, arrays: str) -> Message:
    """Return the message as one that asks for training alone."""
    beside = {arrays, UNLABELLED} if task.learn else {arrays}
    records = message.content.items()
    left_out = {QUESTIONS, *(message.content.array_records.keys() - beside)}
    content = RecordDict({name: record for name, record in records if name not in left_out})
    metadata = copy.copy(message.metadata)
    metadata.message_type = MessageType.TRAIN
    return make_message(metadata, content)


def _released(
    logits: Tensor, told: Told, message: Message, context: Context, task: QuestionTask
) -> tuple[Tensor, Told]:
    """Return the words that leave, and what is said beside them."""
    together = announced_sum(message, context)
    if task.release is not None:
        clients = together.clients if together else None
        votes = task.release.noised(logits.argmax(1), task.classes, SecureGenerator(), clients)
        return votes, {key: told[key] for key in (task.weight, "server-round") if key in told}
    own = told.get(task.weight)
    if isinstance(own, bool) or not isinstance(own, int | float) or not 0 < own < float("inf"):
        raise FedveilError(f"{task.weight} is {own!r}; allowed: a number above 0")
    counted = own if task.most is None else min(own, type(own)(task.most))
    total = max(counted, together.images if together else 0)
    if total > MOST_IMAGES:
        raise FedveilError(f"a sum of {total:g} images is asked for; {MOST_IMAGES} fit")
    return encoded(logits, counted, task.temperature), {**told, task.weight: counted}
