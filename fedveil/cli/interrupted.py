"""What a command says when it is interrupted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

GOES_ON = "the same command goes on where it stopped"
NOTHING_WRITTEN = "nothing was written"


@contextmanager
def interruptible(left: str | Callable[[], str] = GOES_ON) -> Iterator[None]:
    """End the command with status 130 where it is interrupted, and say what is left.

    Args:
        left: What is, or tells it once it was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; {left if isinstance(left, str) else left()}.", err=True)
        raise typer.Exit(130) from None
