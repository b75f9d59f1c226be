"""What every defence of clients' images is, whichever of three places it acts in."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from fedveil.secure_random import SecureGenerator

if TYPE_CHECKING:
    from fedveil.defenses.dp_sgd import DPSGD
    from fedveil.defenses.soteria import Soteria

Tensors = Mapping[str, Tensor]


class Transformation(nn.Module, ABC):
    """A transformation of images before training.

    Attributes:
        linear: Whether it is a linear map, the same for every image, whose range an attack can
            search.
        fixed: Whether the same image always becomes the same, so that a client may transform its
            images once.

    Shape: float [..., C, H, W] in [0, 1] to the same shape, dtype and device.
    """

    linear = True
    fixed = True

    @property
    @abstractmethod
    def strength(self) -> float:
        """One number, larger where less of an image is left; its unit is the transformation's."""

    @property
    def surrogate(self) -> nn.Module:
        """What an attacker puts into the forward pass of an attack: differentiable.

        It is the transformation itself where that is differentiable and not random. Where it is
        random, each call draws anew, so that an attacker can take the expectation.
        """
        return self


class Sanitizer(Protocol):
    """A change of the update that a client returns: a gradient, or weights minus those received.

    Tensors of batch statistics are no gradients and are left as they are.
    """

    @property
    def strength(self) -> float:
        """One number, larger where less of an update is left; its unit is the sanitiser's."""
        ...

    def __call__(self, update: Tensors, generator: SecureGenerator) -> dict[str, Tensor]:
        """Return the update that leaves the client; the given one is not changed.

        Args:
            update: Parameter name to float tensor.
            generator: Source of any noise.
        """
        ...

    def residual(self, dummy: Tensors, observed: Tensors) -> Tensors:
        """Return what an attacker who knows of the sanitiser compares.

        That is ``M·(S(dummy) − observed)``: S is what of the sanitiser can be repeated, M is zero
        where it destroyed information. Differentiable in ``dummy``.

        Args:
            dummy: The update that candidate images would have caused, before the sanitiser.
            observed: The update that was received.
        """
        ...


@dataclass(frozen=True)
class Defense:
    """A defence chosen by the user: a transformation, a change of the update, both, or none.

    Attributes:
        label: As written, for tables: ``dct:keep=21`` or ``dct:keep=21+noise:ratio=1``.
        names: What it is made of, without options: ``("dct", "noise")``; empty for none.
        transform: What the client applies to its images before training.
        sanitizer: What it does to its update before returning it.
        soteria: Or how it perturbs the gradient of the representation layer.
        privacy: Or how it trains with differential privacy.
    """

    label: str
    names: tuple[str, ...] = ()
    transform: Transformation | None = None
    sanitizer: Sanitizer | None = None
    soteria: "Soteria | None" = None
    privacy: "DPSGD | None" = None

    @property
    def family(self) -> str:
        """The defence without its options, for tables: ``dct``, ``dct+noise``, ``none``."""
        return "+".join(self.names) or "none"

    @property
    def strength(self) -> float:
        """The sum of its parts' strengths: larger is stronger within one family; 0 for none."""
        parts = (self.transform, self.sanitizer, self.soteria, self.privacy)
        return sum(part.strength for part in parts if part is not None)


def difference(dummy: Tensors, observed: Tensors) -> dict[str, Tensor]:
    """Return ``dummy − observed``, the residual where nothing was destroyed."""
    return {name: value - observed[name] for name, value in dummy.items()}
