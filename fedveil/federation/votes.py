"""Differential privacy of clients' votes on the server's images."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.analytic.privacy import NoisyRelease, Unit, noise_sharers
from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator

VOTE_BITS = 24
"""A vote is 2²⁴ units, so that noise is rounded finely."""

_UNIT = float(2**VOTE_BITS)
_FAR = 10.0  # standard deviations beyond which a normal value is once in 10²³ times
_LARGEST = 2.0 ** (61 - VOTE_BITS)


@dataclass(frozen=True)
class VoteRelease(NoisyRelease):
    """Clients' votes that are released once, with normal noise.

    A client names one class for each of N images. Whatever its images are replaced by, at most N
    votes go from one class to another, so the sum moves by √(2N) at most; where its votes are left
    out, by √N. The noise is for the greater.

    Source: the votes, Papernot et al., "Semi-supervised Knowledge Transfer for Deep Learning from
    Private Training Data", ICLR 2017; normal noise, Papernot et al., "Scalable Private Learning
    with PATE", ICLR 2018, section 4.1, without its selection of images and on all of them at once;
    how much, Balle and Wang, ICML 2018.

    Raises:
        FedveilError: A number out of range.
    """

    unit: Unit = field(default="client", init=False)

    @property
    def adjacency(self) -> str:
        """What two neighbouring data sets are."""
        return (
            "one client's images replaced by any others, or its votes left out; who takes part, "
            "and with how many images, is taken as public"
        )

    def scale(self, questions: int) -> float:
        """Return the standard deviation σ of the noise on each count of votes that is enough."""
        return self.multiplier * math.sqrt(2 * questions)

    def noise(self, questions: int, *, clients: int, asked: int | None) -> float:
        """Return the standard deviation of the noise in a sum of votes.

        Args:
            questions: N.
            clients: How many are in it.
            asked: Of how many the secure sum was asked; None where each is seen alone.
        """
        return self.scale(questions) * math.sqrt(clients / noise_sharers(asked))

    def noised(
        self, votes: Tensor, classes: int, generator: SecureGenerator, clients: int | None
    ) -> Tensor:
        """Return a client's votes with its share of the noise, int64 [N, K] in units of 2⁻²⁴.

        Args:
            votes: The class it names for each image, int64 [N].
            classes: K.
            generator: Fresh.
            clients: Clients of the secure sum, of which half make all of the noise that is needed;
                None where each is seen alone, and makes all of it.

        Raises:
            FedveilError: So little ε takes noise that no word holds.
        """
        each = self.noise(len(votes), clients=1, asked=clients)
        if _FAR * each * math.sqrt(clients or 1) > _LARGEST:
            raise FedveilError(
                f"epsilon={self.epsilon:g} takes noise of {each:.2g} on {len(votes)} votes, more "
                "than 64-bit words hold: give more, or fewer --calibration-images"
            )
        noise = generator.normal(len(votes), classes) * each
        return ((F.one_hot(votes, classes) + noise) * _UNIT).round().to(torch.int64)


def counted(words: Tensor) -> Tensor:
    """Return the noisy numbers of votes in a sum, float64."""
    return words.double() / _UNIT


def vote_fault(words: Tensor, *, clients: int, noise: float) -> str | None:
    """Say what shows that these are no noisy votes of so many clients, if anything does."""
    if float(counted(words).abs().max()) > clients + _FAR * noise:
        return f"its counts are none of {clients} votes and the noise asked for"
    return None


def shares(counts: Tensor, clients: int) -> Tensor:
    """Return the probabilities nearest to what noisy counts of votes say, float64 [N, K].

    Source: Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions",
    ICML 2008, figure 1.

    Args:
        counts: [N, K].
        clients: How many voted.
    """
    told = counts / clients
    ordered = told.sort(dim=1, descending=True).values
    over = (ordered.cumsum(1) - 1) / torch.arange(1, told.shape[1] + 1)
    last = (ordered > over).sum(1, keepdim=True) - 1
    return (told - over.gather(1, last)).clamp(min=0)
