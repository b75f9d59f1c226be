"""The three engines on which the same ServerApp and ClientApp run."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedveil.federation.client_app import app as client_app
from fedveil.federation.engines.deployed import ENVIRONMENT, run_deployed
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.engines.worker import usable_cores
from fedveil.federation.server_app import OnRound, load_job, run_rounds
from fedveil.federation.threads import torch_threads
from fedveil.runs.directory import RunDirectory

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
    os.environ.update(ENVIRONMENT)
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = directory.config
    _ENGINES[config.engine](directory, Machine.of(config.workers), on_round)


def train_local(directory: RunDirectory, machine: Machine, on_round: OnRound) -> None:
    """Run clients in this machine's worker processes, without Ray."""
    job = load_job(directory.config)
    workers = machine.workers
    # The server works while the workers wait, so it may use their cores.
    with (
        LocalGrid(_CLIENT_APP, nodes=job.config.clients, workers=workers) as grid,
        torch_threads(workers),
    ):
        run_rounds(grid, job, directory, on_round=on_round)


def train_ray(directory: RunDirectory, machine: Machine, on_round: OnRound) -> None:
    """Run clients in Flower's own simulation on Ray."""
    from flwr.simulation import run_simulation

    job = load_job(directory.config)
    failures: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            with torch_threads(machine.workers):
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
            "init_args": {
                "num_cpus": machine.workers,
                "logging_level": logging.ERROR,
                "include_dashboard": False,
            },
        },
    )
    if failures:
        raise failures[0]


def train_deployed(directory: RunDirectory, machine: Machine, on_round: OnRound) -> None:
    """Run on a SuperLink: the one the configuration names, or one on loopback of this machine."""
    run_deployed(directory, on_round)


_ENGINES: Mapping[str, Callable[[RunDirectory, Machine, OnRound], None]] = {
    "local": train_local,
    "ray": train_ray,
    "deployed": train_deployed,
}
