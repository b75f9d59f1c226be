"""What a server can recognise in an update, without reconstructing anything."""

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from fedveil.attacks.inversion.observation import Observation, Uses, check_declared
from fedveil.attacks.membership.batch_statistics import BatchStatistics
from fedveil.attacks.membership.gradients import GradientMembership
from fedveil.attacks.membership.many_rounds import ManyRounds
from fedveil.attacks.membership.returned import ReturnedGradientNorm, ReturnedLoss
from fedveil.attacks.membership.span import Span
from fedveil.data.images import Images


class MembershipAttack(Protocol):
    """What every membership attack is: a small frozen object, called on an observation.

    Attributes:
        uses: What it makes of a known defence.
    """

    uses: ClassVar[Uses]

    def __call__(self, observation: Observation, candidates: Images, public: Images) -> Tensor:
        """Return the candidates' scores, float [V, M]; larger speaks for having been used."""
        ...


ATTACKS: Mapping[str, MembershipAttack] = {
    "gradient": GradientMembership(),
    "span": Span(),
    "loss": ReturnedLoss(),
    "gradient-norm": ReturnedGradientNorm(),
    "batch-statistics": BatchStatistics(),
}
"""Every membership attack by name."""
for _name, _attack in ATTACKS.items():
    check_declared(_name, _attack)

__all__ = [
    "ATTACKS",
    "BatchStatistics",
    "GradientMembership",
    "ManyRounds",
    "MembershipAttack",
    "ReturnedGradientNorm",
    "ReturnedLoss",
    "Span",
]
