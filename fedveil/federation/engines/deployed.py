"""The deployed engine: a run submitted to a SuperLink, and followed to its end.

Flower's programs do the work and their output says how it went; nothing here reaches into them.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedveil.errors import FedveilError
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RoundRecord, RunDirectory
from fedveil.sealing import KEY_FILE

ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # Flower looks for the next message once a second. Twenty looks a second take a part of a core
    # at each end while nothing happens.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own executor would otherwise copy the working directory's environment.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_STATUS_EVERY = 3.0
_PATIENCE = 30.0
_RUN_FILE = "flower-run.json"


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink as Flower's command line reaches it.

    Attributes:
        home: ``FLWR_HOME``, whose ``config.toml`` says where it is.
        environment: Of the commands.
        check: Raises where a process of ours that belongs to it has ended.
    """

    home: Path
    environment: Mapping[str, str]
    check: Callable[[], None]

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Flower's command line; its answer is JSON on standard output."""
        return subprocess.run(
            [program("flwr"), *arguments, "--format", "json"],
            env=dict(self.environment),
            capture_output=True,
            text=True,
            check=False,
        )

    @staticmethod
    def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        """Return what a command answered; empty where it said nothing to be read."""
        start = done.stdout.find("{")
        try:
            answer: dict[str, Any] = json.loads(done.stdout[start:]) if start >= 0 else {}
        except ValueError:
            return {}
        return answer

    @classmethod
    def reason(cls, done: subprocess.CompletedProcess[str]) -> str:
        """Return why a command failed, in its own words."""
        told = cls.answer(done).get("error-message") or done.stdout + done.stderr
        return " ".join(str(told).split())


def program(name: str) -> str:
    """Return the path of a program of the environment this process runs in."""
    return str(Path(sys.executable).with_name(name))


def environment(home: Path) -> dict[str, str]:
    """Return an environment for Flower's programs.

    Args:
        home: ``FLWR_HOME``.
    """
    # Flower's processes start each other by name.
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # Processes of Flower's may work in another directory than the one this path is relative to.
    key_file = os.environ.get(KEY_FILE)
    return {
        **os.environ,
        **({KEY_FILE: str(Path(key_file).absolute())} if key_file else {}),
        **ENVIRONMENT,
        "OMP_NUM_THREADS": "1",
        "FLWR_HOME": str(home),
        "PATH": programs,
    }


def run_deployed(directory: RunDirectory, on_round: Callable[[RoundRecord], None]) -> None:
    """Run on the SuperLink the configuration names, or on one started on loopback for the purpose.

    Where the configuration names one, the run's directory must lie where that SuperLink's machine
    sees it under the same path: the ServerApp runs there, and writes w and the checkpoints there.

    Args:
        directory: The run.
        on_round: Told of every finished round.

    Raises:
        FedveilError: The run could not be submitted, or failed.
    """
    config = directory.config
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedveil-")))
        start = _join if config.superlink else _start_here
        link = start(stack, home, directory)
        number = _still_running(link, directory) or _submit(link, home, directory)
        try:
            _follow(link, number, directory, on_round)
        except KeyboardInterrupt:
            link.flwr("stop", str(number), "here")
            raise


def _join(stack: ExitStack, home: Path, directory: RunDirectory) -> SuperLink:
    _write_connection(home, directory.config)
    return SuperLink(home, environment(home), check=lambda: None)


def _start_here(stack: ExitStack, home: Path, directory: RunDirectory) -> SuperLink:
    """Start a SuperLink and a SuperNode a client on loopback; traffic never leaves the machine."""
    config = directory.config
    address = f"127.0.0.1:{free_port()}"
    _write_connection(home, config.model_copy(update={"superlink": address}))
    start = _Starter(stack, environment(home), directory.path / "logs")
    start(
        "superlink",
        "flower-superlink --insecure --disable-runtime-dependency-installation "
        f"--port {address.rpartition(':')[2]}",
    )
    for client in range(config.clients):
        start(
            f"supernode-{client}",
            f"flower-supernode --insecure --superlink {address} --port {free_port()} "
            f"--node-config 'partition-id={client} num-partitions={config.clients}'",
        )
    return SuperLink(home, start.environment, lambda: _check_alive(start.processes, directory))


