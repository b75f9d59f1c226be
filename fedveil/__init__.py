"""fedveil protects federated learning in both directions, and proves it by attack.

The names here are found when they are first asked for: importing the package loads no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedveil.api import steal, trace, train, watch, write_report
    from fedveil.data import load_dataset
    from fedveil.defenses import BlockDCT, parse_defense
    from fedveil.errors import FedveilError
    from fedveil.models import build_model

__version__ = "0.1.0"

__all__ = [
    "BlockDCT",
    "FedveilError",
    "build_model",
    "load_dataset",
    "parse_defense",
    "steal",
    "trace",
    "train",
    "watch",
    "write_report",
]

_PLACES = {
    "BlockDCT": "fedveil.defenses",
    "FedveilError": "fedveil.errors",
    "build_model": "fedveil.models",
    "load_dataset": "fedveil.data",
    "parse_defense": "fedveil.defenses",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fedveil' has no attribute {name!r}")
    return getattr(import_module(_PLACES.get(name, "fedveil.api")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
