"""What a client that wants the model has of it, and what an attack makes of that."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fedveil.attacks.theft.holdout import Fold, Score, folds
from fedveil.data import Images
from fedveil.data.augmentation import Augmentation
from fedveil.errors import FedveilError
from fedveil.types import Copy, Weights

Honest = Callable[[nn.Module, Images], None]
"""The client's own local training: trains a model in place on images."""


@dataclass(frozen=True)
class TheftObservation:
    """All that the attacks of this package may see. It never holds w or an image of a test split.

    Attributes:
        architecture: The public model, with a fresh initialisation of the thief's own. Takes float
            [N, C, H, W] in [0, 1], returns logits [N, classes].
        copies: What the thief and those who collude with it received, in the order of the rounds.
            Empty for somebody who trains alone.
        labelled: The thief's labelled images; the n of the audit, which may be 0.
        unlabelled: float [M, C, H, W] in [0, 1], further images of its own; M may be 0.
        noised: Parameters in which the public defence degrades copies (Kerckhoffs: the thief knows
            the defence, but not its keys). Empty where there is none.
        honest: The local training an honest client does.
        augmentation: Changes of an image that leave its class as it is; for attacks and for
            training alone alike.
        seed: The thief's own randomness.

    Raises:
        FedveilError: One labelled image.
    """

    architecture: nn.Module
    copies: tuple[Copy, ...]
    labelled: Images
    unlabelled: Tensor
    noised: tuple[str, ...]
    honest: Honest
    augmentation: Augmentation
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.labelled) == 1:
            raise FedveilError(
                "the thief holds 1 labelled image; it needs at least 2, one to learn from and one "
                "to check with, or none"
            )

    @property
    def start(self) -> dict[str, Tensor]:
        """The last copy, with a fresh initialisation wherever it lacks something.

        Without any copy, a fresh initialisation.
        """
        state = dict(self.architecture.state_dict())
        if not self.copies:
            return state
        return state | {
            name: value
            for name, value in self.copies[-1].weights.items()
            if name in state and value.shape == state[name].shape
        }

    @property
    def has_labels(self) -> bool:
        """Whether there is a labelled image."""
        return len(self.labelled) > 0

    @property
    def folds(self) -> tuple[Fold, ...]:
        """How the labelled images divide; the same for every attack."""
        return folds(len(self.labelled), seed=self.seed)

    def holding(self, index: Tensor) -> "TheftObservation":
        """Return what a thief with only some of the labelled images has; int64 [K]."""
        return replace(self, labelled=self.labelled[index])

    def model(self, weights: Weights) -> nn.Module:
        """Return the architecture with these weights, in evaluation mode."""
        model = deepcopy(self.architecture).eval()
        model.load_state_dict(dict(weights))
        return model

    def generator(self) -> torch.Generator:
        """Return a source of random numbers, the same at every call."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Stolen:
    """What an attack made.

    Attributes:
        weights: The stolen model.
        score: How its making did on the thief's own held-out images; the thief's only yardstick.
    """

    weights: Weights
    score: Score


class TheftAttack(Protocol):
    """What every attack of this package is: a small frozen object, called on an observation."""

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there is anything for the attack to do here."""
        ...

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Make a model of the last copy."""
        ...


class Combination(Protocol):
    """Makes one copy of several, before an attack goes to work on it."""

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there is anything to combine."""
        ...

    def __call__(self, observation: TheftObservation) -> TheftObservation:
        """Return the observation with the combined copy as its last and only one."""
        ...


def mean_of(copies: Sequence[Weights]) -> dict[str, Tensor]:
    """Return the mean of copies, tensor by tensor; counters are the last copy's.

    Summed in float64, so that the two signs of one noise cancel to the last bit but one. What not
    every copy holds in the same shape is left out.

    Args:
        copies: At least one, in the order of the rounds.
    """
    last = copies[-1]
    shared = {
        name: value
        for name, value in last.items()
        if all(name in copy and copy[name].shape == value.shape for copy in copies)
    }
    return {
        name: torch.stack([copy[name].double() for copy in copies]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in shared.items()
    }


def with_copy(observation: TheftObservation, weights: Weights) -> TheftObservation:
    """Return the observation with one copy of the thief's making instead of those it received."""
    last = observation.copies[-1]
    return replace(observation, copies=(Copy(last.round, last.client, weights),))


def distinct(copies: Sequence[Weights]) -> list[Weights]:
    """Return copies without repetition, the first of equal ones."""
    kept: list[Weights] = []
    for copy in copies:
        if not any(_equal(copy, other) for other in kept):
            kept.append(copy)
    return kept


def _equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
