"""The copies of several clients, put together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.attacks.theft.averaging import best_average
from fedveil.attacks.theft.observation import TheftObservation, distinct, mean_of
from fedveil.types import Weights

_WINDOWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Collude:
    """Average the distinct copies of each round, then the rounds in which most of them were met.

    Copies of one round come from one model, so what differs between them is the protection's: the
    two signs of one noise cancel exactly, the noises of c clients fall with the root of c, and
    equal copies count once, for they add nothing. Where three or more are known, they are first
    parted in two groups by the farthest pair, and the groups count alike: three copies of one sign
    and two of the other, each with a client's own small noise on top, would not cancel otherwise.
    How many rounds are averaged is decided on the thief's holdout; rounds with more distinct copies
    come first, later ones among equals.

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
        return best_average(observation, [balanced_mean(copies) for copies in ranked], _WINDOWS)


def balanced_mean(copies: Sequence[Weights]) -> dict[str, Tensor]:
    """Return the mean of the means of two groups of copies: those near either of the farthest two.

    Args:
        copies: At least one, of one round.
    """
    if len(copies) < 3:
        return mean_of(copies)
    flat = torch.stack([_flat(copy, mean_of(copies)) for copy in copies])
    apart = torch.cdist(flat, flat)
    one, other = divmod(int(apart.argmax()), len(copies))
    nearer = (apart[one] <= apart[other]).tolist()
    groups = [
        [copy for copy, near in zip(copies, nearer, strict=True) if near == side]
        for side in (True, False)
    ]
    return mean_of([mean_of(group) for group in groups if group])


def _flat(copy: Weights, shared: Weights) -> Tensor:
    return torch.cat(
        [copy[k].double().flatten() for k, v in shared.items() if v.is_floating_point()]
    )
