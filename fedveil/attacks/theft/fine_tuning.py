"""Training on from the copy: all of it, a layer at a time, or the noised layers from nothing."""

from dataclasses import dataclass

from torch import nn

from fedveil.attacks.theft.descent import parameter_names, recipes, search
from fedveil.attacks.theft.observation import Stolen, TheftObservation

_MOST = 8  # layers that are looked at one by one


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


def layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Group a model's parameters by layer, or by block where there are more than eight layers.

    Returns:
        Name of the layer or block to the names of its parameters, in the model's order.
    """
    names = parameter_names(model)
    depth = max(name.count(".") for name in names)
    groups = _grouped(names, depth)
    while len(groups) > _MOST and depth > 1:
        depth -= 1
        groups = _grouped(names, depth)
    return groups


def _grouped(names: tuple[str, ...], depth: int) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        module = name.split(".")[:-1]
        groups.setdefault(".".join(module[:depth]) or name, []).append(name)
    return {layer: tuple(members) for layer, members in groups.items()}
