"""What a server can recognise in an update, without reconstructing anything."""

from collections.abc import Callable, Mapping

from torch import Tensor

from fedveil.attacks.inversion.observation import Observation
from fedveil.attacks.membership.gradients import GradientMembership
from fedveil.attacks.membership.span import Span
from fedveil.data.images import Images

ATTACKS: Mapping[str, Callable[[Observation, Images, Images], Tensor]] = {
    "gradient": GradientMembership(),
    "span": Span(),
}
"""Every membership attack by name: observation, candidates and public images to scores [V, M]."""

__all__ = ["ATTACKS", "GradientMembership", "Span"]
