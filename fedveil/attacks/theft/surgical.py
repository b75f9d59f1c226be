"""One layer at a time is fine-tuned, and the holdout decides which."""

from dataclasses import dataclass

from fedveil.attacks.theft.descent import recipes, search
from fedveil.attacks.theft.layers import layers
from fedveil.attacks.theft.observation import Stolen, TheftObservation


@dataclass(frozen=True)
class Surgical:
    """Fine-tune each layer in turn, the others frozen, and keep the layer that does best.

    Few labels cannot mislead what does not move.

    Source: Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", ICLR
    2023.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there are labels to learn from."""
        return observation.has_labels

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Return the copy with one layer fine-tuned; which one by the thief's holdout."""
        groups = layers(observation.architecture).values()
        return search(observation, [recipe for names in groups for recipe in recipes(names)])
