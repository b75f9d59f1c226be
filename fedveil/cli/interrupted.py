"""What a command says when it is interrupted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer


def goes_on() -> str:
    """Return what is left of work that keeps what is finished."""
    return "the same command goes on where it stopped"


def nothing_written() -> str:
    """Return what is left of work that writes at its end."""
    return "nothing was written"


@contextmanager
def interruptible(left: Callable[[], str] = goes_on) -> Iterator[None]:
    """End the command with status 130 where it is interrupted, and say what is left.

    Args:
        left: Returns what is left, asked once it was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; {left()}.", err=True)
        raise typer.Exit(130) from None
