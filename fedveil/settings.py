"""A setting in one place: its default and range, and how the command line shows it.

Settings are fields: of ``TrainConfig``, whose ranges pydantic checks, and of frozen dataclasses,
whose fields are made by ``option``. Modules of settings load no PyTorch, so that a help is quick.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fedveil.errors import FedveilError

_OPTION = "option"
SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
"""The ways to limit a number, as pydantic calls them, in words."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """How the command line shows a setting.

    Attributes:
        told: Its help, a sentence.
        flags: Its options, where they are not its name.
        default: Its default in words, where the value itself does not say it.
        group: The heading it is under; empty for none.
        commas: Whether several values are one word with commas; they are repeated otherwise.
        limits: Its range, as ``allowed`` takes it.
    """

    told: str
    flags: tuple[str, ...] = ()
    default: str = ""
    group: str = ""
    commas: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)

    def named(self, name: str) -> tuple[str, ...]:
        """Return its options; that of a field is its name."""
        return self.flags or (f"--{name.replace('_', '-')}",)


def option(
    default: Any,
    told: str,
    *,
    flags: tuple[str, ...] = (),
    shown: str = "",
    commas: bool = False,
    **limits: float,
) -> Any:
    """Return a field of a dataclass that is an option of a command, too.

    Args:
        default: Where nothing is given.
        told: Its help.
        flags: As of ``Option``.
        shown: As ``default`` of ``Option``.
        commas: As of ``Option``.
        limits: Of a number, or of each of several: ge, gt, le, lt.
    """
    told_of = Option(told=told, flags=flags, default=shown, commas=commas, limits=limits)
    return field(default=default, metadata={_OPTION: told_of})


def options(settings: type[Any]) -> dict[str, Option]:
    """Return the options among the fields of a dataclass, by the fields' names."""
    return {one.name: one.metadata[_OPTION] for one in fields(settings) if _OPTION in one.metadata}


@dataclass(frozen=True, kw_only=True)
class CheckedSettings:
    """Settings that refuse what is out of their options' ranges; of several numbers none is twice.

    Raises:
        FedveilError: Names the option, its value and what is allowed.
    """

    def __post_init__(self) -> None:
        for name, told in options(type(self)).items():
            value = getattr(self, name)
            if value is None or not told.limits:
                continue
            several = isinstance(value, tuple)
            values = value if several else (value,)
            fits = all(_within(number, told.limits) for number in values)
            if not fits or not values or len(set(values)) < len(values):
                raise FedveilError(
                    f"{told.named(name)[0]} {','.join(map(str, values)) or 'nothing'} is out of "
                    f"range (allowed: {allowed(told.limits)}{', none twice' if several else ''})"
                )


def allowed(limits: Mapping[str, float]) -> str:
    """Return a range in words: ``{"ge": 1, "lt": 9}`` is ``at least 1 and below 9``."""
    return " and ".join(f"{SIGNS[sign]} {limit:g}" for sign, limit in limits.items())


def _within(value: float, limits: Mapping[str, float]) -> bool:
    return all(getattr(operator, sign)(value, limit) for sign, limit in limits.items())
