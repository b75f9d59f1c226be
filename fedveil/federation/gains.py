"""What one classifier is right on more than another, of the same images."""

import math
from dataclasses import dataclass

from torch import Tensor

_NORMAL = 1.959964  # 97.5 % of a normal variable lies below


@dataclass(frozen=True)
class Gain:
    """A difference of two accuracies on the same images.

    Attributes:
        gain: The difference.
        gain_low: Lower end of its 95 % interval over images.
        gain_high: Upper end.
    """

    gain: float
    gain_low: float
    gain_high: float


def gain_of(one: Tensor, other: Tensor) -> Gain:
    """Return what the first has over the second.

    Source: Agresti and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 2005: Wald's interval with half an image more in each cell,
    which is none of width 0 where the two err on the same images.

    Args:
        one: Which images the first is right on, bool [N].
        other: Which ones the second is.
    """
    better, worse = int((one & ~other).sum()), int((other & ~one).sum())
    count = len(one)
    middle = (better - worse) / (count + 2)
    spread = math.sqrt(better + worse + 1 - (better - worse) ** 2 / (count + 2)) / (count + 2)
    return Gain((better - worse) / count, middle - _NORMAL * spread, middle + _NORMAL * spread)
