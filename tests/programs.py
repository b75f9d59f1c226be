"""Flower's programs, and fedveil's, as processes that need not load their libraries first.

A deployment is a dozen processes, and one more for each message and each question, and each takes
one to five seconds of a core to import what it may need before it does anything. Within
``warm_programs`` they are forks of one process that has loaded the libraries and computed nothing.
Flower and fedveil themselves are imported by each, as they read the environment then; only the
commands of ``tests.commands`` are forks of a second process, a fork of the first, that has imported
fedveil as well. All workers of the suite share the two. A fork has its own number, group, signals,
files and end, as any process; that the programs start from nothing is shown where this is not used
(``test_examples``, ``test_package``, ``test_interrupts``).
"""

import atexit
import gc
import json
import os
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import pytest

_LIBRARIES = (
    "alembic.command",
    "Crypto.Protocol.SecretSharing",
    "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.hazmat.primitives.serialization",
    "cryptography.x509",
    "fastapi",
    "google.protobuf.json_format",
    "grpc",
    "grpc_health.v1.health_pb2_grpc",
    "httpx",
    "kornia.filters",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "numpy",
    "opacus",
    "packaging.requirements",
    "pathspec",
    "PIL.Image",
    "prompt_toolkit",
    "pydantic",
    "requests",
    "rich.console",
    "rich.markdown",
    "rich.traceback",
    "safetensors.torch",
    "scipy.optimize",
    "scipy.special",
    "sklearn.datasets",
    "sqlalchemy.dialects.sqlite",
    "sqlalchemy.orm",
    "tomli",
    "torch",
    "torch._dynamo",  # the first optimiser imports it
    "torchmetrics.functional.image",
    "typer.rich_utils",
    "uvicorn",
    "yaml",
)
_FEDVEIL = (
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
_SHARED = "FEDVEIL_TESTS_FORKS"


@contextmanager
def warm_programs():
    """Let every program started meanwhile, by this process or by one it started, be a fork."""
    if sys.platform != "linux":
        yield
        return
    hooks = str(Path(__file__).with_name("warm"))
    added = {
        "FEDVEIL_TESTS_WARM": f"{_server()}/libraries",
        "PYTHONPATH": os.pathsep.join(filter(None, [hooks, os.environ.get("PYTHONPATH")])),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in added.items():
            patch.setenv(name, value)
        yield


class Fork:
    """A program that is a fork of the process that has imported fedveil.

    Attributes:
        pid: Its number; it leads a session.
        exitcode: How it ended, as a ``multiprocessing.Process`` tells it; None before.
    """

    def __init__(self, words, files, *, folder, environment, before=None):
        self.exitcode = None
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(f"{_server()}/fedveil")
        told = {"words": words, "folder": folder, "environment": environment}
        if before is not None:
            told["before"] = (before.__code__.co_filename, before.__name__)
        told = json.dumps(told).encode()
        socket.send_fds(self._line, [len(told).to_bytes(8, "big")], files)
        self._line.sendall(told)
        self.pid = int.from_bytes(self._line.recv(4), "big")

    def is_alive(self):
        """Whether it goes on."""
        self.join(0)
        return self.exitcode is None

    def join(self, timeout=None):
        """Wait for its end, at most so many seconds."""
        if self.exitcode is None and select.select([self._line], [], [], timeout)[0]:
            code, number = self._line.recv(2) or (1, 0)
            self.exitcode = -number or code
            self._line.close()


def share_forks():
    """Let the processes started from here on use this one's."""
    os.environ[_SHARED] = _server()


@cache
def _server():
    """Return the folder of the sockets of what is forked, which ends with who began it."""
    if _SHARED in os.environ:
        return os.environ[_SHARED]
    folder = tempfile.mkdtemp()
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        for listener, name in zip(listeners, ("libraries", "fedveil"), strict=True):
            listener.bind(f"{folder}/{name}")
            listener.listen(100)
        numbers = [listener.fileno() for listener in listeners]
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, numbers)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            pass_fds=numbers,
            start_new_session=True,
        )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.communicate)  # it ends with its input
    return folder


