"""What a client computes: stochastic gradient descent on its own images, on one thread."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LinearLR

from fedveil.data import Images
from fedveil.data.augmentation import Augmentation
from fedveil.defenses.dp_sgd import DPSGD
from fedveil.models import has_batch_norm
from fedveil.models.layout import memory_layout
from fedveil.secure_random import SecureGenerator


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains.

    Attributes:
        epochs: Passes over the client's images (McMahan's E).
        batch_size: Images a step (McMahan's B); the last step of an epoch may have fewer.
        learning_rate: Step size of the descent.
        decay: Whether the step size falls in a straight line to zero over a client's steps.
        momentum: Part of the last step that the next one repeats.
        clip: Largest norm a step's gradient may have, over all parameters; None for no limit.
        augmentation: Changes every minibatch at random before the step.
    """

    epochs: int = 1
    batch_size: int = 10
    learning_rate: float = 0.05
    decay: bool = False
    momentum: float = 0.0
    clip: float | None = None
    augmentation: Augmentation = Augmentation()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Strangers:
    """Unlabelled images, taught as any of the classes that a client lacks.

    A client that has images of some classes only cannot learn what sets them apart from the others.
    From these it can. Some of them are of its own classes all the same, which lowers its certainty
    but not the order of its answers.

    Source: unlabelled images as negatives: Elkan and Noto, "Learning Classifiers from Only Positive
    and Unlabeled Data", KDD 2008; a client's "none of mine": Diao et al., "Towards Addressing Label
    Skews in One-Shot Federated Learning", ICLR 2023.

    Attributes:
        images: At least one; their labels are not looked at.
        step: How many of them a step takes, at least 1.
    """

    images: Images
    step: int

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return one step's images, float [step, C, H, W] in [0, 1]."""
        index = torch.randint(len(self.images), (self.step,), generator=generator)
        return self.images[index].pixels


def train_locally(
    model: nn.Module,
    images: Images,
    settings: LocalTraining,
    *,
    generator: torch.Generator,
    strangers: Strangers | None = None,
) -> float:
    """Train ``model`` in place on ``images`` and return the mean cross entropy on the way.

    The model is put into training mode and its convolutions into channels-last memory, in which
    they are faster on a CPU; no value changes by that. Parameters that need no gradient stay.

    Args:
        model: Takes float pixels [N, C, H, W] in [0, 1], returns logits [N, classes].
        images: The client's images; at least one.
        settings: How to train.
        generator: Shuffles the images, anew each epoch, and augments them.
        strangers: What a client that lacks some class learns besides.

    Returns:
        Mean loss over all images and epochs, each before the step that used it. Not finite where
        training diverged.

    Raises:
        ValueError: There are no images.
    """
    if not len(images):
        raise ValueError("a client without images cannot train")
    model.train()
    layout = memory_layout(model, images[:1].pixels)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    held = images.labels.bincount().nonzero().flatten()
    sizes = batch_sizes(model, len(images), settings.batch_size)
    steps = settings.epochs * len(sizes)
    with _repeatable(generator), _descent(model, settings, steps) as step:
        for _ in range(settings.epochs):
            order = torch.randperm(len(images), generator=generator)
            for index in torch.split(order, sizes):
                batch = images[index]
                pixels = batch.pixels
                if strangers:
                    pixels = torch.cat([pixels, strangers.draw(generator)])
                pixels = settings.augmentation(pixels, generator)
                logits = model(pixels.contiguous(memory_format=layout))
                loss = _loss(logits, batch.labels, held)
                loss.backward()  # type: ignore[no-untyped-call]
                step()
                total += loss.detach() * len(index)
    return float(total) / (settings.epochs * len(images))


def batch_sizes(model: nn.Module, images: int, batch_size: int) -> list[int]:
    """Return the sizes of an epoch's minibatches.

    A last image that would be alone joins the batch before where batch normalisation cannot train
    on one.
    """
    sizes = [batch_size] * (images // batch_size)
    left = images % batch_size
    if left == 1 and sizes and has_batch_norm(model):
        sizes[-1] += 1
    elif left:
        sizes.append(left)
    return sizes


@contextmanager
def _repeatable(generator: torch.Generator) -> Iterator[None]:
    """Let dropout and other layers that draw at random draw the same for the same seed.

    Whatever process the client runs in, and whoever trained there before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        yield


def _loss(logits: Tensor, labels: Tensor, held: Tensor) -> Tensor:
    """Return the mean cross entropy; rows beyond the labels' are to be of any class not held."""
    count, classes = len(labels), logits.shape[1]
    if len(logits) == count:
        return F.cross_entropy(logits, labels)
    target = logits.new_full((classes,), 1 / (classes - len(held))).index_fill(0, held, 0.0)
    known = F.cross_entropy(logits[:count], labels, reduction="sum")
    strange = F.cross_entropy(
        logits[count:], target.expand(len(logits) - count, -1), reduction="sum"
    )
    return (known + strange) / len(logits)


def train_privately(
    model: nn.Module, images: Images, settings: LocalTraining, privacy: DPSGD
) -> None:
    """Train ``model`` in place by DP-SGD.

    No loss is returned: what images cost the model is theirs, and no accountant covers it.

    An epoch has as many steps as ``train_locally`` makes of it; each takes every image with
    probability B/n, as the accountant assumes, so no order of images is shuffled by a seed that the
    server knows.

    Args:
        model: See ``train_locally``.
        images: The client's images; at least one.
        settings: How to train; ``clip`` limits the noisy gradient besides.
        privacy: Clipping and noise.

    Raises:
        ValueError: There are no images.
        FedveilError: The model mixes the images of a batch.
    """
    if not len(images):
        raise ValueError("a client without images cannot train")
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = settings.epochs * math.ceil(len(images) / settings.batch_size)
    step = _optimiser_step(parameters, settings, steps)
    expected = min(settings.batch_size, len(images))
    draws, changes = SecureGenerator(), torch.Generator()  # how images are turned is no secret
    changes.seed()
    for _ in range(steps):
        taken = draws.uniform(len(images)) < expected / len(images)
        batch = images[taken]
        pixels = settings.augmentation(batch.pixels, changes) if len(batch) else batch.pixels
        gradients = privacy.gradients(model, pixels, batch.labels, expected=expected)
        for name, gradient in gradients.items():
            model.get_parameter(name).grad = gradient
        step()


@contextmanager
def _descent(model: nn.Module, settings: LocalTraining, steps: int) -> Iterator[Callable[[], None]]:
    """Yield what applies the gradients and clears them, ``steps`` times in all."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.momentum or settings.clip is not None or settings.decay:
        yield _optimiser_step(parameters, settings, steps)
        return

    def descend(parameter: Tensor) -> None:
        # In the middle of the backward pass, while this gradient is still in the cache, and without
        # ever holding all gradients at once.
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-settings.learning_rate)
            parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(descend)  # type: ignore[no-untyped-call]
        for parameter in parameters
    ]
    try:
        yield lambda: None
    finally:
        for handle in handles:
            handle.remove()


def _optimiser_step(
    parameters: list[nn.Parameter], settings: LocalTraining, steps: int
) -> Callable[[], None]:
    optimiser = torch.optim.SGD(parameters, settings.learning_rate, settings.momentum, foreach=True)
    end = 0.0 if settings.decay else 1.0
    schedule = LinearLR(optimiser, start_factor=1.0, end_factor=end, total_iters=steps)

    def step() -> None:
        if settings.clip is not None:
            clip_grad_norm_(parameters, settings.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()

    return step
