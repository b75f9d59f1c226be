"""What is written as ``name:option=value,option=value``: attacks and defences."""

import difflib
from collections.abc import Collection, Mapping

from fedveil.errors import FedveilError


def unknown(kind: str, name: str, known: Collection[str], otherwise: str = "") -> FedveilError:
    """Return the refusal of a name that nothing has, with the nearest that something has."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return FedveilError(f"{kind} {name!r} is unknown{hint} Known: {', '.join(known)}{otherwise}")


def options_of(
    text: str, kind: str, allowed: Mapping[str, type[int] | type[float]]
) -> dict[str, int | float]:
    """Return the options that a text gives.

    Args:
        text: The whole, its name included.
        kind: What it names, for messages.
        allowed: Name of each option to its type.

    Raises:
        FedveilError: An option that is not there, or a value that is no such number.
    """
    name, _, rest = text.partition(":")
    options: dict[str, int | float] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in allowed:
            names = ", ".join(allowed) or "none"
            raise FedveilError(f"{kind} {name!r} has no option {key!r}; its options: {names}")
        try:
            options[key] = allowed[key](value)
        except ValueError as error:
            wanted = "a whole number" if allowed[key] is int else "a number"
            raise FedveilError(f"{kind} {text!r}: {key} needs {wanted}, not {value!r}") from error
    return options
