"""Differential privacy of one release of sums: how much noise, and what it comes to."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch

from fedveil.analytic.statistics import FRACTION_BITS, Layout, Statistics
from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator

Unit = Literal["image", "client"]

ADJACENCY = {
    "image": "one image of a client added or removed; how many images a client has is taken as "
    "public",
    "client": "one client's images left out of the sums; who takes part, and with how many images, "
    "is taken as public",
}
"""What two neighbouring data sets are, by unit."""

NOISE_FROM = 0.5
"""Part of a sum's clients whose shares of the noise are enough by themselves."""

_SMALLEST, _LARGEST = 1e-6, 1e9


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Return δ of normal noise of standard deviation ``sigma`` on a release of sensitivity 1.

    Source: Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018,
    theorem 8.
    """
    # Long to import, which every message to a client would pay for, under whatever strategy.
    from scipy.special import log_ndtr

    shift, half = epsilon * sigma, 1 / (2 * sigma)
    first, second = log_ndtr(half - shift), epsilon + log_ndtr(-half - shift)
    return float(math.exp(first) * -math.expm1(min(second - first, 0.0)))


def gaussian_sigma(epsilon: float, delta: float) -> float:
    """Return the least noise for (ε, δ) at sensitivity 1 (same source, algorithm 1)."""
    from scipy.optimize import brentq

    return float(brentq(lambda sigma: gaussian_delta(epsilon, sigma) - delta, _SMALLEST, _LARGEST))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Return ε of noise at sensitivity 1; 0 where δ alone pays for it."""
    from scipy.optimize import brentq

    if gaussian_delta(0.0, sigma) <= delta:
        return 0.0
    most = 1.0
    while gaussian_delta(most, sigma) > delta:
        most *= 2
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, sigma) - delta, 0.0, most))


@dataclass(frozen=True)
class NoisyRelease:
    """Something that clients return once, with normal noise, and what that promises.

    Attributes:
        epsilon: ε, above 0.
        delta: δ, in (0, 1).
        unit: Whom it protects: a single ``image`` or all of a ``client``.

    Raises:
        FedveilError: A number out of range.
    """

    epsilon: float
    delta: float = 1e-5
    unit: Unit = "image"

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1000:
            raise FedveilError(f"epsilon={self.epsilon} is out of range: give above 0, to 1000")
        if not 0 < self.delta < 1:
            raise FedveilError(f"delta={self.delta} is out of range: give above 0 and below 1")
        if self.unit not in ADJACENCY:
            raise FedveilError(f"privacy unit {self.unit!r} is unknown; known: image, client")

    @property
    def multiplier(self) -> float:
        """Noise on a release of sensitivity 1."""
        return gaussian_sigma(self.epsilon, self.delta)

    def spent(self, releases: int) -> float:
        """Return ε of several such releases of the same images or client."""
        return gaussian_epsilon(self.multiplier / math.sqrt(max(releases, 1)), self.delta)

    @property
    def allows(self) -> tuple[float, float]:
        """Most that any attack on one release comes to: area, and share found at a rate of 1 %.

        Two normal distributions a sensitivity apart (Dong, Roth and Su, "Gaussian Differential
        Privacy", JRSS B 2022, theorem 2.7).
        """
        normal, apart = NormalDist(), 1 / self.multiplier
        return normal.cdf(apart / math.sqrt(2)), normal.cdf(apart - normal.inv_cdf(0.99))

    @property
    def adjacency(self) -> str:
        """What two neighbouring data sets are."""
        return ADJACENCY[self.unit]


