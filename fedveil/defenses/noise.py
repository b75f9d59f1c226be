"""The former place of ``fedveil.copies.noise``; goes in version 0.3."""

import warnings

from fedveil.copies.noise import NoiseKey, NoiseTarget, add_noise, noise_target, root_mean_square

__all__ = ["NoiseKey", "NoiseTarget", "add_noise", "noise_target", "root_mean_square"]

warnings.warn(
    "fedveil.defenses.noise has moved to fedveil.copies.noise", DeprecationWarning, stacklevel=2
)