class _Starter:
    """Starts processes that end with the stack, their output in a folder of logs."""

    def __init__(self, stack: ExitStack, environment: Mapping[str, str], logs: Path) -> None:
        self.stack = stack
        self.environment = dict(environment)
        self.logs = logs
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(exist_ok=True)

    def __call__(self, name: str, command: str) -> None:
        binary, *arguments = shlex.split(command)
        log = self.stack.enter_context((self.logs / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            [program(binary), *arguments],
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes[name] = process
        self.stack.callback(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    # The whole session: Flower's processes start others.
    for signal_number in (15, 9):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(timeout=5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_connection(home: Path, config: TrainConfig) -> None:
    certificates = config.root_certificates
    security = (
        f"root-certificates = {json.dumps(certificates)}" if certificates else "insecure = true"
    )
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
        f"address = {json.dumps(config.superlink)}\n{security}\n"
    )


def write_app(folder: Path) -> None:
    """Write the Flower app of ``fedveil train``: which ServerApp and ClientApp, and no code.

    The code is the fedveil that is installed on the machine that runs it.
    """
    folder.mkdir()
    (folder / "fedveil_run.py").write_text(
        "from fedveil.federation.client_app import app as client_app\n"
        "from fedveil.federation.server_app import app as server_app\n\n"
        '__all__ = ["client_app", "server_app"]\n'
    )
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "fedveil-run"\nversion = "1.0.0"\ndescription = "A fedveil run"\n'
        'license = "Apache-2.0"\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "fedveil"\n\n'
        '[tool.flwr.app.components]\nserverapp = "fedveil_run:server_app"\n'
        'clientapp = "fedveil_run:client_app"\n\n[tool.flwr.app.config]\nout = ""\n'
    )


def _check_alive(processes: Mapping[str, subprocess.Popen[bytes]], directory: RunDirectory) -> None:
    for name, process in processes.items():
        if process.poll() is not None:
            raise FedveilError(
                f"{name} ended with status {process.returncode}; see "
                f"{directory.path / 'logs' / name}.log, then go on with fedveil train --resume "
                f"{directory.path}"
            )


def _submit(link: SuperLink, home: Path, directory: RunDirectory) -> int:
    app = directory.config.app
    if app is None:
        write_app(home / "app")
        app = str(home / "app")
    out = json.dumps(str(directory.path.resolve()))
    for attempt in range(60):
        link.check()
        done = link.flwr("run", app, "here", "--run-config", f"out={out}")
        answer = link.answer(done)
        if answer.get("success"):
            number = int(answer["run-id"])
            (directory.path / _RUN_FILE).write_text(json.dumps({"run-id": number}) + "\n")
            return number
        if not _unreachable(done) or attempt == 59 or directory.config.superlink:
            break
        time.sleep(1)
    raise FedveilError(
        f"the run could not be submitted to {directory.config.superlink or 'the SuperLink'}: "
        f"{link.reason(done)}"
    )


def _still_running(link: SuperLink, directory: RunDirectory) -> int | None:
    """Return the number of a run that an earlier ``fedveil train`` of this directory left behind.

    Without this, two ServerApps would write into one directory.
    """
    path = directory.path / _RUN_FILE
    if not (directory.config.superlink and path.is_file()):
        return None
    number = int(json.loads(path.read_text())["run-id"])
    status = _status(link, number)
    return number if status and not status[0].startswith("finished") else None


def _follow(
    link: SuperLink,
    number: int,
    directory: RunDirectory,
    on_round: Callable[[RoundRecord], None],
) -> None:
    told = len(directory.rounds())
    asked = heard = time.monotonic()
    while True:
        complete = directory.complete
        for record in directory.rounds()[told:]:
            on_round(record)
            told += 1
            # Who ends rounds runs; asking starts a program.
            asked = heard = time.monotonic()
        if complete:
            return
        link.check()
        if time.monotonic() - asked > _STATUS_EVERY:
            status = _status(link, number)
            asked = time.monotonic()
            heard = asked if status else heard
            if status:
                _check_status(status, number, directory)
            elif asked - heard > _PATIENCE:
                raise FedveilError(
                    f"the SuperLink {directory.config.superlink} has not answered for "
                    f"{asked - heard:.0f} seconds; start it again with the same --database, then "
                    f"fedveil train --resume {directory.path}"
                )
        time.sleep(0.2)


def _check_status(status: tuple[str, str], number: int, directory: RunDirectory) -> None:
    if status[0].startswith("finished") and not directory.complete:
        raise FedveilError(
            f"run {number} ended as {status[0]}: {status[1] or 'no reason given'}; mend it, then "
            f"fedveil train --resume {directory.path}"
        )


def _status(link: SuperLink, number: int) -> tuple[str, str] | None:
    """Return a run's status and why; ``None`` where the SuperLink does not know or cannot say."""
    runs = link.answer(link.flwr("list", "here", "--run-id", str(number))).get("runs") or []
    return (runs[0]["status"], runs[0]["status-details"]) if runs else None


def _unreachable(done: subprocess.CompletedProcess[str]) -> bool:
    text = (done.stdout + done.stderr).lower()
    return "unavailable" in text or "connect" in text