@dataclass(frozen=True)
class GaussianRelease(NoisyRelease):
    """Sums that are released once, with normal noise.

    An image adds φφᵀ, of Frobenius norm 1 at most, and φyᵀ, of the same: √2 together. A client
    adds as much for each of the images it may sum. The numbers of images of each class are not
    released.

    Raises:
        FedveilError: A number out of range.
    """

    def scale(self, most_images: int) -> float:
        """Return the standard deviation σ of the noise on the sums' entries, in units of φ = 1.

        It is σ on G's diagonal and on H, and σ/√2 beside the diagonal, where an entry stands for
        two.

        Args:
            most_images: Images a client sums at most.
        """
        sensitivity = math.sqrt(2) * (most_images if self.unit == "client" else 1)
        return self.multiplier * sensitivity

    def noised(
        self, sums: Statistics, generator: SecureGenerator, *, most_images: int, sharers: int
    ) -> Statistics:
        """Return sums with a client's share of the noise, and without its numbers of images.

        The noise of ``sharers`` clients together has the standard deviation ``scale``. Noise is
        rounded to the sums' unit, 2⁻²⁸ and 2⁻¹⁴ of what an image adds: a sum of so finely rounded
        normal values is that of normal values but for e^(-2π²σ²) with σ in those units.

        Source: Dwork et al., "Our Data, Ourselves: Privacy Via Distributed Noise Generation",
        EUROCRYPT 2006.

        Args:
            sums: One client's.
            generator: Fresh.
            most_images: Images a client sums at most.
            sharers: Clients whose noise is enough together.
        """
        layout = sums.layout
        each = self.scale(most_images) / math.sqrt(sharers)
        moments = layout.dimension * layout.classes
        noise = generator.normal(layout.triangle + moments) * each
        upper = noise[: layout.triangle]
        diagonal = torch.tensor([place.start for _, place in layout.rows()])
        on_diagonal = upper[diagonal]
        upper.div_(math.sqrt(2))
        upper[diagonal] = on_diagonal
        upper.mul_(2.0 ** (2 * FRACTION_BITS))
        noise[layout.triangle :].mul_(2.0**FRACTION_BITS)
        words = sums.words.clone()
        words[: len(noise)] += noise.round().to(torch.int64)
        words[len(noise) :] = 0
        return Statistics(layout, words)


def traceable(dimension: int, *, images: int, public: int, classes: int = 0) -> tuple[float, float]:
    """Return the area, and the share found at a rate of 1 %, that tracing sums comes to.

    Two normal distributions so many standard deviations apart as
    ``fedveil.attacks.membership.leverage.Tracing`` says of G, or ``Column`` of the sum of a class,
    whichever is more. Of photographs a little less is found, since their features are no normal
    numbers.

    Args:
        dimension: D.
        images: N, of the sums, without noise.
        public: P, images of the same kind that the attacker has besides.
        classes: K, taken to have as many images each; 0 leaves the sums of classes aside.
    """
    by_squares, by_classes = (
        dimension / math.sqrt(2 * images),
        math.sqrt(dimension * classes / images),
    )
    apart = max(by_squares, by_classes) / math.sqrt(1 + images / public)
    normal = NormalDist()
    return normal.cdf(apart / math.sqrt(2)), normal.cdf(apart - normal.inv_cdf(0.99))


def noise_sharers(clients: int | None) -> int:
    """Return how many clients' noise must be enough: half of a sum's, or the one seen alone.

    Args:
        clients: Clients of the sum; None where each is seen alone.
    """
    return 1 if clients is None else math.ceil(NOISE_FROM * clients)


def noisy_fault(sums: Statistics, *, images: int, scale: float) -> str | None:
    """Say what shows that these are no noisy sums of so many images, if anything does.

    Args:
        sums: One client's, or several clients' together.
        images: How many they are said to be of.
        scale: Standard deviation of all noise in them.
    """
    layout: Layout = sums.layout
    room = images + 10 * scale  # a normal value is beyond ten deviations once in 10²³ times
    upper = sums.words[: layout.triangle].double().abs().max() * 2.0 ** (-2 * FRACTION_BITS)
    if float(upper) > room or float(sums.moments.abs().max()) > room:
        return f"its entries are none of {images} images of norm 1 and the noise asked for"
    if bool(sums.counts.any()):
        return "it tells how many images of each class it has, which was not asked for"
    return None
