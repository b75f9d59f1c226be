"""What an honest-but-curious server has of its victims, and what an attack makes of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from fedveil.attacks.inversion.running_statistics import LayerStatistics
from fedveil.errors import FedveilError
from fedveil.types import Shape

Progress = Callable[[int, int, float], None]
"""Called as ``progress(done, total, loss)``; raising from it, Ctrl-C included, ends the attack."""


@dataclass(frozen=True, kw_only=True)
class Uses:
    """What an attack can make of what is publicly known of a defence.

    An attack is run as an adaptive attacker with what it uses, and is never given the rest.

    Attributes:
        linear: Whether it searches the range of a linear transformation (``Observation.knows``).
        forward: Whether it takes any differentiable transformation into its forward pass.
        sanitizer: Whether it compares only what a sanitiser left (``Observation.sanitizer``).
    """

    linear: bool = False
    forward: bool = False
    sanitizer: bool = False


class UpdateKnowledge(Protocol):
    """What an attacker knows of a sanitiser that changed the updates before they were sent.

    A sanitiser prunes, perturbs or clips what a client returns. An attack that knows of it compares
    only what survives.
    """

    def residual(
        self, dummy: Mapping[str, Tensor], observed: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return what is left unexplained of one victim's update.

        It is ``M·(S(dummy) − observed)``: S, which maps zeros to zeros, is the part of the
        sanitiser that can be repeated (the identity for most, clipping for one that clips); M,
        which may depend on ``observed`` and on nothing of ``dummy``, is zero where information was
        destroyed (a pruned entry, a perturbed layer). Attacks that need ``M·S(dummy)`` itself, to
        compare directions, subtract ``residual(zeros, observed)``.

        Args:
            dummy: Parameter name to a tensor of the parameter's shape: the update that a candidate
                would have caused. Gradients flow through it, and ``torch.func`` transforms (vmap,
                grad, jvp) wrap it, so there is no in-place operation and no branch on values.
            observed: The same names and shapes: the update that was received.

        Returns:
            The same names; a name may be missing where nothing of it survived.
        """
        ...


@dataclass(frozen=True)
class LocalSteps:
    """Public knowledge of a client's local training by gradient descent.

    The server chose these settings; the order in which a client takes its images is its own.

    Attributes:
        epochs: Passes over the client's images.
        batch_size: Images a step; the last step of an epoch may have fewer.
        learning_rate: Step size.

    Raises:
        FedveilError: A setting out of range.
    """

    epochs: int
    batch_size: int
    learning_rate: float

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            value = getattr(self, name)
            if value <= 0:
                raise FedveilError(
                    f"local training with {name.replace('_', ' ')} {value} is out of range: "
                    "give a value above 0"
                )

    def steps(self, images: int) -> int:
        """Return how many steps a client with so many images takes in all."""
        return self.epochs * -(-images // self.batch_size)


@dataclass(frozen=True)
class Observation:
    """All that the attacks of this package may see. It never holds a victim's image or label.

    Several victims, or several rounds of one victim, are held at once when they all answered the
    same model.

    Attributes:
        model: The model the server sent, with the weights it sent, in the mode the client trains
            in. Takes float [N, C, H, W] in [0, 1], returns logits [N, classes].
        gradients: Parameter name to [V, *parameter shape]: the gradient of the mean cross-entropy
            over a victim's batch, for each of V victims. Under ``local`` it is the mean gradient
            along the client's path: weights sent minus weights returned, over the learning rate
            times the number of a client's local steps.
        shape: (C, H, W) of one image.
        classes: Number of classes.
        images: Images in a victim's batch, which the reply's example count tells the server.
        knows: The linear image transformation that is public knowledge, or None for an attacker
            who knows of no defence.
        rounding: Squared error that rounding put into a gradient, as a share of its squared length;
            what no reconstruction can be expected to explain. Negligible where gradients are sent,
            not where they are differences of weights.
        sanitizer: What is publicly known of a defence that changed the update itself, or None for
            an attacker who takes the update as it is.
        local: How the client trained where the update is of more than one step; None for a single
            gradient.
        clients: Of how many clients, with as many images each, an update is the mean.
        statistics: What the running statistics that came back tell of the batches, by the name of
            the layer of batch normalisation; a gradient has none.
        unread: Why of other such layers nothing is told, by their names.

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
    sanitizer: UpdateKnowledge | None = None
    local: LocalSteps | None = None
    clients: int = 1
    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)

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
        return replace(
            self,
            gradients={k: g[victims] for k, g in self.gradients.items()},
            statistics={k: layer.select(victims) for k, layer in self.statistics.items()},
        )

    def returned(self, victim: int, *, share: float = 1.0) -> dict[str, Tensor]:
        """Return the trained weights after a share of the way that one victim's took.

        Args:
            victim: Which one.
            share: 0 for the weights that were sent, 1 for those that came back.
        """
        steps = self.local
        length = (
            0.0 if steps is None else steps.learning_rate * steps.steps(self.images // self.clients)
        )
        return {
            name: value.detach() - share * length * self.gradients[name][victim].to(value)
            for name, value in self.model.named_parameters()
            if name in self.gradients
        }


@dataclass(frozen=True)
class Inversion:
    """What an attack reconstructed.

    Attributes:
        images: Float [V, N, C, H, W], clipped to no range: what was trained on.
        labels: Int64 [V, N], inferred.
        loss: Float [V]: squared distance between the gradient of the reconstruction and the
            observed one, as a share of the observed one's squared length. Seen by the attacker.
        seconds: Float [V]: wall-clock seconds a victim took, shared work divided equally.
        iterations: Int64 [V]: steps spent on each victim; 0 for a closed form.
        untold: Bool [V], of whom the attack cannot tell: its search ended without an answer or at
            its limit, and what is given is a part of one or a weaker attack's, which shows nothing
            of what there is to find; None where there is none.
        originals: Float [V, N, C, H, W], what the images were before a known transformation, where
            the attack has a better answer to that than ``images``; None where it has not.
    """

    images: Tensor
    labels: Tensor
    loss: Tensor
    seconds: Tensor
    iterations: Tensor
    originals: Tensor | None = None
    untold: Tensor | None = None


def check_declared(name: str, attack: object) -> None:
    """Refuse an attack that does not say what it uses: it would be scored as if it knew nothing.

    Raises:
        FedveilError: It has no ``uses``.
    """
    if not isinstance(getattr(attack, "uses", None), Uses):
        raise FedveilError(
            f"attack {name!r} does not say what it makes of a known defence; give its class "
            "uses: ClassVar = Uses(linear=…, forward=…, sanitizer=…)"
        )


class Attack(Protocol):
    """What every attack of this package is: a small frozen object, called on an observation.

    Attributes:
        uses: What it makes of a known defence.
    """

    uses: ClassVar[Uses]

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images."""
        ...
