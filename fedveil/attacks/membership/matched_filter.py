"""Membership by a matched filter: the best linear detector of one gradient in an update."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.attacks.inversion.observation import Observation
from fedveil.attacks.membership.per_image import MOST_NUMBERS, PerImageGradients
from fedveil.data.images import Images

_WIDEST = 5_000  # a covariance is diagonalised up to this size; a larger one is taken as diagonal
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class MatchedFilter:
    """Score candidate images by a likelihood ratio: is their gradient in the update, or not?

    An update is the candidate's gradient, if it was used, in the midst of other images' gradients,
    which are taken for Gaussian. Their covariance is learnt from public images, layer by layer: its
    eigenvectors are those of a Kronecker product, its eigenvalues measured along them. The score is
    then the log-likelihood ratio up to constants, ``gᵀC⁻¹u / sqrt(gᵀC⁻¹g)``, summed over layers.
    Directions in which all images differ alike count little, those in which they hardly differ
    count much.

    Sources: matched filter: Kay, "Fundamentals of Statistical Signal Processing: Detection
    Theory", 1998, section 4.4; the covariance: Martens & Grosse, "Optimizing Neural Networks with
    Kronecker-factored Approximate Curvature", ICML 2015, and George et al., "Fast Approximate
    Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS 2018; as a membership test
    ours.

    Args:
        damping: Added to each eigenvalue, in means of the layer's eigenvalues; chosen on sums of
            ten clients of ``cifar10@6/6``, which nothing reports.
        public: Most public images to learn from; fewer where their gradients would take more than
            2 GiB.
        together: Gradients computed at once.
        device: Where to compute; None for a GPU when there is one.

    Shape: any batch and model; local training of several steps is taken for one step.
    """

    damping: float = 0.003
    public: int = 512
    together: int = 16
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
        count = min(self.public, max(2, MOST_NUMBERS // gradients.length))
        known = torch.cat([*gradients.each(public[:count], self.together)])
        every = torch.arange(observation.victims)
        # What was sent differs from victim to victim; where all was sent, one basis serves.
        groups = every[:, None] if observation.sanitizer is not None else every[None]
        found = []
        for group in groups:
            seen = observation.select(group)
            sent = gradients.sent(seen)
            layers = _layers(gradients, known if sent is None else known * sent, self.damping)
            matched = _matched(gradients, gradients.rows(seen.gradients), sent, layers)
            parts = [
                _scores(gradients.matrices(rows if sent is None else rows * sent), layers, matched)
                for rows in gradients.each(candidates, self.together)
            ]
            found.append(torch.cat(parts, dim=1))
        return torch.cat(found).cpu()


@dataclass(frozen=True)
class _Layer:
    """How other images' gradients of one weight matrix [out, in] are distributed.

    Attributes:
        mean: [out, in].
        left: Orthogonal [out, out], or None for the identity.
        right: Orthogonal [in, in], or None for the identity.
        variance: [out, in], of the rotated gradients, damped.
    """

    mean: Tensor
    left: Tensor | None
    right: Tensor | None
    variance: Tensor

    @classmethod
    def of(cls, gradients: Tensor, damping: float) -> "_Layer":
        """Learn it from gradients [P, out, in]."""
        mean = gradients.mean(dim=0)
        rest = gradients - mean
        left = _eigenvectors(torch.einsum("poi,pqi->oq", rest, rest))
        right = (
            _eigenvectors(rest.flatten(0, 1).T @ rest.flatten(0, 1))
            if rest.shape[2] <= _WIDEST
            else None
        )
        plain = cls(torch.zeros_like(mean), left, right, torch.ones_like(mean))
        variance = sum(
            (plain.rotated(part).square().sum(dim=0) for part in torch.split(rest, 64)),
            start=torch.zeros_like(mean),
        ) / len(rest)
        return cls(mean, left, right, variance + damping * variance.mean())

    def rotated(self, gradients: Tensor) -> Tensor:
        """Return gradients [n, out, in] less the mean, in the basis of the eigenvectors."""
        rest = gradients - self.mean
        rest = rest if self.left is None else self.left.T @ rest
        return rest if self.right is None else rest @ self.right


def _layers(gradients: PerImageGradients, known: Tensor, damping: float) -> dict[str, _Layer]:
    layers = {
        name: _Layer.of(rows, damping)
        for name, rows in gradients.matrices(known).items()
        if bool(rows.any())
    }
    return {name: layer for name, layer in layers.items() if bool(layer.variance.any())}


def _matched(
    gradients: PerImageGradients, updates: Tensor, sent: Tensor | None, layers: dict[str, _Layer]
) -> dict[str, Tensor]:
    """Return V updates, rotated and over the variance in each direction, name to [V, out · in]."""
    seen = gradients.matrices(updates if sent is None else updates * sent)
    return {
        name: (layer.rotated(seen[name]) / layer.variance).flatten(1)
        for name, layer in layers.items()
    }


def _scores(
    rows: dict[str, Tensor], layers: dict[str, _Layer], matched: dict[str, Tensor]
) -> Tensor:
    common: Tensor | float = 0.0
    length: Tensor | float = 0.0
    for name, layer in layers.items():
        own = layer.rotated(rows[name])
        common = common + (matched[name] @ own.flatten(1).T).double()
        length = length + (own.square() / layer.variance).flatten(1).sum(dim=1).double()
    return torch.as_tensor(common) / torch.as_tensor(length).clamp_min(_TINY).sqrt()


def _eigenvectors(covariance: Tensor) -> Tensor | None:
    if len(covariance) == 1:
        return None
    vectors: Tensor = torch.linalg.eigh(covariance.double()).eigenvectors
    return vectors.to(covariance.dtype)
