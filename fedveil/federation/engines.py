"""The three engines on which the same ServerApp and ClientApp run."""

import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedveil.errors import FedveilError
from fedveil.federation.client_app import app as client_app
from fedveil.federation.local import LocalGrid
from fedveil.federation.run_directory import RunDirectory
from fedveil.federation.server_app import OnRound, prepare_job, run_rounds
from fedveil.federation.worker import usable_cores

_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own executor would otherwise copy the working directory's environment.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "OMP_NUM_THREADS": "1",
}
_CLIENT_APP = "fedveil.federation.client_app:app"


@dataclass(frozen=True)
class Machine:
    """How much of this machine an engine may use.

    Attributes:
        workers: Worker processes that run clients, one thread each.
    """

    workers: int

    @classmethod
    def of(cls, workers: int | None) -> "Machine":
        """Return ``workers``, or one worker a core."""
        return cls(workers or usable_cores())


def train(directory: RunDirectory, *, on_round: OnRound) -> None:
    """Run the training that a run directory describes, from its last checkpoint on.

    Args:
        directory: The run; its configuration names the engine.
        on_round: Told of every finished round.

    Raises:
        FedveilError: Anything the user can mend.
    """
    os.environ.update(_ENVIRONMENT)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = directory.config
    _ENGINES[config.engine](directory, Machine.of(config.workers), on_round)


def train_local(directory: RunDirectory, machine: Machine, on_round: OnRound) -> None:
    """Run clients in this machine's worker processes, without Ray."""
    job = prepare_job(directory.config)
    workers = machine.workers
    # The server works while the workers wait, so it may use their cores.
    with (
        LocalGrid(_CLIENT_APP, nodes=job.config.clients, workers=workers) as grid,
        _torch_threads(workers),
    ):
        run_rounds(grid, job, directory, on_round=on_round)


def train_ray(directory: RunDirectory, machine: Machine, on_round: OnRound) -> None:
    """Run clients in Flower's own simulation on Ray."""
    from flwr.simulation import run_simulation

    job = prepare_job(directory.config)
    failures: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            with _torch_threads(machine.workers):
                run_rounds(grid, job, directory, on_round=on_round)
        except BaseException as error:
            # Flower would log it and go on; the caller is to see it.
            failures.append(error)

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=job.config.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": machine.workers, "logging_level": logging.ERROR},
        },
    )
    if failures:
        raise failures[0]


def train_deployed(directory: RunDirectory, machine: Machine, on_round: OnRound) -> None:
    """Start a SuperLink and one SuperNode a client on loopback, and submit the run to them.

    For trying the deployed form on one machine: traffic is not encrypted and never leaves it.
    """
    config = directory.config
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedveil-")))
        superlink = f"127.0.0.1:{_free_port()}"
        # Flower's processes start each other by name.
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {
            **os.environ,
            **_ENVIRONMENT,
            "FLWR_HOME": str(home / "flwr"),
            "PATH": programs,
        }
        start = _Starter(stack, environment, directory.path / "logs")
        start(
            "superlink",
            "flower-superlink --insecure --disable-runtime-dependency-installation "
            f"--port {superlink.rpartition(':')[2]}",
        )
        for client in range(config.clients):
            start(
                f"supernode-{client}",
                f"flower-supernode --insecure --superlink {superlink} --port {_free_port()} "
                f"--node-config 'partition-id={client} num-partitions={config.clients}'",
            )
        _write_app(home, directory, superlink)
        _submit(home, environment, lambda: _check_alive(start.processes, directory))
        _follow(directory, lambda: _check_alive(start.processes, directory), on_round)


_ENGINES: Mapping[str, Callable[[RunDirectory, Machine, OnRound], None]] = {
    "local": train_local,
    "ray": train_ray,
    "deployed": train_deployed,
}


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Starter:
    """Starts processes that end with the stack, their output in a folder of logs."""

    def __init__(self, stack: ExitStack, environment: Mapping[str, str], logs: Path) -> None:
        self.stack = stack
        self.environment = dict(environment)
        self.logs = logs
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(exist_ok=True)

    def __call__(self, name: str, command: str) -> None:
        program, *arguments = shlex.split(command)
        log = self.stack.enter_context((self.logs / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(program)), *arguments],
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_app(home: Path, directory: RunDirectory, superlink: str) -> None:
    (home / "flwr").mkdir()
    (home / "flwr" / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
        f'address = "{superlink}"\ninsecure = true\n'
    )
    app = home / "app"
    app.mkdir()
    (app / "fedveil_run.py").write_text(
        "from fedveil.federation.client_app import app as client_app\n"
        "from fedveil.federation.server_app import app as server_app\n"
        '__all__ = ["client_app", "server_app"]\n'
    )
    (app / "pyproject.toml").write_text(
        '[project]\nname = "fedveil-run"\nversion = "1.0.0"\ndescription = "A fedveil run"\n'
        'license = "Apache-2.0"\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "fedveil"\n\n'
        '[tool.flwr.app.components]\nserverapp = "fedveil_run:server_app"\n'
        'clientapp = "fedveil_run:client_app"\n\n'
        f"[tool.flwr.app.config]\nout = {json.dumps(str(directory.path.resolve()))}\n"
    )


def _check_alive(processes: Mapping[str, subprocess.Popen[bytes]], directory: RunDirectory) -> None:
    for name, process in processes.items():
        if process.poll() is not None:
            raise FedveilError(
                f"{name} ended with status {process.returncode}; see "
                f"{directory.path / 'logs' / name}.log, then go on with fedveil train --resume "
                f"{directory.path}"
            )


def _submit(home: Path, environment: Mapping[str, str], check: Callable[[], None]) -> None:
    command = [str(Path(sys.executable).with_name("flwr")), "run", str(home / "app")]
    for attempt in range(60):
        check()
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return
        if "unavailable" not in done.stdout + done.stderr or attempt == 59:
            break
        time.sleep(1)
    raise FedveilError(f"the run could not be submitted: {(done.stdout + done.stderr).strip()}")


def _follow(directory: RunDirectory, check: Callable[[], None], on_round: OnRound) -> None:
    told = len(directory.rounds())
    while not directory.complete:
        for record in directory.rounds()[told:]:
            on_round(record)
            told += 1
        check()
        time.sleep(0.2)
    for record in directory.rounds()[told:]:
        on_round(record)
