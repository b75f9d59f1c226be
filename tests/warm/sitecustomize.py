"""What a Python program does first where its libraries are loaded elsewhere.

The interpreter reads it, as this folder is on ``PYTHONPATH`` (see ``tests/programs.py``). A program
of Flower's or fedveil's hands its words, environment and output to a fork of a process that has
loaded what it would load, and waits: a signal is passed on, and it ends as the fork does.
"""

import os
import sys

_PROGRAMS = ("fedveil", "flwr", "flwr-", "flower-")
_MODULES = ("fedveil.deployment.clientapp",)


def _is_ours(words):
    if words[:1] == ["-m"]:
        return words[1] in _MODULES
    folder, _, name = "".join(words[:1]).rpartition("/")
    return folder == sys.executable.rpartition("/")[0] and name.startswith(_PROGRAMS)


def _be(place, words):
    import json
    import signal
    import socket

    with socket.socket(socket.AF_UNIX) as line:
        line.connect(place)
        told = {"words": words, "folder": os.path.realpath("."), "environment": dict(os.environ)}
        told = json.dumps(told).encode()
        socket.send_fds(line, [len(told).to_bytes(8, "big")], [0, 1, 2])
        line.sendall(told)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: line.send(bytes([number])))
        line.recv(4)  # the number of the fork
        ended = line.recv(2)
    if len(ended) < 2:
        os._exit(1)
    code, number = ended
    if number:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(code)


if (_place := os.environ.get("FEDVEIL_TESTS_WARM")) and _is_ours(sys.orig_argv[1:]):
    _be(_place, sys.orig_argv[1:])
