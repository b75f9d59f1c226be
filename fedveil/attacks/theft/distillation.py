"""What the copy answers on unlabelled images teaches a student."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.attacks.theft.as_received import Direct
from fedveil.attacks.theft.descent import Task, labelled, parameter_names, recipes, search
from fedveil.attacks.theft.holdout import predict
from fedveil.attacks.theft.observation import Stolen, TheftAttack, TheftObservation
from fedveil.attacks.theft.probe import Probe

_MOST = 1_000
_VIEWS = 8


@dataclass(frozen=True)
class Distil:
    """Train the copy on its own answers to unlabelled images, and on the labelled ones.

    The teacher is the copy, as it came or with a new output layer, whichever does better on the
    holdout; the student starts from it. An answer is the share of votes each class has among eight
    augmented views, which no scale of the logits can blur. Every fold has a teacher that never saw
    the fold's held-out labels.

    Sources: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Lee,
    "Pseudo-Label", ICML workshop on challenges in representation learning 2013.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there are unlabelled images, and labels to choose a teacher by."""
        return len(observation.unlabelled) > 0 and observation.has_labels

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Return the student."""
        choices: list[TheftAttack] = [t for t in (Direct(), Probe()) if t.applies(observation)]
        if not choices:
            return search(observation, recipes(parameter_names(observation.architecture)))
        teacher = max(choices, key=lambda attack: attack(observation).score)
        names = parameter_names(observation.architecture)
        return search(observation, recipes(names), _Lessons(teacher))


@dataclass(frozen=True)
class _Lessons:
    teacher: TheftAttack

    def __call__(self, observation: TheftObservation) -> Task:
        known, teacher = labelled(observation), self.teacher(observation)
        some = observation.unlabelled[:_MOST]
        # As many labelled images as unlabelled ones, so that few labels are not drowned.
        times = max(1, len(some) // len(known.pixels))
        return Task(
            start=teacher.weights,
            pixels=torch.cat([some, known.pixels.repeat(times, 1, 1, 1)]),
            targets=torch.cat([_votes(observation, teacher, some), known.targets.repeat(times, 1)]),
        )


def _votes(observation: TheftObservation, teacher: Stolen, pixels: Tensor) -> Tensor:
    model, generator = observation.model(teacher.weights), observation.generator()
    views = (observation.augmentation(pixels, generator) for _ in range(_VIEWS))
    answers = [predict(model, view) for view in views]
    classes = answers[0].shape[1]
    return torch.stack([F.one_hot(a.argmax(1), classes).float() for a in answers]).mean(0)
