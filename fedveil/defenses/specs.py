"""Defences as they are written on the command line."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedveil.defenses.block_dct import BlockDCT
from fedveil.defenses.blur import GaussianBlur
from fedveil.defenses.clipping import Clipping
from fedveil.defenses.down_sampling import DownSampling
from fedveil.defenses.dp_sgd import DPSGD
from fedveil.defenses.gaussian_noise import GaussianNoise
from fedveil.defenses.jpeg import JPEG
from fedveil.defenses.protocol import Defense
from fedveil.defenses.pruning import Pruning
from fedveil.defenses.random_block_dct import RandomBlockDCT
from fedveil.defenses.soteria import Soteria
from fedveil.errors import FedveilError

Options = Mapping[str, Callable[[str], Any]]


@dataclass(frozen=True)
class _Kind:
    """How a defence is built.

    Attributes:
        place: The field of ``Defense`` it fills.
        build: Called with the options that were given.
        options: Name to the reader of its value.
        required: The option that has no default.
    """

    place: str
    build: Callable[..., Any]
    options: Options
    required: str | None = None


_KINDS: dict[str, _Kind] = {
    "dct": _Kind(
        "transform", BlockDCT, {"keep": int, "cutoff": float, "block": int, "chroma_keep": int}
    ),
    "dct-random": _Kind(
        "transform",
        RandomBlockDCT,
        {"drop": float, "keep": int, "block": int, "seed": int},
        required="drop",
    ),
    "jpeg": _Kind("transform", JPEG, {"quality": int}, required="quality"),
    "blur": _Kind("transform", GaussianBlur, {"sigma": float}, required="sigma"),
    "down": _Kind("transform", DownSampling, {"factor": int}, required="factor"),
    "prune": _Kind("sanitizer", Pruning, {"share": float}, required="share"),
    "clip": _Kind("sanitizer", Clipping, {"norm": float}, required="norm"),
    "noise": _Kind("sanitizer", GaussianNoise, {"ratio": float}, required="ratio"),
    "soteria": _Kind("soteria", Soteria, {"share": float}, required="share"),
    "dp-sgd": _Kind(
        "privacy", DPSGD, {"noise": float, "clip": float, "delta": float}, required="noise"
    ),
}

NONE = Defense("none")
DEFENSES = (NONE.name, *_KINDS)
"""Names of all defences."""


def parse_defense(text: str) -> Defense:
    """Return the defence that ``name`` or ``name:option=value,option=value`` describes.

    Raises:
        FedveilError: Unknown name or option, a value that is no such number, or an option missing.

    Example:
        >>> parse_defense("dct:keep=21").transform
        BlockDCT(kept=21/64, block=8)
    """
    name = text.partition(":")[0]
    if name not in DEFENSES:
        near = difflib.get_close_matches(name, DEFENSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise FedveilError(f"defence {name!r} is unknown{hint} Known: {', '.join(DEFENSES)}")
    kind = _KINDS.get(name)
    options = _options(text, kind.options if kind else {})
    if kind is None:
        return NONE
    if kind.required and kind.required not in options:
        raise FedveilError(
            f"defence {text!r} needs its option {kind.required}; write {name}:{kind.required}=…"
        )
    return Defense(text, **{kind.place: kind.build(**options)})


def _options(text: str, allowed: Options) -> dict[str, Any]:
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in allowed:
            names = ", ".join(allowed) or "none"
            raise FedveilError(f"defence {name!r} has no option {key!r}; its options: {names}")
        try:
            options[key] = allowed[key](value)
        except ValueError as error:
            wanted = "a whole number" if allowed[key] is int else "a number"
            raise FedveilError(f"defence {text!r}: {key} needs {wanted}, not {value!r}") from error
    return options


def check_defense(defense: Defense, model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Refuse a defence that does not fit the model or the images, before anything runs.

    Args:
        defense: Of ``parse_defense``.
        model: What the clients train.
        shape: (C, H, W) of one image.

    Raises:
        FedveilError: Says what does not fit.
    """
    if defense.transform is not None:
        defense.transform(torch.zeros(1, *shape))
    if defense.soteria is not None:
        defense.soteria.on(model, shape)
    if defense.privacy is not None:
        defense.privacy.check(model)
