"""The copy as it came, with batch statistics measured anew, and after the honest local work."""

from dataclasses import dataclass

import torch

from fedveil.attacks.theft.holdout import predict, score_folds
from fedveil.attacks.theft.observation import Stolen, TheftObservation, with_copy
from fedveil.copies.batch_statistics import reestimate_batch_norm
from fedveil.models import has_batch_norm
from fedveil.types import Weights


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


@dataclass(frozen=True)
class ReestimateBatchNorm:
    """Measure the running means and variances on the thief's own images; no label is needed.

    Noise in the weights shifts what every normalisation sees; its statistics undo part of that.

    Source: Schneider et al., "Improving robustness against common corruptions by covariate shift
    adaptation", NeurIPS 2020.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether there is a copy of a model with batch normalisation."""
        return bool(observation.copies) and has_batch_norm(observation.architecture)

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Return the copy with statistics of the thief's images."""
        model = observation.model(observation.start)
        pixels = torch.cat([observation.labelled.pixels, observation.unlabelled])
        weights = reestimate_batch_norm(model, observation.start, pixels)
        return Direct()(with_copy(observation, weights))


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
