"""Training of which learning rate, decay and length are chosen on the thief's own holdout."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from fedveil.attacks.theft.holdout import Score, predict, score_folds
from fedveil.attacks.theft.observation import Stolen, TheftObservation
from fedveil.models.layout import memory_layout
from fedveil.types import Weights

_BATCH = 32
_CLIP = 5.0
_RUNGS = ((30, (10, 30, 90)), (300, (30, 90, 270)), (sys.maxsize, (60, 180, 540)))
_SURVIVORS = 3


@dataclass(frozen=True)
class Task:
    """What to learn, and from where.

    Attributes:
        start: State of the model before the first step.
        pixels: float [N, C, H, W] in [0, 1].
        targets: What to answer, float [N, classes]; each row sums to 1.
    """

    start: Weights
    pixels: Tensor
    targets: Tensor


Tasks = Callable[[TheftObservation], Task]
"""What a thief trains on, given what it holds."""


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        rate: Step size of Adam.
        decay: Decoupled weight decay.
        trained: Names of the parameters that move.
        discarded: Names of those that start from a fresh initialisation.
    """

    rate: float
    decay: float
    trained: tuple[str, ...]
    discarded: tuple[str, ...] = ()


# Three step sizes, a decade and a half; the larger ones also with weight decay.
_STEPS = ((5e-4, 0.0), (2e-3, 0.0), (2e-3, 0.1), (8e-3, 0.1))


def recipes(trained: Sequence[str], *, discarded: Sequence[str] = ()) -> tuple[Recipe, ...]:
    """Return the ways to train these parameters that every attack tries, training alone too."""
    return tuple(Recipe(rate, decay, tuple(trained), tuple(discarded)) for rate, decay in _STEPS)


def labelled(observation: TheftObservation) -> Task:
    """Return the copy, the thief's labelled images, and their labels as probabilities."""
    classes = predict(observation.architecture, observation.labelled.pixels[:1]).shape[1]
    targets = F.one_hot(observation.labelled.labels, classes).float()
    return Task(observation.start, observation.labelled.pixels, targets)


def search(
    observation: TheftObservation, candidates: Sequence[Recipe], tasks: Tasks = labelled
) -> Stolen:
    """Train by each recipe, keep what does best on the holdout, and train so on all labels.

    Successive halving: all recipes run for a while, the best third of them on, and so on. Every
    look at the holdout is a candidate for when to stop. The winner is trained anew on all labelled
    images, for as many steps.

    Source: Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
    Optimization", AISTATS 2016, Algorithm 1, with a factor of 3.

    Args:
        observation: What the thief has.
        candidates: At least one.
        tasks: What to train on.
    """
    runs = {recipe: _Trial(observation, recipe, tasks) for recipe in candidates}
    seen: list[tuple[Score, Recipe, int]] = []
    for steps in next(rungs for most, rungs in _RUNGS if len(observation.labelled) < most):
        ranked = sorted(
            ((trial.after(steps), recipe) for recipe, trial in runs.items()),
            key=lambda entry: entry[0],
            reverse=True,
        )
        seen += [(result, recipe, steps) for result, recipe in ranked]
        runs = {recipe: runs[recipe] for _, recipe in ranked[: -(-len(ranked) // _SURVIVORS)]}
    best, recipe, steps = max(seen, key=lambda entry: entry[0])
    final = _Descent(observation, recipe, tasks(observation))
    final.until(steps)
    return Stolen(final.weights, best)


class _Trial:
    """One recipe on every fold."""

    def __init__(self, observation: TheftObservation, recipe: Recipe, tasks: Tasks) -> None:
        self._labelled, self._folds = observation.labelled, observation.folds
        holders = [observation.holding(fold.train) for fold in self._folds]
        self._descents = [_Descent(holder, recipe, tasks(holder)) for holder in holders]

    def after(self, steps: int) -> Score:
        logits = [
            predict(descent.until(steps), self._labelled[fold.held_out].pixels)
            for fold, descent in zip(self._folds, self._descents, strict=True)
        ]
        return score_folds(self._folds, self._labelled.labels, logits)


class _Descent:
    """Adam on minibatches of augmented images, which can stop and go on."""

    def __init__(self, observation: TheftObservation, recipe: Recipe, task: Task) -> None:
        fresh = observation.architecture.state_dict()
        discarded = {name: fresh[name] for name in recipe.discarded}
        self.model = observation.model({**task.start, **discarded})
        memory_layout(self.model, task.pixels[:1])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in recipe.trained)
        self._moving = [p for p in self.model.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(
            self._moving, recipe.rate, weight_decay=recipe.decay, fused=True
        )
        self._pixels, self._targets = task.pixels, task.targets
        self._augment = observation.augmentation
        self._generator = observation.generator()
        self._order = torch.empty(0, dtype=torch.int64)
        self._steps = 0

    @property
    def weights(self) -> Weights:
        return {
            name: value.detach().contiguous() for name, value in self.model.state_dict().items()
        }

    def until(self, steps: int) -> nn.Module:
        self.model.train()
        for _ in range(steps - self._steps):
            index = self._next()
            loss = F.cross_entropy(
                self.model(self._augment(self._pixels[index], self._generator)),
                self._targets[index],
            )
            loss.backward()  # type: ignore[no-untyped-call]
            clip_grad_norm_(self._moving, _CLIP)
            self._optimiser.step()
            self._optimiser.zero_grad(set_to_none=True)
        self._steps = max(self._steps, steps)
        return self.model

    def _next(self) -> Tensor:
        if not len(self._order):
            self._order = torch.randperm(len(self._pixels), generator=self._generator)
        batch, self._order = self._order[:_BATCH], self._order[_BATCH:]
        return batch


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all parameters, in the model's order."""
    return tuple(name for name, _ in model.named_parameters())
