"""What a client can make of the copies of a model it received."""

from collections.abc import Mapping

from fedveil.attacks.theft.as_received import Direct, LocalEpochs, ReestimateBatchNorm
from fedveil.attacks.theft.averaging import AverageRounds, Every, Last
from fedveil.attacks.theft.cluster import Cluster
from fedveil.attacks.theft.collusion import Collude
from fedveil.attacks.theft.distillation import Distil
from fedveil.attacks.theft.fine_tuning import FineTune, RetrainNoised, Surgical
from fedveil.attacks.theft.observation import (
    Combination,
    Stolen,
    TheftAttack,
    TheftObservation,
)
from fedveil.attacks.theft.probe import Probe
from fedveil.types import Copy

ATTACKS: Mapping[str, TheftAttack] = {
    "direct": Direct(),
    "batch-norm": ReestimateBatchNorm(),
    "probe": Probe(),
    "local-epochs": LocalEpochs(),
    "fine-tune": FineTune(),
    "retrain-noised": RetrainNoised(),
    "surgical": Surgical(),
    "distil": Distil(),
    "cluster": Cluster(),
}
"""Every attack, by name; all but ``cluster`` look at the last copy alone."""

COMBINATIONS: Mapping[str, Combination] = {
    "last": Last(),
    "averaged": AverageRounds(),
    "colluding": Collude(),
    "every": Every(),
}
"""Every way to make one copy of several, by name."""

__all__ = [
    "ATTACKS",
    "COMBINATIONS",
    "AverageRounds",
    "Cluster",
    "Collude",
    "Combination",
    "Copy",
    "Direct",
    "Distil",
    "Every",
    "FineTune",
    "Last",
    "LocalEpochs",
    "Probe",
    "ReestimateBatchNorm",
    "RetrainNoised",
    "Stolen",
    "Surgical",
    "TheftAttack",
    "TheftObservation",
]
