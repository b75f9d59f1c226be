"""fedveil protects federated learning in both directions, and proves it by attack."""

__version__ = "0.1.0"