class _Forks:
    """Forks for whoever asks, tells each what it is sent, and tells who asked how it ended."""

    def __init__(self, listener):
        self._listener = listener
        self._lines = {}  # by the number of the fork, which is also its group's
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._end)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def serve(self):
        """Return what to be, in every fork; in this process None, once its input ends."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj not in self._selector.get_map():
                    continue  # it went meanwhile
                told = key.data(key.fileobj)
                if told is not None:
                    return told or None

    def _end(self, _):
        for number in self._lines:
            _send(number, signal.SIGKILL)
        return ()

    def _accept(self, _):
        line, _ = self._listener.accept()
        try:
            told, files = _asked(line)
        except (OSError, ValueError):  # who asked was killed meanwhile
            line.close()
            return None
        number = os.fork()
        if not number:
            os.setsid()
            with suppress(OSError):
                line.sendall(os.getpid().to_bytes(4, "big"))
            for key in list(self._selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
                elif key.fd != sys.stdin.fileno():
                    os.close(key.fd)
            self._selector.close()
            return told, files
        for file in files:
            os.close(file)
        self._lines[number] = line
        end = os.pidfd_open(number)
        self._selector.register(line, selectors.EVENT_READ, partial(self._tell, number))
        self._selector.register(end, selectors.EVENT_READ, partial(self._ended, number))
        return None

    def _tell(self, number, line):
        try:
            sent = line.recv(64)
        except ConnectionError:
            sent = b""
        if not sent:  # who asked was killed, and so is what it started
            self._selector.unregister(line)
        for byte in sent or [signal.SIGKILL]:
            _send(number, byte)

    def _ended(self, number, end):
        self._selector.unregister(end)
        os.close(end)
        code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        line = self._lines[number]
        if line in self._selector.get_map():
            self._selector.unregister(line)
        with suppress(OSError):
            line.sendall(bytes([max(code, 0), max(-code, 0)]))
        line.close()
        if not _send(number, 0):  # nothing that it started is left
            del self._lines[number]


def _asked(line):
    """Return what a program is to be, and its files."""
    head, files, _, _ = socket.recv_fds(line, 8, 3)
    rest = line.makefile("rb", buffering=0)
    told = b""
    while len(told) < int.from_bytes(head, "big"):
        part = rest.read(2**20)
        if not part:
            raise ValueError("it ended in the middle")
        told += part
    return json.loads(told), files


def _send(number, sign):
    """Send a fork and its group a signal, and return whether anything is left of them."""
    for send in (os.killpg, os.kill):  # it may lead no group yet
        try:
            send(number, sign)
        except ProcessLookupError:
            continue
        return True
    return False


def _be(told, files):
    """Be a program to its end; never returns."""
    code = 1
    try:
        _become(told, files)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # As at the end of an interpreter, but for tearing down all that was loaded.
        threading._shutdown()
        atexit._run_exitfuncs()
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(told, files):
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    import numpy as np

    np.random.seed()  # else every fork would draw the same
    if "before" in told:
        file, name = told["before"]
        runpy.run_path(file)[name]()
    words = told["words"]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = told["folder"]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def _serve(listener, modules):
    """Load modules and make forks until the end; returns in every fork alone what it is to be."""
    for name in modules:
        with suppress(ImportError):
            import_module(name)
    gc.freeze()  # a collection in a fork would copy all of it
    for loaded in weakref.finalize._registry.values():
        loaded.atexit = False  # taken apart at the end of every fork, it would be copied as well
    with socket.socket(fileno=listener) as listening:
        be = _Forks(listening).serve()
    if be is None:
        os._exit(0)
    return be


def _main(libraries, fedveil):
    """Serve both sockets, each from a process of its own."""
    for name in _LIBRARIES:
        with suppress(ImportError):
            import_module(name)
    if os.fork():
        os.close(fedveil)
        return _serve(libraries, ())
    os.close(libraries)
    return _serve(fedveil, _FEDVEIL)


if __name__ == "__main__":
    _be(*_main(*map(int, sys.argv[1:])))
