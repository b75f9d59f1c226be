"""The copy as it came."""

from dataclasses import dataclass

from fedveil.attacks.theft.holdout import predict, score_folds
from fedveil.attacks.theft.observation import Stolen, TheftObservation


@dataclass(frozen=True)
class Direct:
    """Use the copy untouched: what a cap on its accuracy bounds.

    Labels serve only to check it, on the same held-out images as every other attack. Of who has
    neither a copy nor a label it is the untrained model, that is, chance.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there is a copy, or nothing else to be done."""
        return bool(observation.copies) or not observation.has_labels

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Return the last copy."""
        model = observation.model(observation.start)
        folds, labelled = observation.folds, observation.labelled
        logits = [predict(model, labelled[fold.held_out].pixels) for fold in folds]
        checked = score_folds(folds, labelled.labels, logits)
        return Stolen(observation.start, checked)
