"""What a server can reconstruct of a client's images from the update it received."""

from fedveil.attacks.inversion.observation import Attack, Inversion, Observation, Progress
from fedveil.attacks.inversion.rgap import RGAP

__all__ = ["RGAP", "Attack", "Inversion", "Observation", "Progress"]
