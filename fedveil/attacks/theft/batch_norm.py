"""Batch statistics measured anew under the copy's weights."""

from dataclasses import dataclass

import torch

from fedveil.attacks.theft.direct import Direct
from fedveil.attacks.theft.observation import Stolen, TheftObservation, with_copy
from fedveil.copies.batch_statistics import reestimate_batch_norm
from fedveil.models import has_batch_norm


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
