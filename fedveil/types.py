"""Types that every part of the package means the same by."""

from collections.abc import Mapping

from torch import Tensor

Weights = Mapping[str, Tensor]
"""A model's state: the name of each tensor to it."""
