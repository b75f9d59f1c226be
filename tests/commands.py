"""``fedveil`` in a process of its own that need not load PyTorch first.

A new interpreter takes three seconds of a core to import what every command imports, and the suite
runs some hundred commands. They are forks of one process that has imported and computed nothing: a
fork of the tests' own would hang in its first parallel loop, as OpenMP's other threads stay behind.
A fork has its own number, signals, files and end, as any process; what only a new interpreter shows
is tested with one (``test_interrupts``, ``test_package``, ``test_contributing``).
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def forked(*words, cwd=None, env=None, timeout=900.0):
    """Run ``fedveil`` with these words to its end.

    Args:
        words: As on the command line.
        cwd: Its folder.
        env: All of its environment; None: the tests' own.
        timeout: Seconds after which it is killed, and the test fails.
    """
    words = [str(word) for word in words]
    cwd, env = str(cwd or Path.cwd()), dict(os.environ if env is None else env)
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
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        command = _server().Process(target=_become, args=(words, str(out), str(err), cwd, env))
        command.start()
        command.join(timeout)
        if command.is_alive():
            os.killpg(command.pid, signal.SIGKILL)
            command.join()
            said = err.read_text() if err.exists() else ""
            raise AssertionError(f"the command did not end within {timeout:g} seconds\n{said}")
        return Done(command.exitcode, out.read_text(), err.read_text())


def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "flwr.serverapp", "fedveil.cli.main"])
    return context


def _become(words, out, err, cwd, env):
    """Be the command from here on; never returns."""
    code = 1
    try:
        os.setsid()
        for number, place in ((0, os.devnull), (1, out), (2, err)):
            os.dup2(os.open(place, os.O_RDWR | os.O_CREAT, 0o600), number)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = ["fedveil", *words]
        from fedveil.cli.main import main

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
