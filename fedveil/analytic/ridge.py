"""The ridge that sums determine, its penalty chosen by generalised cross-validation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.analytic.statistics import Statistics
from fedveil.errors import FedveilError
from fedveil.wording import quantity

# Powers of two around the mean eigenvalue of G that are tried as λ.
_LOWEST, _HIGHEST, _PER_OCTAVE = -26, 6, 4

# As a whole image a mirror image would let few images be overfitted, and as none regularise too
# much: tried on 500 to 8,000 of CIFAR-10's training images, by hand.
_FURTHER_VIEW = 0.3

_DRAWS = 4

_NEVER = -1e4  # far below any discriminant


@dataclass(frozen=True)
class Head:
    """A linear classifier of features: scores are W·φ + b.

    Attributes:
        weight: W, float64 [K, D].
        bias: b, float64 [K].
        penalty: λ.
        error: GCV's estimate of the mean squared error on images that are not in the sums; NaN of
            sums with noise, which do not tell it.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    error: float


def ridge(statistics: Statistics, *, penalty: float | None = None, views: int = 1) -> Head:
    """Return the ridge regression of the classes' unit vectors on the features, with intercept.

    W = (G - N·mmᵀ + λI)⁻¹ (H - m·nᵀ), where m are the features' means and n the images of each
    class: the intercept is not penalised. Without ``penalty`` λ minimises

        V(λ) = (‖Y - Ŷ‖²/N) / (1 - (1 + tr S(λ))/N)²,

    which takes nothing but the sums. N there counts an image's further views for less than one
    each, since they are no independent images.

    Source: Golub, Heath and Wahba, "Generalized Cross-Validation as a Method for Choosing a Good
    Ridge Parameter", Technometrics 1979, equation 1.4.

    Args:
        statistics: The sums, of at least two images.
        penalty: λ, above 0; None for GCV's.
        views: How often an image is in the sums: twice with its mirror image.

    Raises:
        FedveilError: Too few images, or a penalty out of range.
    """
    images = statistics.images
    if images < 2:
        raise FedveilError(f"the sums hold {quantity(images, 'image')}; a ridge needs at least 2")
    if penalty is not None and not 0 < penalty < math.inf:
        raise FedveilError(f"a penalty of {penalty} is out of range: give a number above 0")
    counts, moments = statistics.counts.double(), statistics.moments
    means = moments.sum(1) / images
    gram = statistics.gram.sub_(torch.outer(means, means), alpha=images)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_(min=0)
    targets = vectors.T @ (moments - torch.outer(means, counts))
    spread = float(images - counts.square().sum() / images)
    equations = images * (1 + _FURTHER_VIEW * (views - 1))
    spectrum = _Spectrum(values, targets.square().sum(1), spread, equations)
    chosen = spectrum.best() if penalty is None else penalty
    weight = (vectors @ (targets / (values[:, None] + chosen))).T
    bias = counts / images - weight @ means
    return Head(weight, bias, chosen, spectrum.error(chosen))


def balanced(head: Head, statistics: Statistics) -> Head:
    """Return the same scores turned into discriminants of classes that are all as likely.

    A ridge of few images of a class seldom says it. Its scores z = W·φ + b hold all that the sums
    tell of which class an image is of; as normal variables with the classes' means m and one
    covariance S, both of which follow from the sums, class c is told by mᵀS⁻¹z - mᵀS⁻¹m/2, which
    asks for no class's number of images. A class without any is never said.

    Source: Hastie, Buja and Tibshirani, "Penalized Discriminant Analysis", Annals of Statistics
    1995, section 3: discriminants by way of regression.

    Args:
        head: The ridge of the sums.
        statistics: The sums.
    """
    counts = statistics.counts.double()
    there = counts > 0
    averages = statistics.moments / counts.clamp(min=1)
    centres = (head.weight @ averages + head.bias[:, None]).T[there]
    lengths = counts[there, None] * (head.weight @ averages).T[there]
    spread = head.weight @ statistics.gram @ head.weight.T
    spread -= (head.weight @ averages).T[there].T @ lengths
    # The scores of a ridge with an intercept add up to 1: one direction has no spread.
    inverse = torch.linalg.pinv(spread / statistics.images, rtol=1e-9, hermitian=True)
    turned = torch.zeros_like(head.weight @ head.weight.T)
    turned[there] = centres @ inverse
    bias = torch.full_like(head.bias, _NEVER)
    bias[there] = turned[there] @ head.bias - (turned[there] * centres).sum(1) / 2
    return Head(turned @ head.weight, bias, head.penalty, head.error)


