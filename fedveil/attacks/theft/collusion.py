"""The copies of several clients, put together."""

from dataclasses import dataclass

from fedveil.attacks.theft.averaging import best_average
from fedveil.attacks.theft.observation import TheftObservation, distinct, mean_of

_WINDOWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Collude:
    """Average the distinct copies of each round, then the rounds in which most of them were met.

    Copies of one round come from one model, so what differs between them is the protection's: the
    two signs of one noise cancel exactly, the noises of c clients fall with the root of c, and
    equal copies (of the same sign) count once, for they add nothing. How many rounds are averaged
    is decided on the thief's holdout; rounds with more distinct copies come first, later ones among
    equals.

    Source: Ergun, Kilian & Kumar, "A note on the limits of collusion-resistant watermarks",
    EUROCRYPT 1999: averaging as the colluders' attack.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether more than one client's copies are there."""
        return len({copy.client for copy in observation.copies}) > 1

    def __call__(self, observation: TheftObservation) -> TheftObservation:
        """Return the observation with the average as its only copy."""
        rounds = sorted({copy.round for copy in observation.copies})
        met = [distinct([c.weights for c in observation.copies if c.round == r]) for r in rounds]
        # A stable sort: among rounds with as many copies the latest comes last, and counts first.
        ranked = sorted(met, key=len)
        return best_average(observation, [mean_of(copies) for copies in ranked], _WINDOWS)
