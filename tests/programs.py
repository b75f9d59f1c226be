"""Flower's programs, and fedveil's, as processes that need not load their libraries first.

A deployment is a dozen processes, and one more for each message and each question, and each takes
one to five seconds of a core to import what it may need before it does anything. Within
``warm_programs`` they are forks of one process that has loaded the libraries and computed nothing.
Flower and fedveil themselves are imported by each, as they read the environment then. A fork has
its own number, group, signals, files and end, as any process; that the programs start from nothing
is shown where this is not used (``test_examples``, ``test_package``, ``test_interrupts``).
"""

import atexit
import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
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
    "numpy",
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
    "typer.rich_utils",
    "uvicorn",
    "yaml",
)


@contextmanager
def warm_programs():
    """Let every program started meanwhile, by this process or by one it started, be a fork."""
    if sys.platform != "linux":
        yield
        return
    hooks = str(Path(__file__).with_name("warm"))
    added = {
        "FEDVEIL_TESTS_WARM": _server(),
        "PYTHONPATH": os.pathsep.join(filter(None, [hooks, os.environ.get("PYTHONPATH")])),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in added.items():
            patch.setenv(name, value)
        yield


@cache
def _server():
    """Start what is forked, which ends with this process, and return the path of its socket."""
    folder = tempfile.mkdtemp()
    place = str(Path(folder) / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(100)
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(listener.fileno())],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.communicate)  # it ends with its input
    return place


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
    words = told["words"]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = told["folder"]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for name in _LIBRARIES:
        with suppress(ImportError):
            import_module(name)
    gc.freeze()  # a collection in a fork would copy all of it
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        be = _Forks(listener).serve()
    if be is not None:
        _be(*be)
