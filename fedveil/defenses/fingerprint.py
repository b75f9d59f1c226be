"""The former place of ``fedveil.copies.fingerprint``; goes in version 0.3."""

import warnings

from fedveil.copies.fingerprint import Fingerprint

__all__ = ["Fingerprint"]

warnings.warn(
    "fedveil.defenses.fingerprint has moved to fedveil.copies.fingerprint",
    DeprecationWarning,
    stacklevel=2,
)
