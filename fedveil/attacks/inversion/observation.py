"""What an honest-but-curious server has of its victims, and what an attack makes of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fedveil.errors import FedveilError

Shape = tuple[int, int, int]
Progress = Callable[[int, int, float], None]
"""Called as ``progress(done, total, loss)``; raising from it, Ctrl-C included, ends the attack."""


@dataclass(frozen=True)
class Observation:
    """All that the attacks of this package may see. It never holds a victim's image or label.

    Several victims, or several rounds of one victim, are held at once when they all answered the
    same model.

    Attributes:
        model: The model the server sent, with the weights it sent, in the mode the client trains
            in. Takes float [N, C, H, W] in [0, 1], returns logits [N, classes].
        gradients: Parameter name to [V, *parameter shape]: the gradient of the mean cross-entropy
            over a victim's batch, for each of V victims.
        shape: (C, H, W) of one image.
        classes: Number of classes.
        images: Images in a victim's batch, which the reply's example count tells the server.
        knows: The linear image transformation that is public knowledge, or None for an attacker
            who knows of no defence.
        rounding: Squared error that rounding put into a gradient, as a share of its squared length;
            what no reconstruction can be expected to explain. Negligible where gradients are sent,
            not where they are differences of weights.

    Raises:
        FedveilError: No victims, no images, or gradients that do not match the model.
    """

    model: nn.Module
    gradients: Mapping[str, Tensor]
    shape: Shape
    classes: int
    images: int = 1
    knows: nn.Module | None = None
    rounding: float = 0.0

    def __post_init__(self) -> None:
        if self.images < 1:
            raise FedveilError(
                f"the observation claims {self.images} images in a victim's batch; "
                "attack an update that was trained on at least one"
            )
        expected = {name: p.shape for name, p in self.model.named_parameters() if p.requires_grad}
        if missing := sorted(expected.keys() - self.gradients.keys()):
            raise FedveilError(
                f"the update has no gradient for {', '.join(missing)}; "
                "it must come from the same model that the server sent"
            )
        if self.victims < 1:
            raise FedveilError("the observation holds no victims; give at least one update")
        for name, shape in expected.items():
            if self.gradients[name].shape != (self.victims, *shape):
                raise FedveilError(
                    f"the update's {name} has shape {tuple(self.gradients[name].shape[1:])}, the "
                    f"model's {tuple(shape)}; they must come from the same model"
                )
            if not torch.isfinite(self.gradients[name]).all():
                raise FedveilError(
                    f"the update's {name} is not finite; the client's training diverged, so lower "
                    "its learning rate"
                )

    @property
    def victims(self) -> int:
        """Number of updates observed."""
        return min((len(gradient) for gradient in self.gradients.values()), default=0)

    def select(self, victims: Tensor) -> "Observation":
        """Return the observation of some victims only; ``victims`` is an index, int64 [M]."""
        return replace(self, gradients={k: g[victims] for k, g in self.gradients.items()})


@dataclass(frozen=True)
class Inversion:
    """What an attack reconstructed.

    Attributes:
        images: Float [V, N, C, H, W], clipped to no range.
        labels: Int64 [V, N], inferred.
        loss: Float [V]: squared distance between the gradient of the reconstruction and the
            observed one, as a share of the observed one's squared length. Seen by the attacker.
        seconds: Float [V]: wall-clock seconds a victim took, shared work divided equally.
        iterations: Int64 [V]: steps spent on each victim; 0 for a closed form.
    """

    images: Tensor
    labels: Tensor
    loss: Tensor
    seconds: Tensor
    iterations: Tensor


class Attack(Protocol):
    """What every attack of this package is: a small frozen object, called on an observation."""

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images."""
        ...