def noisy_ridge(
    statistics: Statistics, *, noise: float, images: int = 0, public: Statistics | None = None
) -> Head:
    """Return a ridge of sums with noise, for features that are centred already.

    Targets are the classes' unit vectors less 1/K, so that no class's number of images is needed:
    W = (G + λI)⁻¹ (H - m·1ᵀ/K), with m = H·1. λ is the length that G's noise has in any direction
    at most, 2·(σ/√2)·√D, in the manner of AdaSSP, and takes nothing of the sums.

    With ``public`` sums each entry of G and of the centred H is a mean of the noisy one and of the
    public images' own, brought to N images, weighted by their precisions. Noise has the variances
    σ²/2 and σ². P public images, whose mean φφᵀ is S and of which class c has the part p, have
    N²·SᵢᵢSⱼⱼ/P and N²·Sⱼⱼ·(p - 2p/K + 1/K²)/P. Of G's noise less is left then: λ is the mean length
    of noise drawn anew in what spread is left, and, as far as H is the public images', the λ of
    their own ridge. The more noise there is, the nearer W is to that ridge's.

    Source: Wang, "Revisiting Differentially Private Linear Regression: Optimal and Adaptive
    Prediction & Estimation in Unbounded Domain", UAI 2018, algorithm 2. The public images are ours.

    Args:
        statistics: The sums; their counts are not looked at.
        noise: Standard deviation of the noise on G's diagonal and on H; σ/√2 beside the diagonal.
        images: N, how many the sums are of; of no matter without ``public``.
        public: Sums of labelled images of the same kind that nobody hides.

    Raises:
        FedveilError: ``noise`` is not above 0.
    """
    if not 0 < noise < math.inf:
        raise FedveilError(f"noise={noise} is out of range: give a number above 0")
    gram, moments = statistics.gram, _centred(statistics)
    penalty = math.sqrt(2 * len(moments)) * noise
    if public is not None and public.images > 1:
        known, scale = public.gram, images / public.images
        powers = known.mul_(scale).diagonal()
        weights = _precision(torch.outer(powers, powers) / public.images, noise**2 / 2)
        part, classes = public.counts.double() / public.images, moments.shape[1]
        squares = part - 2 * part / classes + 1 / classes**2
        shares = _precision(torch.outer(powers, squares) * scale, noise**2)
        penalty = noise * length_of_noise(weights)
        penalty += float(1 - shares.mean()) * scale * ridge(public).penalty
        gram = torch.lerp(known, gram, weights)
        moments = torch.lerp(_centred(public) * scale, moments, shares)
    values, vectors = torch.linalg.eigh(gram)
    raised = values.clamp_(min=0)[:, None] + penalty
    weight = (vectors @ ((vectors.T @ moments) / raised)).T
    return Head(weight, torch.zeros(len(weight), dtype=torch.float64), penalty, math.nan)


def _centred(statistics: Statistics) -> Tensor:
    """Return Σ φ(y - 1/K)ᵀ, float64 [D, K]."""
    moments = statistics.moments
    return moments - moments.sum(1, keepdim=True) / moments.shape[1]


def _precision(of_others: Tensor, of_noise: float) -> Tensor:
    """Return how much what is noisy counts beside what has the others' variances."""
    return of_others / (of_others + of_noise)


def length_of_noise(weights: Tensor) -> float:
    """Return the spectral norm of symmetric noise of spread weights/√2, the mean of some draws."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(_DRAWS):
        drawn = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        symmetric = (drawn + drawn.T).div_(2).mul_(weights)
        found.append(float(torch.linalg.eigvalsh(symmetric).abs().max()))
    return sum(found) / _DRAWS


@dataclass(frozen=True)
class _Spectrum:
    """All that GCV needs.

    Attributes:
        values: Eigenvalues of the centred G, float64 [D].
        powers: Squared length of the centred H along each eigenvector, float64 [D].
        spread: ‖Y - mean‖².
        equations: N; images, and what their further views count for.
    """

    values: Tensor
    powers: Tensor
    spread: float
    equations: float

    def error(self, penalty: float) -> float:
        """Return V(λ); infinite where the fit has as many freedoms as images."""
        raised = self.values + penalty
        fitted = self.powers / raised
        left = self.spread - 2 * fitted.sum() + (fitted / raised * self.values).sum()
        freedom = 1 - (1 + float((self.values / raised).sum())) / self.equations
        if freedom <= 0:
            return math.inf
        return max(float(left), 0.0) / self.equations / freedom**2

    def best(self) -> float:
        """Return the λ of least error among powers of 2¹ᐟ⁴; the largest of equally good ones."""
        middle = float(self.values.mean()) or 1.0
        tried = [
            middle * 2 ** (step / _PER_OCTAVE)
            for step in range(_HIGHEST * _PER_OCTAVE, _LOWEST * _PER_OCTAVE - 1, -1)
        ]
        return min(tried, key=self.error)
