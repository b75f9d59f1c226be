"""What a client can make of the copies of a model it received."""

from collections.abc import Mapping

from fedveil.attacks.theft.averaging import AverageRounds, Last
from fedveil.attacks.theft.batch_norm import ReestimateBatchNorm
from fedveil.attacks.theft.collusion import Collude
from fedveil.attacks.theft.direct import Direct
from fedveil.attacks.theft.distillation import Distil
from fedveil.attacks.theft.fine_tune import FineTune
from fedveil.attacks.theft.local_epochs import LocalEpochs
from fedveil.attacks.theft.observation import (
    Combination,
    Copy,
    Stolen,
    TheftAttack,
    TheftObservation,
)
from fedveil.attacks.theft.probe import Probe
from fedveil.attacks.theft.retrain import RetrainNoised
from fedveil.attacks.theft.surgical import Surgical

ATTACKS: Mapping[str, TheftAttack] = {
    "direct": Direct(),
    "batch-norm": ReestimateBatchNorm(),
    "probe": Probe(),
    "local-epochs": LocalEpochs(),
    "fine-tune": FineTune(),
    "retrain-noised": RetrainNoised(),
    "surgical": Surgical(),
    "distil": Distil(),
}
"""Every attack on one copy, by name."""

COMBINATIONS: Mapping[str, Combination] = {
    "last": Last(),
    "averaged": AverageRounds(),
    "colluding": Collude(),
}
"""Every way to make one copy of several, by name."""

__all__ = [
    "ATTACKS",
    "COMBINATIONS",
    "AverageRounds",
    "Collude",
    "Combination",
    "Copy",
    "Direct",
    "Distil",
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
