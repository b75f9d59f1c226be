"""Which of some candidate images a client trained on, told from its update, none rebuilt."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedveil.attacks.inversion.observation import Observation, Uses
from fedveil.attacks.membership.per_image import MOST_NUMBERS, PerImageGradients
from fedveil.data.images import Images

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class GradientMembership:
    """Score candidate images by how much of an update only their own gradient explains.

    An update is a mean of the gradients of the client's images. The gradient of a candidate that is
    one of them has a part in common with it that the gradients of other images have not. What is
    common to all images, the classes' and the model's, is taken out first: the score is the cosine
    of the update and the candidate's gradient after both were regressed on the gradients of public
    images (by ridge regression), times the update's length. Whoever has candidates needs no
    reconstruction, and noise that ruins one leaves most of this: a sum over all weights averages it
    away.

    Source: Li, Li & Ribeiro, "Effective Passive Membership Inference Attacks in Federated Learning
    Against Overparameterized Models", ICLR 2023, section 3 (cosine of a candidate's gradient and an
    update, which are orthogonal for others in large networks). The regression is ours.

    Args:
        ridge: Weight of the squared coefficients of the regression, whose regressors have length 1.
        public: Most public images to regress on; fewer where their gradients would take more than
            2 GiB.
        device: Where to compute; None for a GPU when there is one.

    Shape: any batch and model; local training of several steps is taken for one step.

    Example:
        >>> GradientMembership()(observation, candidates, public)  # doctest: +SKIP
    """

    uses: ClassVar = Uses(sanitizer=True)

    ridge: float = 0.01
    public: int = 256
    device: torch.device | None = None

    def __call__(self, observation: Observation, candidates: Images, public: Images) -> Tensor:
        """Return the candidates' scores, float64 [V, M]; larger speaks for having been used.

        Args:
            observation: Updates of V victims. Its ``sanitizer``, where known, says which entries
                are compared; its ``knows`` is not used.
            candidates: M images with their labels, as a client would have trained on them.
            public: Images that nobody trained on, treated in the same way.
        """
        device = self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        gradients = PerImageGradients.of(observation, public, device)
        count = min(self.public, max(1, MOST_NUMBERS // gradients.length))
        regressors = torch.cat([*gradients.each(public[:count])])
        every = torch.arange(observation.victims)
        # What was sent differs from victim to victim; where all was sent, one regression serves.
        groups = every[:, None] if observation.sanitizer is not None else every[None]
        regressions = [
            _Regression.of(gradients, observation.select(group), regressors, self.ridge)
            for group in groups
        ]
        return torch.cat(
            [
                torch.cat([regression.scores(part) for regression in regressions])
                for part in gradients.each(candidates)
            ],
            dim=1,
        ).cpu()


@dataclass(frozen=True)
class _Regression:
    """Updates and the public gradients, of which only what was sent is compared.

    Attributes:
        updates: [V, D].
        sent: [1, D] of a single victim, 1 where its update tells something; None for everywhere.
        regressors: [P, D].
        inverse: Float64 [P, P], of their Gram matrix and the ridge.
        explained: Float64 [P, V], inner products of regressors and updates.
    """

    updates: Tensor
    sent: Tensor | None
    regressors: Tensor
    inverse: Tensor
    explained: Tensor

    @classmethod
    def of(
        cls,
        gradients: PerImageGradients,
        observation: Observation,
        regressors: Tensor,
        ridge: float,
    ) -> "_Regression":
        updates, left = gradients.rows(observation.gradients), regressors
        sent = gradients.sent(observation)
        if sent is not None:
            left, updates = regressors * sent, updates * sent
        lengths = left.norm(dim=1).clamp_min(_TINY)
        gram = (left @ regressors.T / lengths[:, None] / lengths).double()
        inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram)).to(gram))
        # Regressors of length 1: their lengths go into the products instead of a copy of them all.
        scaled = inverse / lengths[:, None] / lengths
        return cls(updates, sent, regressors, scaled, (regressors @ updates.T).double())

    def scores(self, candidates: Tensor) -> Tensor:
        """Return the scores, float64 [V, n], of gradients [n, D]."""
        seen = candidates if self.sent is None else candidates * self.sent
        across = (seen @ self.regressors.T).double()
        fitted = across @ self.inverse
        common = (seen @ self.updates.T).double() - fitted @ self.explained
        left = seen.double().square().sum(dim=1) - (fitted * across).sum(dim=1)
        return (common / left.clamp_min(_TINY).sqrt()[:, None]).T
