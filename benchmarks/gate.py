"""What strangers can do to a deployment's gate: hold connections, and send bodies without end.

    python benchmarks/gate.py --out docs/results

A SuperLink and a gate on loopback; three registered nodes send heartbeats, signed as Flower signs
them, while strangers hold silent connections and push bodies. Everything is bounded and local.
"""

import argparse
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from written import write_result

from fedveil.deployment.control import register, status
from fedveil.deployment.layout import Deployment, create

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.deployment import signed
from tests.deployment.conftest import free_block

NODES = 3
_PIECE = bytes(2**20)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=120, help="held without a word")
    parser.add_argument("--bodies", type=int, default=20, help="of strangers")
    parser.add_argument("--megabytes", type=int, default=50, help="of each body")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = attack(
            Path(folder) / "deployment",
            arguments.connections,
            arguments.bodies,
            arguments.megabytes,
        )
    print(json.dumps(found, indent=1))
    write_result(arguments.out / "gate.json", arguments, **found)


def attack(home: Path, connections: int, bodies: int, megabytes: int) -> dict[str, Any]:
    """Return what the nodes and the SuperLink noticed of it."""
    create(home, Deployment("127.0.0.1", free_block(), NODES))
    started = [start(home, part) for part in ("superlink", "gate")]
    try:
        up = ("superlink", "gate")
        wait(lambda: all(on for part, on in status(home).parts.items() if part.startswith(up)))
        numbers = list(register(home).values())
        quiet = beats(home, numbers, seconds=5)
        before = memory(started[0].pid)
        with ExitStack() as held:
            for number in range(connections):
                held.enter_context(hold(home, silent=bool(number % 2)))
            pushers = [threading.Thread(target=push, args=(home, megabytes)) for _ in range(bodies)]
            for pusher in pushers:
                pusher.start()
            attacked = beats(home, numbers, seconds=20)
            for pusher in pushers:
                pusher.join()
        return {
            "connections": connections,
            "strangers_megabytes": bodies * megabytes,
            "heartbeats": len(attacked),
            "unanswered": sum(code != 200 for code, _ in attacked),
            "slowest_seconds": max(seconds for _, seconds in attacked),
            "slowest_seconds_before": max(seconds for _, seconds in quiet),
            "superlink_megabytes_grown": (memory(started[0].pid) - before) / 2**20,
        }
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)


def start(home: Path, part: str) -> subprocess.Popen[bytes]:
    """Start one part of a deployment's server by its script."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [str(home / f"start-{part}")],
        env={**os.environ, "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait(condition: Any) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the deployment did not start")
        time.sleep(0.5)


def beats(home: Path, numbers: list[int], *, seconds: float) -> list[tuple[int, float]]:
    """Return status and time of every heartbeat of every node, two a second each."""
    port, found = Deployment.open(home).port, []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for place, number in enumerate(numbers):
            head = signed.headers(home / "nodes" / f"node-{place}" / "node.key")
            began = time.monotonic()
            try:
                beat = signed.heartbeat(number)
                code, _ = signed.ask(port, "send-node-heartbeat", beat, home / "ca.crt", head)
            except OSError:
                code = 0
            found.append((code, time.monotonic() - began))
        time.sleep(0.5)
    return found


def hold(home: Path, *, silent: bool) -> ssl.SSLSocket:
    """Return a connection that says nothing, or promises a body that never comes."""
    context = ssl.create_default_context(cafile=home / "ca.crt")
    plain = socket.create_connection(("127.0.0.1", Deployment.open(home).port), timeout=60)
    secure = context.wrap_socket(plain, server_hostname="127.0.0.1")
    if not silent:
        secure.sendall(
            b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 300000000\r\n\r\n"
        )
    return secure


def push(home: Path, megabytes: int) -> None:
    """Send a stranger's body until it ends or the gate closes."""
    size = megabytes * len(_PIECE)
    try:
        with hold(home, silent=True) as connection:
            head = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: {size}"
            connection.sendall(f"{head}\r\n\r\n".encode())
            for _ in range(megabytes):
                connection.sendall(_PIECE)
    except OSError:
        return


def memory(process: int) -> int:
    """Return the bytes that a process and its children hold."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(entry.name)) == process:
                total += int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total


if __name__ == "__main__":
    main()
