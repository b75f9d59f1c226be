"""Forks of ``tests/programs.py`` are what new interpreters are: words, signals, groups and ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.programs import warm_programs

FEDVEIL = Path(sys.executable).with_name("fedveil")


@pytest.fixture(autouse=True)
def warm():
    with warm_programs():
        yield


def told(*words, **options):
    return subprocess.run([FEDVEIL, *words], capture_output=True, text=True, check=False, **options)


def test_it_says_and_returns_what_a_new_interpreter_does(tmp_path, monkeypatch):
    warm = told("train", "--config", "none.toml", "--out", "run", cwd=tmp_path)
    monkeypatch.delenv("FEDVEIL_TESTS_WARM")
    new = told("train", "--config", "none.toml", "--out", "run", cwd=tmp_path)
    assert (warm.returncode, warm.stdout, warm.stderr) == (2, new.stdout, new.stderr)
    assert new.returncode == 2


def _waits(tmp_path):
    """Start a program that waits for ever; return it, and the number of the fork that it is."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    words = [FEDVEIL, "train", "--config", fifo, "--out", tmp_path / "run"]
    program = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    end = os.open(fifo, os.O_WRONLY)  # as soon as it reads
    (fork,) = (
        int(place.name)
        for place in Path("/proc").glob("[0-9]*")
        if int(place.name) not in (os.getpid(), program.pid) and _holds(place, fifo)
    )
    return program, fork, end


def _holds(place, file):
    try:
        return any(held.samefile(file) for held in (place / "fd").iterdir())
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere programs are started, not forked")
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_it_as_it_ends_a_new_interpreter(tmp_path, sign, code):
    program, fork, end = _waits(tmp_path)
    os.killpg(program.pid, sign)
    assert program.wait(timeout=60) == code
    os.close(end)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{fork}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{fork}").exists()
