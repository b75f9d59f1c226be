"""The fields of settings, of a run, an audit or a study, as options of its command."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import wraps
from types import GenericAlias, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel

from fedveil.errors import FedveilError
from fedveil.runs.config import Group
from fedveil.settings import Option, allowed, options

_Command = Callable[..., None]


def with_settings(settings: type[Any]) -> Callable[[_Command], _Command]:
    """Give a command an option for every setting; those that are given reach it.

    Args:
        settings: A model whose fields are made by ``fedveil.runs.config.setting``, or a dataclass
            with fields made by ``fedveil.settings.option``.

    Returns:
        What takes a command, which has keyword parameters of its own and takes the settings as
        further keyword arguments, by the fields' names and with the fields' types.
    """

    def give(command: _Command) -> _Command:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        known = {setting.name: setting for setting in _settings(settings)}

        @wraps(command)
        def run(**given: Any) -> None:
            chosen = {
                name: known[name].value(given.pop(name))
                for name in list(given)
                if name in known and given[name] not in (None, [])
            }
            command(**{one.name: given[one.name] for one in own}, **chosen)

        parameters = [*own, *(setting.parameter() for setting in known.values())]
        parameters.sort(key=_place)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return give


@dataclass(frozen=True)
class _Setting:
    """A field as it is written.

    Attributes:
        name: Of the field.
        kind: Its type.
        default: Where nothing is given.
        option: How it is shown.
    """

    name: str
    kind: Any
    default: Any
    option: Option

    def parameter(self) -> inspect.Parameter:
        """Return what typer reads: None unless it is given, so that a file's value holds."""
        option = typer.Option(
            *self._flags(),
            help=self._help(),
            rich_help_panel=self.option.group or None,
            show_default=False,
        )
        kind = self._read_as(self.kind) | None
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind, option],
        )

    def value(self, given: Any) -> Any:
        """Return what was given as the field's type has it."""
        if self.option.commas:
            return _numbers(self.option.named(self.name)[0], given)
        if isinstance(given, list):
            return tuple(given)
        return given.value if isinstance(given, StrEnum) else given

    def _read_as(self, kind: Any) -> Any:
        """Return the type an option is read as: of Literals the choice, of X | None the X."""
        if get_origin(kind) is Literal:
            values = {value.replace("-", "_"): value for value in get_args(kind)}
            return StrEnum(self.name.title().replace("_", ""), values)
        if NoneType in get_args(kind):
            (inner,) = (one for one in get_args(kind) if one is not NoneType)
            return self._read_as(inner)
        if get_origin(kind) is tuple:
            return str if self.option.commas else GenericAlias(list, get_args(kind)[0])
        return kind

    def _flags(self) -> tuple[str, ...]:
        (flag, *_) = flags = self.option.named(self.name)
        can_be_no = self._read_as(self.kind) is bool and self.default is not False
        if can_be_no and not self.option.flags:
            return (f"{flag}/--no-{flag.removeprefix('--')}",)
        return flags

    def _help(self) -> str:
        told = self.option.told
        if get_origin(self.kind) is tuple and not self.option.commas:
            told = f"{told.removesuffix('.')}; may be repeated."
        default = self.option.default or _written(self.default, commas=self.option.commas)
        facts = [f"default {default}" if default else "", allowed(self.option.limits)]
        shown = "; ".join(filter(None, facts))
        return f"{told} ({shown})" if shown else told


def _settings(settings: type[Any]) -> Iterator[_Setting]:
    if issubclass(settings, BaseModel):
        for name, field in settings.model_fields.items():
            shown: Any = field.json_schema_extra
            option = Option(
                told=field.description or "", flags=tuple(shown["flags"]), group=shown["group"]
            )
            yield _Setting(name, field.annotation, field.default, option)
        return
    kinds, shown_of = get_type_hints(settings), options(settings)
    own = inspect.get_annotations(settings)
    # What is a command's own comes before what it shares with others.
    for one in sorted(fields(settings), key=lambda one: one.name not in own):
        if one.name in shown_of:
            yield _Setting(one.name, kinds[one.name], one.default, shown_of[one.name])


def _place(parameter: inspect.Parameter) -> int:
    """Return where an option is shown: headings come in the order of their first options."""
    heading = getattr(get_args(parameter.annotation)[1], "rich_help_panel", None)
    return get_args(Group).index(heading) if heading else 0


def _written(default: Any, *, commas: bool) -> str:
    if default is None or default is False:
        return ""
    if isinstance(default, tuple):
        return ("," if commas else ", ").join(map(str, default))
    return "yes" if default is True else str(default)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise FedveilError(
            f"{option} {text!r} is no list of whole numbers; write them like 10,50"
        ) from None
