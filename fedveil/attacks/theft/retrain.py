"""The degraded layers are thrown away and learnt anew; the rest of the copy stays."""

from dataclasses import dataclass

from fedveil.attacks.theft.descent import recipes, search
from fedveil.attacks.theft.layers import layers
from fedveil.attacks.theft.observation import Stolen, TheftObservation


@dataclass(frozen=True)
class RetrainNoised:
    """Discard the layers the defence degrades and train only those, from a fresh initialisation.

    Which layers these are is public, or seen by comparing two copies. Where the defence degrades
    all of them, each is discarded alone and the holdout decides which.
    """

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether a copy has degraded parameters, and there are labels to learn from."""
        return bool(observation.copies and observation.noised) and observation.has_labels

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Return the copy with its degraded layers learnt anew."""
        groups = layers(observation.architecture)
        noised = [group for group in groups.values() if set(group) & set(observation.noised)]
        together = tuple(name for group in noised for name in group)
        chosen = noised if len(noised) == len(groups) else [together]
        candidates = [recipe for names in chosen for recipe in recipes(names, discarded=names)]
        return search(observation, candidates)
