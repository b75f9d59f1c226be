"""``fedveil`` in a process of its own that need not load PyTorch first.

A new interpreter takes five seconds of a core to import what a command may import, and the suite
runs some hundred commands. They are forks of one process that has imported and computed nothing: a
fork of the tests' own would hang in its first parallel loop, as OpenMP's other threads stay behind.
A fork has its own number, signals, files and end, as any process; what only a new interpreter shows
is tested with one (``test_interrupts``, ``test_package``).
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PRELOADED = (
    "torch",
    "torch._dynamo",  # the first optimiser imports it, in every worker of every run
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "kornia.filters",
    "sklearn.datasets",
    "torchmetrics.functional.image",
    "fedveil.cli.main",
    "fedveil.audit.egress",
    "fedveil.audit.leakage",
    "fedveil.audit.recorded",
    "fedveil.audit.sums",
    "fedveil.audit.theft",
    "fedveil.audit.trace",
    "fedveil.federation.training_run",
    "fedveil.report",
    "fedveil.studies.frontier",
)


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
        if sys.platform == "linux":
            server = multiprocessing.get_context("forkserver")
            server.set_forkserver_preload(list(_PRELOADED))
            told = (words, str(self._out), str(self._err), cwd, env, before)
            self._process = server.Process(target=_become, args=told)
            self._process.start()
        else:
            self._process = _Interpreter(words, self._out, self._err, cwd, env, before)
        self.pid = self._process.pid
        while not self._err.exists() and self.running:  # from then on it leads its group
            time.sleep(0.001)

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
        out, err = (p.read_text() if p.exists() else "" for p in (self._out, self._err))
        if late:
            self.kill()
            raise AssertionError(f"the command did not end within {timeout:g} seconds\n{err}")
        shutil.rmtree(self._folder, ignore_errors=True)
        return Done(self._process.exitcode, out, err)


class _Interpreter:
    """A new interpreter, where there are no forks; with what is used of a ``Process``."""

    def __init__(self, words, out, err, cwd, env, before):
        program = Path(sys.executable).with_name("fedveil")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            self._popen = subprocess.Popen(
                [program, *words],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
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


def _become(words, out, err, cwd, env, before):
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
        if before is not None:
            before()
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
