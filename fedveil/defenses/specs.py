"""Defences as they are written on the command line."""

import difflib
import re
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

# Not the plus of an exponent: a name begins with a letter.
_PLUS = re.compile(r"\+(?=[a-z])")

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
        "transform",
        BlockDCT,
        {"keep": int, "skip": int, "cutoff": float, "block": int, "chroma_keep": int},
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
DEFENSES = (NONE.label, *_KINDS)
"""Names of all defences."""


def parse_defense(text: str) -> Defense:
    """Return the defence that ``name`` or ``name:option=value,option=value`` describes.

    Two are joined by a plus: a transformation of images and a change of the update they cause.

    Raises:
        FedveilError: Unknown name or option, a value that is no such number, an option missing, or
            two that cannot be joined.

    Example:
        >>> parse_defense("dct:keep=21+noise:ratio=1").transform
        BlockDCT(kept=21/64, block=8)
    """
    parts = _PLUS.split(text)
    kinds = [_known(part) for part in parts]
    if parts == [NONE.label]:
        return NONE
    built = [
        _built(part, kind) for part, kind in zip(parts, kinds, strict=True) if kind is not None
    ]
    on_images = sum(kind is not None and kind.place == "transform" for kind in kinds)
    if None in kinds or on_images > 1 or len(parts) - on_images > 1:
        raise FedveilError(
            f"defence {text!r} cannot be joined so: a plus joins one transformation of images "
            f"({_listed('transform')}) and one change of the update ({_listed('sanitizer')}, "
            f"{_listed('soteria')}, {_listed('privacy')})"
        )
    places = {kind.place: part for kind, part in zip(kinds, built, strict=True) if kind is not None}
    return Defense(text, tuple(part.partition(":")[0] for part in parts), **places)


def _known(text: str) -> _Kind | None:
    name = text.partition(":")[0]
    if name not in DEFENSES:
        near = difflib.get_close_matches(name, DEFENSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise FedveilError(f"defence {name!r} is unknown{hint} Known: {', '.join(DEFENSES)}")
    kind = _KINDS.get(name)
    if kind is None:
        _options(text, {})
    return kind


def _built(text: str, kind: _Kind) -> Any:
    options = _options(text, kind.options)
    if kind.required and kind.required not in options:
        name = text.partition(":")[0]
        raise FedveilError(
            f"defence {text!r} needs its option {kind.required}; write {name}:{kind.required}=…"
        )
    return kind.build(**options)


def _listed(place: str) -> str:
    return ", ".join(name for name, kind in _KINDS.items() if kind.place == place)


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
        defense.privacy.check(model, shape)
