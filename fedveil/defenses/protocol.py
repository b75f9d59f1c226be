"""What every defence of clients' images is, whichever of three places it acts in."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator

Tensors = Mapping[str, Tensor]

SEARCHED = "the search is over the transformation's range only; a learned inverse on top"
BALUNOVIC = 'Balunović et al., "Bayesian Framework for Gradient Leakage", ICLR 2022'
WU = 'Wu et al., "Learning to Invert: Simple Adaptive Attacks for Gradient Inversion", UAI 2023'
KNOWN_FORWARD = (
    f"{BALUNOVIC} (against the transformations of Gao et al., CVPR 2021, by a known forward pass)"
)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What has to be said of a defence before anybody may choose it.

    What only withstands those who do not know of it is no defence (Athalye et al., "Obfuscated
    Gradients Give a False Sense of Security", ICML 2018; Tramèr et al., "On Adaptive Attacks to
    Adversarial Example Defenses", NeurIPS 2020), so none goes without the attack that knows of it.

    Attributes:
        attack: What the suite does against it once it knows of it, in words. A learned inverse is
            put on top of every transformation of images.
        broken_by: The paper that showed it, or what remains.
        strengths: Options of the settings that the frontier tries, weakest or strongest first:
            ``("keep=3", "keep=6")``.
        masks: Whether it destroys or changes something of the update in a way that an attack can
            leave out of its comparison, or repeat.
    """

    attack: str
    broken_by: str
    strengths: tuple[str, ...]
    masks: bool = False


class Transformation(nn.Module, ABC):
    """A transformation of images before training.

    Attributes:
        metadata: What is known of it; a class without it cannot be registered.
        linear: Whether it is a linear map, the same for every image, whose range an attack can
            search.
        fixed: Whether the same image always becomes the same, so that a client may transform its
            images once.

    Shape: float [..., C, H, W] in [0, 1] to the same shape, dtype and device.
    """

    metadata: ClassVar[Metadata]
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


def metadata_of(defense: type) -> Metadata:
    """Return what a class of defences says of itself.

    Raises:
        FedveilError: It says nothing.
    """
    found = getattr(defense, "metadata", None)
    if not isinstance(found, Metadata):
        raise FedveilError(
            f"defence {defense.__name__} has no metadata, and one that is scored without the "
            "attack that knows of it is not scored; give its class "
            "metadata = Metadata(attack=…, broken_by=…, strengths=…)"
        )
    return found


def difference(dummy: Tensors, observed: Tensors) -> dict[str, Tensor]:
    """Return ``dummy − observed``, the residual where nothing was destroyed."""
    return {name: value - observed[name] for name, value in dummy.items()}
