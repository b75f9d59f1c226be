"""What a server can reconstruct of a client's images from the update it received."""

import difflib
from collections.abc import Callable

from fedveil.attacks.inversion.dlg import DLG
from fedveil.attacks.inversion.gradients import (
    GradientMap,
    check_attackable,
    check_model,
    infer_labels,
)
from fedveil.attacks.inversion.idlg import IDLG
from fedveil.attacks.inversion.levenberg_marquardt import LevenbergMarquardt
from fedveil.attacks.inversion.observation import (
    Attack,
    Inversion,
    LocalSteps,
    Observation,
    Progress,
    UpdateKnowledge,
)
from fedveil.attacks.inversion.rgap import RGAP
from fedveil.attacks.inversion.subspace import Subspace, range_of
from fedveil.errors import FedveilError

ATTACKS: dict[str, Callable[[], Attack]] = {
    "dlg": DLG,
    "idlg": IDLG,
    "rgap": RGAP,
    "lm": LevenbergMarquardt,
}


def build_attack(name: str) -> Attack:
    """Return the attack of that name, with its published or default settings.

    Raises:
        FedveilError: Unknown name.
    """
    if name not in ATTACKS:
        near = difflib.get_close_matches(name, ATTACKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise FedveilError(f"attack {name!r} is unknown{hint} Known: {', '.join(ATTACKS)}")
    return ATTACKS[name]()


__all__ = [
    "ATTACKS",
    "DLG",
    "IDLG",
    "RGAP",
    "Attack",
    "GradientMap",
    "Inversion",
    "LevenbergMarquardt",
    "LocalSteps",
    "Observation",
    "Progress",
    "Subspace",
    "UpdateKnowledge",
    "build_attack",
    "check_attackable",
    "check_model",
    "infer_labels",
    "range_of",
]
