"""How the server teaches a model what is answered to its own images."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from fedveil.analytic import AnalyticClassifier
from fedveil.data import Images
from fedveil.data.augmentation import Augmentation
from fedveil.errors import FedveilError
from fedveil.federation.evaluation import count_correct
from fedveil.federation.job import Job
from fedveil.federation.threads import torch_threads
from fedveil.models import build_model
from fedveil.models.layout import memory_layout
from fedveil.types import Weights

_BLOCK = 100
_STEPS = 3_000
_SIDE_OF_A_SHIFT = 14  # pixels of an image's side for each by which it may be shifted


@dataclass(frozen=True)
class Distillation:
    """How the server teaches a model what answers to its images know.

    Attributes:
        steps: Steps of gradient descent.
        batch_size: Images a step.
        learning_rate: Size of the first step; falls in a straight line to zero.
        momentum: Part of the last step that the next one repeats.
        label_share: Weight λ of the images' own labels, where the server has them: w is taught
            (1 - λ)·answers + λ·labels (Hinton et al., "Distilling the Knowledge in a Neural
            Network", 2015, section 2). 0 asks for no labels, 1 for no clients.
        temperature: T of the softmax(z/T) that clients answer and w is taught (the same source).
        augmentation: Changes the images anew in every step, while what they are stays the same.
    """

    steps: int = 120
    batch_size: int = 50
    learning_rate: float = 0.05
    momentum: float = 0.9
    label_share: float = 0.0
    temperature: float = 1.0
    augmentation: Augmentation = Augmentation()  # noqa: RUF009 (frozen)


def teach(
    model: nn.Module,
    pixels: Tensor,
    targets: Tensor,
    how: Distillation,
    generator: torch.Generator,
) -> None:
    """Teach a model to give images the probabilities it is told, and leave it in evaluation mode.

    Args:
        model: From where it stands.
        pixels: Float [N, C, H, W] in [0, 1].
        targets: Float [N, K], probabilities.
        how: Steps and their sizes.
        generator: Draws each step's images and their changes.

    Raises:
        FedveilError: It diverged.
    """
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), how.learning_rate, how.momentum)
    schedule = LinearLR(optimiser, start_factor=1.0, end_factor=0.0, total_iters=how.steps)
    size = min(how.batch_size, len(targets))
    for _ in range(how.steps):
        index = torch.randint(len(targets), (size,), generator=generator)
        changed = how.augmentation(pixels[index], generator)
        optimiser.zero_grad(set_to_none=True)
        cooled = model(changed) / how.temperature
        # The square keeps a step as long whatever the temperature (Hinton et al., section 2).
        loss = F.cross_entropy(cooled, targets[index]) * how.temperature**2
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    if not bool(loss.isfinite()):
        raise FedveilError(
            f"teaching w diverged: lower Distillation(learning_rate={how.learning_rate:g}), "
            "or, where clients' models answer without bounds, --learning-rate"
        )
    model.eval()


def distilled(
    teacher: nn.Module,
    student: nn.Module,
    images: Images,
    how: Distillation = Distillation(),
    *,
    seed: int = 0,
) -> nn.Module:
    """Return a network that was taught what another answers to images; labels are not looked at.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Args:
        teacher: Takes float [N, C, H, W] in [0, 1], returns logits [N, K].
        student: The same; it is left as it is.
        images: Of the kind both are for, none of them a client's.
        how: Steps and their sizes. A change of an image keeps the answer to the image itself.
        seed: Seeds which images a step takes, their changes, and dropout.

    Raises:
        FedveilError: There are no images, or teaching diverged.
    """
    if not len(images):
        raise FedveilError(
            "there are no images to teach a network by: give the server some of the same kind, "
            "without labels; or use w as it is"
        )
    generator = torch.Generator().manual_seed(seed)
    pixels, learner = images.pixels, deepcopy(student)
    with torch.inference_mode():
        answers = torch.cat([teacher(block) for block in torch.split(pixels, _BLOCK)])
    targets = (answers / how.temperature).softmax(1).clone()
    layout = memory_layout(learner, pixels[:1])
    learner.to(memory_format=layout)  # type: ignore[call-overload]
    # Steps of a few images are faster on one thread, and the result hangs on no number of them.
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teach(learner, pixels.contiguous(memory_format=layout), targets, how, generator)
    return learner


@dataclass(frozen=True)
class Distilled:
    """The user's network, taught by an analytic run's w.

    Attributes:
        weights: Its state.
        model: Its name.
        images: How many it was taught by.
        accuracy: On the report images, which are others.
    """

    weights: Weights
    model: str
    images: int
    accuracy: float


def student_of(job: Job) -> nn.Module | None:
    """Return the untrained network that w is taught to besides; None where none is asked for.

    Raises:
        FedveilError: It cannot be made, or does not fit the images.
    """
    config, data = job.config, job.dataset
    if config.distil_into is None:
        return None
    return build_model(config.distil_into, data.shape, len(data.classes), seed=config.seed)


def distil_job(job: Job, weights: Weights) -> Distilled | None:
    """Teach a run's w to the network that its settings name, by the calibration images.

    An image is shifted a little in every step, and mirrored where the map takes mirror images for
    alike.

    Args:
        job: Of strategy analytic.
        weights: w.

    Raises:
        FedveilError: As ``student_of`` and ``distilled``.
    """
    student, teacher = student_of(job), job.model
    if student is None:
        return None
    assert isinstance(teacher, AnalyticClassifier)
    teacher.load_state_dict(dict(weights))
    features, calibration, report = (
        teacher.features,
        job.evaluation.calibration,
        job.evaluation.report,
    )
    change = Augmentation(
        crop=min(job.dataset.shape[1:]) // _SIDE_OF_A_SHIFT,
        flip=features.views > 1 or bool(features.options.get("mirrored")),
    )
    how = Distillation(steps=_STEPS, augmentation=change)
    learnt = distilled(teacher.eval(), student, calibration, how, seed=job.config.seed)
    right = count_correct(learnt, report.pixels, report.labels)
    assert job.config.distil_into is not None
    return Distilled(
        learnt.state_dict(),
        job.config.distil_into,
        len(calibration),
        right / len(report),
    )
