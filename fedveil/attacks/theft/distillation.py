"""What the copy answers on unlabelled images teaches a student."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.attacks.theft.descent import Task, labelled, parameter_names, recipes, search
from fedveil.attacks.theft.direct import Direct
from fedveil.attacks.theft.holdout import predict
from fedveil.attacks.theft.observation import Stolen, TheftAttack, TheftObservation
from fedveil.attacks.theft.probe import Probe

_MOST = 1_000
_VIEWS = 4
_SHARPNESS = 2.0


@dataclass(frozen=True)
class Distil:
    """Train the copy on its own answers to unlabelled images, and on the labelled ones.

    The teacher is the copy, as it came or with a new output layer, whichever does better on the
    holdout; its answers are averaged over four augmented views and sharpened. Every fold has a
    teacher that never saw the fold's held-out labels.

    Sources: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; the averaging and
    the sharpening are of Berthelot et al., "MixMatch", NeurIPS 2019, section 3.2.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there are unlabelled images."""
        return len(observation.unlabelled) > 0

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
        pixels, targets = labelled(observation)
        some = observation.unlabelled[:_MOST]
        answers = _answers(observation, self.teacher(observation), some)
        # As many labelled images as unlabelled ones, so that few labels are not drowned.
        times = max(1, len(some) // len(pixels))
        return (
            torch.cat([some, pixels.repeat(times, 1, 1, 1)]),
            torch.cat([answers, targets.repeat(times, 1)]),
        )


def _answers(observation: TheftObservation, teacher: Stolen, pixels: Tensor) -> Tensor:
    model, generator = observation.model(teacher.weights), observation.generator()
    views = [
        predict(model, observation.augmentation(pixels, generator)).softmax(1)
        for _ in range(_VIEWS)
    ]
    sharpened: Tensor = torch.stack(views).mean(0) ** _SHARPNESS
    return sharpened / sharpened.sum(1, keepdim=True)
