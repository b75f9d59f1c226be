"""Defences as they are written on the command line."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedveil.defenses.block_dct import BlockDCT
from fedveil.errors import FedveilError


@dataclass(frozen=True)
class Defense:
    """A defence chosen by the user.

    Attributes:
        label: As written, for tables: ``dct:keep=21``.
        transform: What the client applies to its images before training; None for nothing.
    """

    label: str
    transform: nn.Module | None


@dataclass(frozen=True)
class _Kind:
    build: Callable[..., nn.Module | None]
    options: Mapping[str, Callable[[str], Any]]


_KINDS: dict[str, _Kind] = {
    "none": _Kind(lambda: None, {}),
    "dct": _Kind(BlockDCT, {"keep": int, "cutoff": float, "block": int, "chroma_keep": int}),
}


def parse_defense(text: str) -> Defense:
    """Return the defence that ``name`` or ``name:option=value,option=value`` describes.

    Raises:
        FedveilError: Unknown name or option, or a value that is no such number.

    Example:
        >>> parse_defense("dct:keep=21").transform
        BlockDCT(kept=21/64, block=8)
    """
    name, _, rest = text.partition(":")
    if name not in _KINDS:
        near = difflib.get_close_matches(name, _KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise FedveilError(f"defence {name!r} is unknown{hint} Known: {', '.join(_KINDS)}")
    kind = _KINDS[name]
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in kind.options:
            allowed = ", ".join(kind.options) or "none"
            raise FedveilError(f"defence {name!r} has no option {key!r}; its options: {allowed}")
        try:
            options[key] = kind.options[key](value)
        except ValueError as error:
            wanted = "a whole number" if kind.options[key] is int else "a number"
            raise FedveilError(f"defence {text!r}: {key} needs {wanted}, not {value!r}") from error
    return Defense(text, kind.build(**options))
