"""Membership told by a client's updates of many rounds, against other clients' of the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedveil.attacks.inversion.observation import Observation
from fedveil.data.images import Images
from fedveil.errors import FedveilError
from fedveil.wording import quantity

_FEWEST = 3
_TINY = 1e-12


class _Scores(Protocol):
    def __call__(self, observation: Observation, candidates: Images, public: Images) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ManyRounds:
    """Score candidates by how far one client's updates stand out, round after round.

    Other clients of a round answer the same model and, as far as anybody knows, did not hold the
    candidate: their scores say what its score is where it was not used, however hard or common the
    image is. What the victim's own score exceeds their mean by, in their standard deviations, is
    averaged over the rounds: the image is the same in each, and the luck is not.

    The variance of so few clients is a poor guess, so it is averaged with the mean variance of all
    candidates of the round.

    Source: Zhu et al., "FedMIA: An Effective Membership Inference Attack Exploiting 'All for One'
    Principle in Federated Learning", CVPR 2025, section 4, whose average is of p-values; that
    of z and the shared variance are ours.

    Args:
        base: What scores one round.
        shared: Weight of the mean variance of all candidates, in [0, 1].
    """

    base: _Scores
    shared: float = 0.5

    def __call__(self, rounds: Sequence[Observation], candidates: Images, public: Images) -> Tensor:
        """Return the candidates' scores, float64 [1, M]; larger speaks for having been used.

        Args:
            rounds: Updates of the same clients in each, the victim's first, at least three others.
            candidates: M images with their labels, as a client would have trained on them.
            public: Images that nobody trained on, treated in the same way.

        Raises:
            FedveilError: No rounds, or too few other clients; or as of ``base``.
        """
        fewest = min((seen.victims for seen in rounds), default=0)
        if fewest <= _FEWEST:
            raise FedveilError(
                f"{quantity(len(rounds), 'round')} of {quantity(fewest, 'client')} cannot tell how "
                f"scores vary: give at least one round, of the victim and {_FEWEST} others"
            )
        scores = (self.base(seen, candidates, public).double().cpu() for seen in rounds)
        return self.combined([*scores])

    def combined(self, scores: Sequence[Tensor]) -> Tensor:
        """Return what scores of each round, float64 [V, M], come to, float64 [1, M]."""
        return torch.stack([self._stands_out(one[0], one[1:]) for one in scores]).mean(0)[None]

    def _stands_out(self, own: Tensor, others: Tensor) -> Tensor:
        variance = others.var(dim=0)
        variance = (1 - self.shared) * variance + self.shared * variance.mean()
        z: Tensor = (own - others.mean(dim=0)) / variance.clamp_min(_TINY**2).sqrt()
        return z
