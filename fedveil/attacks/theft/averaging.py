"""One client's copies averaged over the rounds."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedveil.attacks.theft.as_received import Direct
from fedveil.attacks.theft.observation import TheftObservation, distinct, mean_of, with_copy
from fedveil.attacks.theft.probe import Probe
from fedveil.types import Weights

_WINDOWS = (2, 4, 8)


@dataclass(frozen=True)
class Last:
    """Combine nothing: the last copy alone."""

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there is a copy."""
        return bool(observation.copies)

    def __call__(self, observation: TheftObservation) -> TheftObservation:
        """Return the observation with the last copy only."""
        return with_copy(observation, observation.copies[-1].weights)


@dataclass(frozen=True)
class Every:
    """Combine nothing: every copy, for an attack that asks each of them."""

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there are several distinct copies."""
        return len(distinct([copy.weights for copy in observation.copies])) > 1

    def __call__(self, observation: TheftObservation) -> TheftObservation:
        """Return the observation."""
        return observation


@dataclass(frozen=True)
class AverageRounds:
    """Average the last 2, 4, 8 or all copies that the client of the last copy received.

    Independent noise falls with the root of their number, while older copies are of an older
    model; the thief's holdout decides how many.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether any client received more than one distinct copy."""
        return len(_own(observation)) > 1

    def __call__(self, observation: TheftObservation) -> TheftObservation:
        """Return the observation with the average as its only copy."""
        return best_average(observation, _own(observation), _WINDOWS)


def best_average(
    observation: TheftObservation, copies: Sequence[Weights], windows: Sequence[int]
) -> TheftObservation:
    """Average the last few copies; as many as suit the thief's holdout, directly or by a probe.

    Args:
        observation: What the thief has.
        copies: At least one, in the order of the rounds.
        windows: Numbers of copies to try; all of them is tried too.
    """
    counts = sorted({*(w for w in windows if w < len(copies)), len(copies)})
    averages = [with_copy(observation, mean_of(copies[-count:])) for count in counts]
    judge = [attack for attack in (Direct(), Probe()) if attack.applies(averages[0])]
    return max(averages, key=lambda seen: max(attack(seen).score for attack in judge))


def _own(observation: TheftObservation) -> list[Weights]:
    if not observation.copies:
        return []
    client = observation.copies[-1].client
    return distinct([copy.weights for copy in observation.copies if copy.client == client])
