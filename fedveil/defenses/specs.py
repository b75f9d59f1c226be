"""Defences as they are written on the command line."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from fedveil.defenses.block_dct import BlockDCT
from fedveil.defenses.defense import Defense
from fedveil.defenses.dp_sgd import DPSGD
from fedveil.defenses.filters import JPEG, DownSampling, GaussianBlur
from fedveil.defenses.protocol import Metadata, Transformation, metadata_of
from fedveil.defenses.random_block_dct import RandomBlockDCT
from fedveil.defenses.sanitizers import Clipping, GaussianNoise, Pruning
from fedveil.defenses.soteria import Soteria
from fedveil.errors import FedveilError
from fedveil.specs import options_of, unknown

# Not the plus of an exponent: a name begins with a letter.
_PLUS = re.compile(r"\+(?=[a-z])")

Place = Literal["transform", "sanitizer", "soteria", "privacy"]


@dataclass(frozen=True)
class _Kind:
    """How a defence is built.

    Attributes:
        name: Its name.
        build: Called with the options that were given.
        place: The field of ``Defense`` it fills.
        metadata: What is known of it.
        options: Name to the reader of its value: its numeric arguments.
        required: The options that have no default.
    """

    name: str
    build: type
    place: Place
    metadata: Metadata
    options: Mapping[str, type[int] | type[float]]
    required: tuple[str, ...]

    @classmethod
    def of(cls, name: str, defense: type) -> "_Kind":
        """Read what is to be known of a defence off its class.

        Raises:
            FedveilError: It has no metadata, or a strength of these cannot be built.
        """
        arguments = list(inspect.signature(defense, eval_str=True).parameters.values())
        numeric = {a.name: reader for a in arguments if (reader := _numeric(a.annotation))}
        required = tuple(a.name for a in arguments if a.default is a.empty)
        kind = cls(name, defense, _place(defense), metadata_of(defense), numeric, required)
        for strength in kind.metadata.strengths:
            kind.built(f"{name}:{strength}")
        return kind

    def built(self, text: str) -> Any:
        """Return the defence with the options of a text."""
        options = options_of(text, "defence", self.options)
        for option in self.required:
            if option not in options:
                raise FedveilError(
                    f"defence {text!r} needs its option {option}; write {self.name}:{option}=…"
                )
        return self.build(**options)


def _numeric(hint: Any) -> type[int] | type[float] | None:
    kinds = set(get_args(hint) or (hint,)) - {type(None)}
    return next((kind for kind in (int, float) if kinds == {kind}), None)


def _place(defense: type) -> Place:
    if issubclass(defense, Transformation):
        return "transform"
    if issubclass(defense, Soteria):
        return "soteria"
    return "privacy" if issubclass(defense, DPSGD) else "sanitizer"


NONE = Defense("none")
DEFENSES: Mapping[str, type] = {
    "dct": BlockDCT,
    "dct-random": RandomBlockDCT,
    "jpeg": JPEG,
    "blur": GaussianBlur,
    "down": DownSampling,
    "prune": Pruning,
    "clip": Clipping,
    "noise": GaussianNoise,
    "soteria": Soteria,
    "dp-sgd": DPSGD,
}
"""Every defence by name: a class with ``metadata``, whose numeric arguments are its options."""

_KINDS = {name: _Kind.of(name, defense) for name, defense in DEFENSES.items()}


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
    built = [kind.built(part) for part, kind in zip(parts, kinds, strict=True) if kind is not None]
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
    known = (NONE.label, *DEFENSES)
    if name not in known:
        raise unknown("defence", name, known)
    kind = _KINDS.get(name)
    if kind is None:
        options_of(text, "defence", {})
    return kind


def _listed(place: str) -> str:
    return ", ".join(name for name, kind in _KINDS.items() if kind.place == place)


def check_defense(defense: Defense, model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Refuse a defence that does not fit the model or the images, before anything runs.

    Args:
        defense: Of ``parse_defense``.
        model: What the clients train.
        shape: (C, H, W) of one image.

    Raises:
        FedveilError: Says what does not fit, or that nothing is known of a part.
    """
    for part in defense.parts:
        metadata_of(type(part))
    if defense.transform is not None:
        defense.transform(torch.zeros(1, *shape))
    if defense.soteria is not None:
        defense.soteria.on(model, shape)
    if defense.privacy is not None:
        defense.privacy.check(model, shape)
