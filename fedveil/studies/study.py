"""The engine of studies: pieces, each measured once, and a result, a table and pictures of them."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from fedveil import interrupts
from fedveil.errors import FedveilError
from fedveil.files import check_directory, json_bytes, write_results
from fedveil.forks import START_METHOD, load_before_forking
from fedveil.memory import keep_freed_memory
from fedveil.pictures import png
from fedveil.runs.directory import origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PATIENCE_SECONDS = 10.0

OnPiece = Callable[[str, int, int], None]
"""Called as ``on_piece(name, pieces begun before, pieces in all)`` when a piece begins."""


@dataclass(frozen=True)
class Piece:
    """A part of a study, which leaves what it finds in files and is not done again where it is.

    Attributes:
        name: Of no other piece of the study; for progress, and to find what it found.
        work: Does it, or reads what an earlier process has found; picklable.
        arguments: Of ``work``.
        needs: Names of earlier pieces that must have ended before it begins.
    """

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()

    def found(self) -> Any:
        """Do it where it is not done, and return what it found."""
        return self.work(*self.arguments)


class Study(Protocol):
    """What is measured, in which pieces, and what is made of what they find.

    Attributes:
        name: Of its files: ``NAME.json``, ``NAME.md``, and ``NAME.png`` where there are pictures.
    """

    name: ClassVar[str]

    @property
    def command(self) -> str:
        """The command that runs it."""

    def check(self) -> None:
        """Refuse what would fail hours later; nothing has been written yet."""

    def pieces(self, out: Path) -> Sequence[Piece]:
        """Return its pieces, each after those it needs."""

    def result(self, found: Mapping[str, Any], out: Path) -> dict[str, Any]:
        """Return what is stored below command, date and versions, of what each piece found."""

    def table(self, result: Mapping[str, Any]) -> str:
        """Return the result in Markdown."""

    def figures(self, result: Mapping[str, Any], out: Path) -> Mapping[str, "Figure"]:
        """Return its pictures, by the names of their files."""


def measure(
    study: Study,
    out: Path,
    *,
    workers: int | None = None,
    on_piece: OnPiece = lambda name, done, total: None,
) -> dict[str, Any]:
    """Measure what is missing of a study, then write its result, table and pictures.

    What is complete is not done again, and what was cut short goes on, or begins again where its
    piece cannot.

    Args:
        study: What to measure.
        out: Directory of the study, for its pieces too.
        workers: Processes side by side, a piece each; None for one after another in this process.
        on_piece: Told of each piece that begins.

    Returns:
        The content of ``NAME.json``.

    Raises:
        FedveilError: Anything the user can mend; nothing is written where a setting is wrong.
    """
    if workers is not None and workers < 1:
        raise FedveilError(f"--workers {workers} is out of range: give at least 1")
    check_directory(out)
    study.check()
    pieces, found = study.pieces(out), dict[str, Any]()
    if workers is not None:
        run_pieces(pieces, workers=workers, on_piece=on_piece)
    for piece in pieces:
        if workers is None:
            on_piece(piece.name, len(found), len(pieces))
        found[piece.name] = piece.found()
    result = {"command": study.command, **origin(), **study.result(found, out)}
    pictures = {name: png(figure) for name, figure in study.figures(result, out).items()}
    written = {
        f"{study.name}.md": study.table(result).encode(),
        f"{study.name}.json": json_bytes(result),
    }
    write_results(out, pictures | written)
    return result


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def run_pieces(
    pieces: Sequence[Piece],
    *,
    workers: int,
    on_piece: OnPiece = lambda name, done, total: None,
) -> None:
    """Do pieces of work in processes side by side.

    An interrupt reaches every process, and the call ends when all have cleaned up.

    Args:
        pieces: In the order in which they begin, save those that wait for what they need.
        workers: Processes at a time, at least 1.
        on_piece: Told of each that begins.

    Raises:
        FedveilError: A piece failed; those under way are interrupted, and finished ones kept.
    """
    context = multiprocessing.get_context(START_METHOD)
    if pieces:  # their pictures and scores
        load_before_forking("matplotlib.backends.backend_agg", "torchmetrics.functional.image")
    waiting, ended = list(pieces), set[str]()
    running = dict[int, tuple[BaseProcess, Any, Piece]]()
    try:
        while waiting or running:
            while len(running) < workers and (piece := _next(waiting, ended)):
                waiting.remove(piece)
                on_piece(piece.name, len(pieces) - len(waiting) - 1, len(pieces))
                process, receiver = _start(context, piece)
                running[process.sentinel] = (process, receiver, piece)
            assert running, f"{waiting[0].name} needs what is no piece"
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                process, receiver, piece = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    told = receiver.recv() if receiver.poll() else f"exit {process.exitcode}"
                    raise FedveilError(f"{piece.name}: {told}")
                ended.add(piece.name)
    finally:
        _stop([process for process, _, _ in running.values()])


def _next(waiting: Sequence[Piece], ended: set[str]) -> Piece | None:
    return next((piece for piece in waiting if ended.issuperset(piece.needs)), None)


def _start(context: BaseContext, piece: Piece) -> tuple[BaseProcess, Any]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(piece, sender))  # type: ignore[attr-defined]
    with interrupts.held():
        process.start()
    sender.close()
    return process, receiver


def _work(piece: Piece, sender: Any) -> None:
    # What a piece is ended by; Ctrl-C is not heard by one that was started under nohup or cron.
    interrupts.answer_sigterm()
    # Several processes would draw their progress bars over one another.
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        piece.found()
    except KeyboardInterrupt:
        sys.exit(130)
    except FedveilError as error:
        sender.send(str(error))
        sys.exit(2)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
        sys.exit(1)


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            process.terminate()
    for process in processes:
        process.join(_PATIENCE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
