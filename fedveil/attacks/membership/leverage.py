"""Membership in the sums of an analytic federation: how well they explain an image."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.analytic import FRACTION_BITS, Statistics


@dataclass(frozen=True, kw_only=True)
class Leverage:
    """Score labelled candidates by their leverage in the sums.

    With z = (φ, y) the sums hold M = Σ zzᵀ, and zᵀM⁻¹z is 1 at most for an image that is in them,
    while another's may be anything: where there are fewer images than features every image in the
    sums lies in the span of M, and no other does. Beyond that the two differ by a part of 1 in
    1 + zᵀM⁻¹z. The leverage of z is that of φ alone plus the weighed square of the residual of the
    ridge that the sums determine, so that what w tells is in it.

    Source: leverages are those of Cook, "Detection of Influential Observation in Linear
    Regression", Technometrics 1977; that they tell members of a sum is ours.

    Args:
        ridge: Added to M before it is inverted, in means of its diagonal.
    """

    ridge: float = 1e-6

    def __call__(self, sums: Statistics, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the candidates' scores, float64 [M]; larger speaks for being in the sums.

        Args:
            sums: What the server sees; with or without noise.
            rows: int16 [M, D], as ``fedveil.analytic.quantised`` makes them of the features.
            labels: int64 [M].
        """
        moments, counts = sums.moments, sums.counts.double()
        joint = torch.cat(
            [
                torch.cat([sums.gram, moments], 1),
                torch.cat([moments.T, counts.diag()], 1),
            ]
        )
        floor = self.ridge * joint.diagonal().abs().mean()
        values, vectors = torch.linalg.eigh(joint)
        known = rows.double() * 2.0**-FRACTION_BITS
        given = torch.cat([known, F.one_hot(labels, len(counts)).double()], 1) @ vectors
        # Noise makes some values negative: no image is explained by what is not there.
        explained: Tensor = given.square() / values.clamp(min=0).add(floor)
        return -explained.sum(1)
