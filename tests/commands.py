"""``fedveil`` in a process of its own that need not load PyTorch first: a fork of the tests'.

A new interpreter takes three seconds of a core to import what the tests have imported already, and
the suite runs some hundred commands. A fork has its own number, signals, files and end, as any
process; what only a new interpreter shows is tested with one (``test_interrupts``,
``test_package``, ``test_contributing``).
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import flwr.serverapp  # noqa: F401  (so that no fork has to)
import torch  # noqa: F401

from fedveil.cli.main import main


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def forked(*words, cwd=None, env=None, timeout=300.0):
    """Run ``fedveil`` with these words to its end.

    Args:
        words: As on the command line.
        cwd: Its folder.
        env: All of its environment; None: the tests' own.
        timeout: Seconds after which it is killed, and the test fails.
    """
    words = [str(word) for word in words]
    if sys.platform != "linux":
        program = Path(sys.executable).with_name("fedveil")
        done = subprocess.run(
            [program, *words],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        return Done(done.returncode, done.stdout, done.stderr)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _become(words, out.fileno(), err.fileno(), cwd, env)
        status = _ended(child, timeout)
        return Done(os.waitstatus_to_exitcode(status), _read(out), _read(err))


def _become(words, out, err, cwd, env):
    """Be the command from here on; never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
        _log_to(sys.stderr)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if cwd is not None:
            os.chdir(cwd)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        sys.argv = ["fedveil", *words]
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _log_to(stream):
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if type(handler) is logging.StreamHandler:
            handler.setStream(stream)


def _ended(child, timeout):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the command did not end within {timeout:g} seconds")


def _read(file):
    file.seek(0)
    return file.read().decode()
