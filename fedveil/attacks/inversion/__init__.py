"""What a server can reconstruct of a client's images from the update it received."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fedveil.attacks.inversion.dlg import DLG, IDLG
from fedveil.attacks.inversion.feature_span import FeatureSpan
from fedveil.attacks.inversion.fishing import Fishing, bait, fishing_by
from fedveil.attacks.inversion.fully_connected import FullyConnected
from fedveil.attacks.inversion.gradients import (
    GradientMap,
    check_attackable,
    check_model,
    infer_labels,
)
from fedveil.attacks.inversion.independent_components import IndependentComponents
from fedveil.attacks.inversion.inverting_gradients import InvertingGradients
from fedveil.attacks.inversion.latent_bins import LatentBins, binned
from fedveil.attacks.inversion.layer_by_layer import LayerByLayer
from fedveil.attacks.inversion.learned_inverse import LearnedInverse
from fedveil.attacks.inversion.levenberg_marquardt import LevenbergMarquardt
from fedveil.attacks.inversion.observation import (
    Attack,
    Inversion,
    LocalSteps,
    Observation,
    Progress,
    UpdateKnowledge,
    Uses,
    check_declared,
)
from fedveil.attacks.inversion.peeling import Peeling
from fedveil.attacks.inversion.rgap import RGAP
from fedveil.attacks.inversion.subspace import Subspace, range_of
from fedveil.specs import options_of, unknown

ATTACKS: dict[str, Callable[[], Attack]] = {
    "dlg": DLG,
    "idlg": IDLG,
    "rgap": RGAP,
    "lm": LevenbergMarquardt,
    "layers": LayerByLayer,
    "ig": InvertingGradients,
    "fc": FullyConnected,
    "peel": Peeling,
    "ica": IndependentComponents,
    "features": FeatureSpan,
    "latent": LatentBins,
    "fish": Fishing,
    "fish-ig": fishing_by(InvertingGradients),
    "ig-bn": lambda: InvertingGradients(batch_norm=0.01),
}
for _name, _build in ATTACKS.items():
    check_declared(_name, _build())


def build_attack(text: str) -> Attack:
    """Return the attack that ``name`` or ``name:option=value,option=value`` describes.

    Options are the whole and decimal numbers among the attack's own arguments; the others keep
    their published or default values.

    Raises:
        FedveilError: Unknown name or option, or a value that is no such number.

    Example:
        >>> build_attack("ig:steps=600,restarts=2").steps
        600
    """
    name = text.partition(":")[0]
    if name not in ATTACKS:
        raise unknown("attack", name, ATTACKS)
    attack: Any = ATTACKS[name]()
    kinds = {f.name: f.type for f in dataclasses.fields(attack) if f.type in (int, float)}
    options = options_of(text, "attack", kinds)
    return dataclasses.replace(attack, **options)  # type: ignore[no-any-return]


__all__ = [
    "ATTACKS",
    "DLG",
    "IDLG",
    "RGAP",
    "Attack",
    "FeatureSpan",
    "Fishing",
    "FullyConnected",
    "GradientMap",
    "IndependentComponents",
    "Inversion",
    "InvertingGradients",
    "LatentBins",
    "LayerByLayer",
    "LearnedInverse",
    "LevenbergMarquardt",
    "LocalSteps",
    "Observation",
    "Peeling",
    "Progress",
    "Subspace",
    "UpdateKnowledge",
    "Uses",
    "bait",
    "binned",
    "build_attack",
    "check_attackable",
    "check_declared",
    "check_model",
    "infer_labels",
    "range_of",
]
