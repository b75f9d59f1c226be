"""Requests to end are answered the same whoever sends them, and whatever ignores Ctrl-C."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from fedveil.errors import FedveilError
from fedveil.interrupts import Terminated, answer_sigterm, held
from fedveil.progress import PlainLines
from fedveil.studies.study import Piece, run_pieces

FEDVEIL = [sys.executable, "-m", "fedveil"]


@pytest.fixture
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    answer_sigterm()
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_request_that_comes_while_held_is_answered_after(sigterm):
    reached = False

    def fork_like():
        nonlocal reached
        with held():
            # To this thread: one to the process may be taken by another, whenever that wakes up.
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            reached = True

    with pytest.raises(Terminated):
        fork_like()
    assert reached


def test_it_is_held_where_another_thread_takes_the_signal(sigterm):
    running, reached = threading.Event(), False
    other = threading.Thread(target=running.wait)
    other.start()

    def fork_like():
        nonlocal reached
        with held():
            signal.pthread_kill(other.ident, signal.SIGTERM)
            time.sleep(0.2)
            reached = True

    try:
        with pytest.raises(Terminated):
            fork_like()
    finally:
        running.set()
        other.join()
    assert reached


def _sleeps(folder, name):
    (folder / f"{name}.pid").write_text(str(os.getpid()))
    try:
        time.sleep(600)
    finally:
        (folder / f"{name}.ended").touch()


def _fails(folder, name):
    while not (folder / "sleeps.pid").exists():
        time.sleep(0.01)
    raise FedveilError("this one fails")


def test_a_piece_that_fails_stops_the_others_where_ctrl_c_is_ignored(tmp_path):
    pieces = [Piece("sleeps", _sleeps, (tmp_path, "sleeps")), Piece("f", _fails, (tmp_path, "f"))]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with pytest.raises(FedveilError, match="f: this one fails"):
            run_pieces(pieces, workers=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "sleeps.ended").exists()  # it cleaned up, and was not killed
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "sleeps.pid").read_text()), 0)


def test_sigterm_leaves_what_is_done_and_says_how_to_go_on(tmp_path):
    run = tmp_path / "run"
    command = [*FEDVEIL, "train", "--dataset", "digits", "--clients", "2", "--rounds", "500"]
    command += ["--strategy", "fedavg", "--workers", "1", "--out", str(run)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stderr is not None
    # Off a terminal, a plain line.
    assert any(line.startswith("round 1 of 500  accuracy") for line in process.stderr)
    process.terminate()
    said = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert f"fedveil train --resume {run}" in said
    assert (run / "rounds.jsonl").exists()
    assert not list(run.glob("*.part"))


def test_plain_lines_come_at_most_every_30_seconds_and_at_the_end():
    told, clock = io.StringIO(), iter([0.0, 1.0, 29.0, 31.0, 32.0, 33.0])
    lines = PlainLines(Console(file=told, width=200), now=lambda: next(clock))
    for done in range(1, 7):
        lines("round", done, 6, "x")
    assert told.getvalue().splitlines() == [f"round {done} of 6  x" for done in (1, 4, 6)]


def test_python_m_fedveil_is_the_command_line():
    done = subprocess.run([*FEDVEIL, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fedveil ")


def test_workers_that_their_parent_ends_print_nothing():
    """Before, a fork answered SIGTERM as its parent does: with a traceback."""
    code = (
        "import multiprocessing\n"
        "from fedveil import interrupts\n"
        "interrupts.answer_sigterm()\n"
        "for _ in range(50):\n"
        "    with interrupts.held():\n"
        "        context = multiprocessing.get_context('fork')\n"
        "        pool = context.Pool(4, interrupts.leave_to_parent)\n"
        "    pool.apply(abs, (1,))\n"
        "    pool.terminate()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
