"""Training goes on from the copy, all parameters free."""

from dataclasses import dataclass

from fedveil.attacks.theft.descent import parameter_names, recipes, search
from fedveil.attacks.theft.observation import Stolen, TheftObservation


@dataclass(frozen=True)
class FineTune:
    """Fine-tune every parameter on the labelled images.

    Source: Yosinski et al., "How transferable are features in deep neural networks?", NeurIPS 2014.

    From a fresh initialisation it is training alone.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there are labels to learn from."""
        return observation.has_labels

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Return the fine-tuned copy; step size, decay and length by the thief's holdout."""
        return search(observation, recipes(parameter_names(observation.architecture)))
