"""A defence as a user chooses it: what it is made of."""

from dataclasses import dataclass

from fedveil.defenses.dp_sgd import DPSGD
from fedveil.defenses.protocol import Metadata, Sanitizer, Transformation, metadata_of
from fedveil.defenses.soteria import Soteria


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
    soteria: Soteria | None = None
    privacy: DPSGD | None = None

    @property
    def family(self) -> str:
        """The defence without its options, for tables: ``dct``, ``dct+noise``, ``none``."""
        return "+".join(self.names) or "none"

    @property
    def parts(self) -> tuple[Transformation | Sanitizer | Soteria | DPSGD, ...]:
        """What it is made of."""
        parts = (self.transform, self.sanitizer, self.soteria, self.privacy)
        return tuple(part for part in parts if part is not None)

    @property
    def strength(self) -> float:
        """The sum of its parts' strengths: larger is stronger within one family; 0 for none."""
        return sum(part.strength for part in self.parts)

    @property
    def metadata(self) -> tuple[Metadata, ...]:
        """What is known of each part.

        Raises:
            FedveilError: Nothing is known of one, so it cannot be audited.
        """
        return tuple(metadata_of(type(part)) for part in self.parts)
