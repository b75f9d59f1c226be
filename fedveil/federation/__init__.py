"""The Flower ServerApp, ClientApp, strategies and the engines they run on."""

from fedveil.federation.answers import answering
from fedveil.federation.distillation import Distillation, distilled
from fedveil.federation.roster import Sampling
from fedveil.federation.statistics import summing
from fedveil.federation.strategies.analytic import Analytic
from fedveil.federation.strategies.cap import Cap
from fedveil.federation.strategies.ensemble_distillation import EnsembleDistillation
from fedveil.federation.strategies.fedavg import Resume, SeededFedAvg
from fedveil.federation.strategies.noise_delta import NoiseDelta, SigmaSearch
from fedveil.federation.strategies.noise_pair import NoisePair, RaisingLoop
from fedveil.federation.strategies.noisy_fedavg import NoisyFedAvg

__all__ = [
    "Analytic",
    "Cap",
    "Distillation",
    "EnsembleDistillation",
    "NoiseDelta",
    "NoisePair",
    "NoisyFedAvg",
    "RaisingLoop",
    "Resume",
    "Sampling",
    "SeededFedAvg",
    "SigmaSearch",
    "answering",
    "distilled",
    "summing",
]
