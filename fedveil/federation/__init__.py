"""The Flower ServerApp, ClientApp, strategies and the engines they run on."""

from fedveil.federation.ensemble_distillation import Distillation, EnsembleDistillation
from fedveil.federation.fedavg import Resume, Sampling, SeededFedAvg
from fedveil.federation.noise_delta import NoiseDelta, SigmaSearch
from fedveil.federation.noise_pair import NoisePair, RaisingLoop
from fedveil.federation.noisy_fedavg import Cap, NoisyFedAvg

__all__ = [
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
]
