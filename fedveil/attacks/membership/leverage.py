"""Membership in the sums of an analytic federation: how well they explain an image."""

import math
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
    ridge that the sums determine, so that what w tells is in it. It asks for no public images;
    with them ``Tracing`` tells far more.

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
        both = joint(sums, sums.counts.double())
        values, vectors = torch.linalg.eigh(both)
        floor = self.ridge * both.diagonal().abs().mean()
        given = _vectors(rows, labels, len(sums.counts)) @ vectors
        # Noise makes some values negative: no image is explained by what is not there.
        explained: Tensor = given.square() / (values.clamp(min=0) + floor)
        return -explained.sum(1)


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """Score labelled candidates by how much better sums explain them than public images do.

    What leverage an image has in other people's sums is known from public images of the same kind:
    nearly the same, times how many images they are of. In sums that the image is in, it is less by
    a part of 1 in 1 + zᵀM⁻¹z. Of N images with D features and P public ones the two are

        D / √(2N·(1 + N/P))

    standard deviations apart: a sum hides who is in it from somebody who has the image, and others
    like it, only where it is of many more than D² images. Where there is noise of a known size, the
    score is zᵀS(M - N·R)Sz/zᵀSz with R the public mean of zzᵀ and S = (R + σ/√(2N)·I)⁻¹, which
    weighs every direction by what noise leaves of it.

    Source: that means of D numbers trace who is in them from public ones is Homer et al.,
    "Resolving Individuals Contributing Trace Amounts of DNA to Highly Complex Mixtures", PLoS
    Genetics 2008, and Dwork et al., "Robust Traceability from Trace Amounts", FOCS 2015; for such
    sums, by leverage, it is ours.

    Args:
        noise: σ on the diagonal of the sums; 0 for none.
        ridge: Added to moments before they are inverted, in means of their diagonal.
    """

    noise: float = 0.0
    ridge: float = 1e-6

    def __call__(
        self, sums: Statistics, rows: Tensor, labels: Tensor, *, images: int, public: Statistics
    ) -> Tensor:
        """Return the candidates' scores, float64 [M]; larger speaks for being in the sums.

        Args:
            sums: What the server sees; with or without noise.
            rows: int16 [M, D], as ``fedveil.analytic.quantised`` makes them of the features.
            labels: int64 [M].
            images: N, which the server knows with noise, too.
            public: Sums of images that are in no client's, without noise.
        """
        known = public.counts.double() / public.images
        usual = joint(public, public.counts.double()) / public.images
        given = _vectors(rows, labels, len(known))
        values, vectors = torch.linalg.eigh(usual)
        values = values.clamp(min=0)
        if not self.noise:
            expected = (given @ vectors).square() / (values + self.ridge * values.mean())
            explained = -Leverage(ridge=self.ridge)(sums, rows, labels)
            surplus: Tensor = expected.sum(1).log() - explained.log()
            return surplus
        more = joint(sums, known * images) - images * usual
        left = values + self.noise / math.sqrt(2 * images)
        weighed = (given @ vectors / left) @ vectors.T
        score: Tensor = ((weighed @ more) * weighed).sum(1) / (weighed * given).sum(1)
        return score


@dataclass(frozen=True, kw_only=True)
class Column:
    """Score labelled candidates by how well the sum of their class alone explains them.

    H has a column a class, the sum of its images' features, and G has none: with many classes a
    column is of few images, however many are in the sum. Of n images of a class with D features it
    lies √(D/n) standard deviations apart for a member, as if there were P images of it, with known
    mean, √(D/(n·(1 + n/P))). The score is the logarithm of a likelihood ratio of normal
    distributions, of n - 1 others and the candidate against n others.

    Source: that means of D numbers trace who is in them is Homer et al. 2008 and Dwork et al. 2015,
    as of ``Tracing``; of a column of such sums it is ours.

    Args:
        shrunk: Images of all classes that each class's public mean is taken to be of besides.
        ridge: Added to the public covariance before it is inverted, in means of its diagonal.
    """

    shrunk: float = 5.0
    ridge: float = 1e-6

    def __call__(
        self, sums: Statistics, rows: Tensor, labels: Tensor, *, public: Statistics, views: int = 1
    ) -> Tensor:
        """Return the candidates' scores, float64 [M]; larger speaks for being in the sums.

        Args:
            sums: What the server sees, without noise: noisy ones tell nobody how many images a
                class has.
            rows: int16 [M, D], as ``fedveil.analytic.quantised`` makes them of the features.
            labels: int64 [M].
            public: Sums of images that are in no client's, without noise.
            views: How often an image is in G.
        """
        mean = public.moments.sum(1) / public.images
        weight = public.counts.double() + self.shrunk
        means = (public.moments + self.shrunk * mean[:, None]) / weight
        spread = public.gram / public.images / views - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(spread)
        values = values.clamp(min=0)
        whiten = vectors / (values + self.ridge * values.mean()).sqrt()
        given = (rows.double() * 2.0**-FRACTION_BITS).T
        count, own = sums.counts.double()[labels], means[:, labels]
        held = sums.moments[:, labels]

        def far(others: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
            """Return squared distance and variance of what is left of so many others' sum."""
            off = whiten.T @ (left - others * own)
            return off.square().sum(0), others + others.square() / weight[labels] + self.ridge

        with_, without = far(count - 1, held - given), far(count, held)
        likely = (
            without[0] / without[1]
            - with_[0] / with_[1]
            + len(mean) * (without[1] / with_[1].clamp(min=self.ridge)).log()
        )
        return torch.where(count > 0, likely / 2, -torch.inf)


def joint(sums: Statistics, counts: Tensor) -> Tensor:
    """Return M = Σ zzᵀ with z = (φ, y), float64 [D + K, D + K].

    Args:
        sums: Whose G and H are its blocks.
        counts: Images of each class, float64 [K]; with noise those of the sums are none.
    """
    moments = sums.moments
    return torch.cat([torch.cat([sums.gram, moments], 1), torch.cat([moments.T, counts.diag()], 1)])


def _vectors(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return z = (φ, y), float64 [M, D + K]."""
    known = rows.double() * 2.0**-FRACTION_BITS
    return torch.cat([known, F.one_hot(labels, classes).double()], 1)
