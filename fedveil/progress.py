"""Progress of long work: bars on a terminal, plain lines where there is none, not too many."""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_EVERY_SECONDS = 30.0


def say(sentence: str) -> None:
    """Write a sentence for the user to standard error, on one line."""
    Console(stderr=True).print(sentence, markup=False, soft_wrap=True)


class PlainLines:
    """Writes a line a step, or one in 30 seconds where steps are shorter; the last one always.

    Args:
        console: Where to, standard error if not given; nothing is written where it is a terminal,
            which shows a bar.
        now: A clock in seconds.
        patient: Say nothing at all of steps that end within 30 seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
        *,
        patient: bool = False,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._now = now
        self._last: dict[str, float] = {}
        self._since = now() if patient else None

    def __call__(self, step: str, done: int, total: int | None, text: str = "") -> None:
        """Say how far a step is.

        Args:
            step: What is done.
            done: How much of it.
            total: Of how much; None where that is not known.
            text: What else there is to say.
        """
        if self._console.is_terminal:
            return
        now, last = self._now(), self._last.get(step)
        if self._since is not None and now - self._since < _EVERY_SECONDS:
            return
        ends = total is not None and done >= total
        if not ends and last is not None and now - last < _EVERY_SECONDS:
            return
        self._last[step] = now
        of = f"{done}" if total is None else f"{done} of {total}"
        self._console.print(f"{step} {of}  {text}".rstrip(), markup=False, soft_wrap=True)


class ProgressBars:
    """A bar for each step of some work, and the same in plain lines where no terminal is.

    Args:
        left: Whether the time that is left is shown.
        transient: Whether the bars vanish at the end.
        console: Where to draw; standard error if not given.
    """

    def __init__(
        self, *, left: bool = False, transient: bool = False, console: Console | None = None
    ) -> None:
        console = console or Console(stderr=True)
        remaining = (TextColumn("left"), TimeRemainingColumn()) if left else ()
        self._plain = PlainLines(console)
        self._bars = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            *remaining,
            console=console,
            transient=transient,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def begin(self, step: str, done: int, total: int | None, text: str = "starting") -> None:
        """Show a step before anything more of it is done."""
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, total=total, text="")
        self._bars.update(self._tasks[step], completed=done, total=total, text=text)

    def __call__(self, step: str, done: int, total: int | None, text: str = "") -> None:
        """Say how far a step is, as of ``PlainLines``."""
        self.begin(step, done, total, text)
        self._plain(step, done, total, text)
