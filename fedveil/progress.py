"""Progress where no terminal is: plain lines, not too many."""

import time
from collections.abc import Callable

from rich.console import Console

_EVERY_SECONDS = 30.0


class PlainLines:
    """Writes a line a step, or one in 30 seconds where steps are shorter; the last one always.

    Args:
        console: Where to; nothing is written where it is a terminal, which shows a bar.
        now: A clock in seconds.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._last: dict[str, float] = {}

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
        ends = total is not None and done >= total
        if not ends and last is not None and now - last < _EVERY_SECONDS:
            return
        self._last[step] = now
        of = f"{done}" if total is None else f"{done} of {total}"
        self._console.print(f"{step} {of}  {text}".rstrip(), markup=False, soft_wrap=True)
