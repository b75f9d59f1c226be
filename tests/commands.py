"""``fedveil`` in a process of its own that need not load PyTorch first.

A new interpreter takes five seconds of a core to import what a command may import, and the suite
runs some hundred commands. They are forks of one process that has imported and computed nothing
(``tests.programs``): a fork of the tests' own would hang in its first parallel loop, as OpenMP's
other threads stay behind.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.programs import Fork

_PROGRAM = Path(sys.executable).with_name("fedveil")


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def forked(*words, cwd=None, env=None, timeout=900.0, before=None):
    """Run ``fedveil`` with these words to its end.

    Args:
        words: As on the command line.
        cwd: Its folder.
        env: All of its environment; None: the tests' own.
        timeout: Seconds after which it is killed, and the test fails.
        before: Called in the new process before anything else; of a module, as it is sent there.
    """
    return started(*words, cwd=cwd, env=env, before=before).ended(timeout)


def started(*words, cwd=None, env=None, before=None):
    """Begin the same, and return while it goes on: it leads a process group of its own."""
    words = tuple(str(word) for word in words)
    cwd, env = str(cwd or Path.cwd()), dict(os.environ if env is None else env)
    return Started(words, cwd, env, before)


class Started:
    """A command that goes on.

    Attributes:
        pid: Its number, and that of its group.
    """

    def __init__(self, words, cwd, env, before):
        self._folder = Path(tempfile.mkdtemp())
        self._out, self._err = self._folder / "out", self._folder / "err"
        with (
            Path(os.devnull).open() as none,
            self._out.open("wb") as out,
            self._err.open("wb") as err,
        ):
            begin = _fork if sys.platform == "linux" else _Interpreter
            self._process = begin(words, (none, out, err), cwd, env, before)
        self.pid = self._process.pid

    @property
    def running(self):
        """Whether it has not ended."""
        return self._process.is_alive()

    def signal(self, number):
        """Send it and all it started a signal."""
        os.killpg(self.pid, number)

    def kill(self):
        """End it and all it started at once, as a loss of power does, where it has not ended."""
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._process.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def ended(self, timeout=900.0):
        """Wait for its end; after ``timeout`` seconds it is killed, and the test fails."""
        self._process.join(timeout)
        late = self.running
        out, err = self._out.read_text(), self._err.read_text()
        if late:
            self.kill()
            raise AssertionError(f"the command did not end within {timeout:g} seconds\n{err}")
        shutil.rmtree(self._folder, ignore_errors=True)
        return Done(self._process.exitcode, out, err)


def _fork(words, files, cwd, env, before):
    files = [file.fileno() for file in files]
    return Fork([str(_PROGRAM), *words], files, folder=cwd, environment=env, before=before)


class _Interpreter:
    """A new interpreter, where there are no forks; with what is used of a ``Fork``."""

    def __init__(self, words, files, cwd, env, before):
        self._popen = subprocess.Popen(
            [_PROGRAM, *words],
            cwd=cwd,
            env=env,
            stdin=files[0],
            stdout=files[1],
            stderr=files[2],
            start_new_session=True,
            preexec_fn=before,
        )
        self.pid = self._popen.pid

    def is_alive(self):
        return self._popen.poll() is None

    def join(self, timeout=None):
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)

    @property
    def exitcode(self):
        return self._popen.returncode
