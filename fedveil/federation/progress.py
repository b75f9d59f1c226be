"""Progress of a run on the terminal; silent when there is none."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedveil.progress import PlainLines
from fedveil.runs.directory import RoundRecord


class RoundProgress:
    """A bar with the round, the accuracy of w, the copies against the cap, and the time left.

    Args:
        rounds: Rounds in all.
        completed: Rounds an earlier process completed.
        cap: Accuracy the copies stay below; ``None`` where nothing is capped.
        console: Where to draw; standard error if not given. Off a terminal, plain lines.
    """

    def __init__(
        self,
        *,
        rounds: int,
        completed: int = 0,
        cap: float | None,
        console: Console | None = None,
    ) -> None:
        console = console or Console(stderr=True)
        self.cap = cap
        self._rounds = rounds
        self._plain = PlainLines(console)
        self.last = completed
        self._progress = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=rounds, completed=completed)

    def __enter__(self) -> "RoundProgress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, record: RoundRecord) -> None:
        """Show a finished round."""
        self.last = record.round
        text = f"accuracy {record.accuracy:.1%}"
        if self.cap is not None:
            text += f"  copies {max(record.copies):.1%} (cap {self.cap:.0%})"
        self._progress.update(self._task, completed=record.round, description=text)
        self._plain("round", record.round, self._rounds, text)
