"""The copy as it came."""

from dataclasses import dataclass

import torch

from fedveil.attacks.theft.holdout import predict, score
from fedveil.attacks.theft.observation import Stolen, TheftObservation


@dataclass(frozen=True)
class Direct:
    """Use the copy untouched: what a cap on its accuracy bounds.

    Labels serve only to check it, on the same held-out images as every other attack.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there is a copy."""
        return bool(observation.copies)

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Return the last copy."""
        weights = observation.start
        held = observation.labelled[torch.cat([fold.held_out for fold in observation.folds])]
        logits = predict(observation.model(weights), held.pixels)
        return Stolen(weights, score(logits, held.labels))
