"""What clients add to a model that the server's own labelled images are in."""

import math
from dataclasses import dataclass

from fedveil.federation.job import Job
from fedveil.types import Weights

_NORMAL = 1.959964  # 97.5 % of a normal variable lies below


@dataclass(frozen=True)
class Beside:
    """A model of the server's own labelled images beside w, which they count in.

    Attributes:
        images: How many they are.
        accuracy: Of the model that they alone give, on the report images.
        gain: What w's accuracy has over it.
        gain_low: Lower end of the gain's 95 % interval over report images.
        gain_high: Upper end.
    """

    images: int
    accuracy: float
    gain: float
    gain_low: float
    gain_high: float


def beside(job: Job, delivered: Weights, alone: Weights) -> Beside:
    """Compare w with what the server had without any client, image by image.

    Source: Agresti and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 2005: Wald's interval with half an image more in each cell,
    which is none of width 0 where the two err on the same images.

    Args:
        job: The run; it reports on other images than those that the server counts.
        delivered: w.
        alone: Of the server's images alone.
    """
    with_clients, without = job.right(delivered), job.right(alone)
    better = int((with_clients & ~without).sum())
    worse = int((without & ~with_clients).sum())
    count = len(without)
    middle = (better - worse) / (count + 2)
    spread = math.sqrt(better + worse + 1 - (better - worse) ** 2 / (count + 2)) / (count + 2)
    return Beside(
        images=len(job.evaluation.calibration),
        accuracy=int(without.sum()) / count,
        gain=(better - worse) / count,
        gain_low=middle - _NORMAL * spread,
        gain_high=middle + _NORMAL * spread,
    )
