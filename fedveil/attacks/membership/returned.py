"""Membership in what a client trained on, told by what the model it returns fits too well."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.attacks.inversion.observation import LocalSteps, Observation, Uses
from fedveil.attacks.membership.per_image import PerImageGradients, settled, train_as_client
from fedveil.attacks.membership.released import confidence
from fedveil.data.images import Images
from fedveil.errors import InapplicableAttackError

_FEWEST = 20  # public images, for shadows
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class _Returned(ABC):
    """Score candidates by how much better a returned model fits them than it should.

    What it should do is told by public images: a ridge regression on the image's class, on the
    confidence of the model that was sent, and on that of shadows, which are trained from it on
    halves of the public images as the client was on its own; each public image is compared with
    shadows that did not hold it.

    Args:
        shadows: Models to compare with, an even number; 0 for none.
        public: Most public images.
        ridge: Weight of the squared coefficients of the regression.
        seed: Seeds the shadows.
        device: Where to compute; None for a GPU when there is one.
    """

    uses: ClassVar = Uses()

    shadows: int = 2
    public: int = 512
    ridge: float = 1.0
    seed: int = 0
    device: torch.device | None = None

    def __call__(self, observation: Observation, candidates: Images, public: Images) -> Tensor:
        """Return the candidates' scores, float64 [V, M]; larger speaks for having been used.

        Args:
            observation: Updates of V victims after local training; what is known of a defence is
                not used.
            candidates: M images with their labels, as a client would have trained on them.
            public: Images that nobody trained on, treated in the same way.

        Raises:
            InapplicableAttackError: What came back is a gradient, or the model after one step.
        """
        if observation.local is None:
            raise InapplicableAttackError(
                "the client returned one gradient or step, which fits no image too well; use the "
                "gradient or the span test"
            )
        public = public[: self.public]
        known, given = self._difficulty(observation, candidates, public)
        scores = []
        for victim in range(observation.victims):
            model = settled(_returned(observation, victim, self._device()), public)
            seen = replace(observation, model=model)
            expected = _regressed(known, self.fits(seen, public), given, self.ridge)
            scores.append(self.fits(seen, candidates) - expected)
        return torch.stack(scores)

    @abstractmethod
    def fits(self, returned: Observation, images: Images) -> Tensor:
        """Return how well the model of ``returned`` fits each image, float64 [N]."""

    def _device(self) -> torch.device:
        return self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _difficulty(
        self, observation: Observation, candidates: Images, public: Images
    ) -> tuple[Tensor, Tensor]:
        """Return what tells how well public images and candidates should fit, float64 [N, F]."""
        assert observation.local is not None
        sent = settled(copy.deepcopy(observation.model).to(self._device()), public)
        columns = [
            [F.one_hot(images.labels, observation.classes).double(), confidence(sent, images)]
            for images in (public, candidates)
        ]
        if self.shadows and len(public) >= _FEWEST:
            outside, inside = torch.zeros(2, len(public), dtype=torch.float64), []
            for held, shadow in self._trained(observation.model, observation.local, public):
                outside += torch.stack([confidence(shadow, public) * ~held, (~held).double()])
                inside.append(confidence(shadow, candidates))
            told = outside[0] / outside[1], torch.stack(inside).mean(dim=0)
            # Shadows that diverge tell nothing of how well the returned model should fit.
            if all(bool(one.isfinite().all()) for one in told):
                columns[0].append(told[0])
                columns[1].append(told[1])
        known, given = (torch.cat([one, torch.stack(rest, 1)], 1) for one, *rest in columns)
        return known, given

    def _trained(
        self, sent: nn.Module, local: LocalSteps, public: Images
    ) -> Iterator[tuple[Tensor, nn.Module]]:
        """Yield shadows, and which public images each held, bool [P]; of a pair each one half."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.shadows // 2):
            held = torch.zeros(len(public), dtype=torch.bool)
            held[torch.randperm(len(public), generator=generator)[: len(public) // 2]] = True
            for half in (held, ~held):
                shadow = copy.deepcopy(sent).to(self._device())
                train_as_client(shadow, public[half], local, generator)
                yield half, settled(shadow, public)


@dataclass(frozen=True, kw_only=True)
class ReturnedLoss(_Returned):
    """Score candidates by the loss of the returned model, against what it should be.

    Sources: Yeom et al., "Privacy Risk in Machine Learning", CSF 2018, section 3 (the loss); Watson
    et al., "On the Importance of Difficulty Calibration in Membership Inference Attacks", ICLR
    2022, section 3 (calibration by models that did not hold an image). The regression is ours.

    Shape: any batch, sum and model; more than one local step.

    Example:
        >>> ReturnedLoss()(observation, candidates, public)  # doctest: +SKIP
    """

    def fits(self, returned: Observation, images: Images) -> Tensor:
        """Return φ, as ``fedveil.attacks.membership.released`` defines it, float64 [N]."""
        return confidence(returned.model, images)


@dataclass(frozen=True, kw_only=True)
class ReturnedGradientNorm(_Returned):
    """Score candidates by how small their gradient is in the returned model, calibrated alike.

    Training ends where the gradients of the images used are small; those of others need not be.

    Source: Nasr, Shokri & Houmansadr, "Comprehensive Privacy Analysis of Deep Learning", S&P 2019,
    section IV, which tells members by their gradients' norms. The calibration is ours.

    Shape: any batch, sum and model; more than one local step.

    Example:
        >>> ReturnedGradientNorm()(observation, candidates, public)  # doctest: +SKIP
    """

    def fits(self, returned: Observation, images: Images) -> Tensor:
        """Return minus the logarithm of the squared norm of each gradient, float64 [N]."""
        gradients = PerImageGradients.of(returned, images, self._device())
        squares = [part.square().sum(1) for part in gradients.each(images)]
        return -torch.cat(squares).double().clamp_min(_TINY).log().cpu()


def _returned(observation: Observation, victim: int, device: torch.device) -> nn.Module:
    """Return the model that one victim returned, in the mode it trained in."""
    model: nn.Module = copy.deepcopy(observation.model).to(device)
    model.load_state_dict(observation.returned(victim), strict=False)
    return model


def _regressed(known: Tensor, values: Tensor, given: Tensor, ridge: float) -> Tensor:
    """Return what a ridge regression of values [P] on known [P, F] expects of given [N, F]."""
    middle, mean = known.mean(dim=0), values.mean()
    left = known - middle
    gram = left.T @ left + ridge * torch.eye(left.shape[1], dtype=left.dtype)
    weights = torch.linalg.solve(gram, left.T @ (values - mean))
    expected: Tensor = (given - middle) @ weights + mean
    return expected
