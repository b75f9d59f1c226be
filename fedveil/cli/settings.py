"""The fields of a run's configuration as options of ``fedveil train``."""

import inspect
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import wraps
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from fedveil.runs.config import Group, TrainConfig


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting of a run; those that are given reach it.

    Args:
        command: Takes the settings as keyword arguments, besides keyword parameters of its own.
    """
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    names = {parameter.name for parameter in own}

    @wraps(command)
    def run(**given: Any) -> None:
        settings = {k: v for k, v in given.items() if k not in names and v is not None}
        command(**{name: given[name] for name in names}, **settings)

    parameters = [*_options(), *own]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options() -> Iterator[inspect.Parameter]:
    headings = get_args(Group)
    # Headings are shown as their first options come.
    for name, field in sorted(
        TrainConfig.model_fields.items(), key=lambda item: headings.index(_shown(item[1])["group"])
    ):
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name, field)
        )


def _option(name: str, field: FieldInfo) -> Any:
    """Return one option's annotation: None unless it is given, so that a file's value holds."""
    kind, shown = _kind(name, field.annotation), _shown(field)
    default = "" if field.default in (None, False) else f" (default {_written(field.default)})"
    option = typer.Option(
        *(shown["flags"] or _flags(name, field, kind)),
        help=f"{field.description}{default}",
        rich_help_panel=shown["group"],
        show_default=False,
    )
    return Annotated[kind | None, option]


def _shown(field: FieldInfo) -> Any:
    return field.json_schema_extra


def _kind(name: str, annotation: Any) -> Any:
    """Return the type an option is read as: of Literals the choice, of X | None the X."""
    if get_origin(annotation) is Literal:
        values = get_args(annotation)
        return StrEnum(name.title().replace("_", ""), {v.replace("-", "_"): v for v in values})
    if NoneType in get_args(annotation):
        (inner,) = (kind for kind in get_args(annotation) if kind is not NoneType)
        return _kind(name, inner)
    return annotation


def _flags(name: str, field: FieldInfo, kind: Any) -> tuple[str, ...]:
    flag = f"--{name.replace('_', '-')}"
    if kind is bool and field.default is not False:
        return (f"{flag}/--no-{flag.removeprefix('--')}",)
    return (flag,)


def _written(default: Any) -> str:
    return "yes" if default is True else str(default)
