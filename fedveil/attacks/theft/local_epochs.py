"""The copy after the client has done its honest work."""

from dataclasses import dataclass

from fedveil.attacks.theft.holdout import predict, score_folds
from fedveil.attacks.theft.observation import Stolen, TheftObservation
from fedveil.types import Weights


@dataclass(frozen=True)
class LocalEpochs:
    """Keep what is left after the local epochs every client is asked for, on the labelled images.

    It takes no skill, no search and no decision: the honest program leaves it behind.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there are labels to learn from."""
        return observation.has_labels

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Return the copy, trained as the server asks."""
        folds, labelled = observation.folds, observation.labelled
        logits = [
            predict(
                observation.model(_trained(observation.holding(fold.train))),
                labelled[fold.held_out].pixels,
            )
            for fold in folds
        ]
        checked = score_folds(folds, labelled.labels, logits)
        return Stolen(_trained(observation), checked)


def _trained(observation: TheftObservation) -> Weights:
    model = observation.model(observation.start)
    observation.honest(model, observation.labelled)
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}
