"""How worker processes start, and what they need not load each for itself."""

import sys
from importlib import import_module
from typing import Literal

START_METHOD: Literal["fork", "spawn"] = "fork" if sys.platform == "linux" else "spawn"


def load_before_forking(*modules: str) -> None:
    """Import what every fork of this process would import again; nothing where none are forked.

    Args:
        modules: By name.
    """
    if START_METHOD == "fork":
        for name in modules:
            import_module(name)
