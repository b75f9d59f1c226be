r"""What secure aggregation adds to a round of sums, by features, clients and drop-outs.

    python benchmarks/analytic_secure.py --out docs/results

MNIST on two workers; the map is a fixed random projection with a rectifier, so that what is left
are sums and their protection. Processor time is of all processes together; masks are agreed upon
with fifteen others at most. Where some are away, every tenth client answers all but the sums. The
sum of those that answered is the same to the bit with and without protection, or the benchmark
ends. Rows of the result that is to be written are kept.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
)

import torch
from flwr.app import Context, Message
from torch import Tensor, nn
from written import write_result

from fedveil.analytic import Layout
from fedveil.federation.client_app import app as honest
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.secagg.client import WORDS
from fedveil.federation.server_app import prepare_job, run_rounds
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from fedveil.types import Shape

SIZES = ((1280, 10), (1280, 100), (4096, 10), (4096, 100))


def tenth_away(message: Message, context: Context) -> Message:
    """Answer as a client does, but for every tenth where sums are asked for."""
    partition = int(context.node_config["partition-id"])
    if partition % 10 == 0 and "statistics" in str(message.metadata.message_type):
        raise RuntimeError("away")
    return honest(message, context)


class Projection(nn.Module):
    """A rectified random projection of the pixels."""

    def __init__(self, shape: Shape, dimension: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = shape[0] * shape[1] * shape[2]
        self.register_buffer("weight", torch.randn(size, dimension, generator=generator))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float [N, D]."""
        return torch.relu(pixels.flatten(1) @ self.weight)


def of_1280(shape: Shape) -> Projection:
    """Return the map of 1,280 features."""
    return Projection(shape, 1280)


def of_4096(shape: Shape) -> Projection:
    """Return the map of 4,096 features."""
    return Projection(shape, 4096)


def clock() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def run(dimension: int, clients: int, *, secure: bool, away: bool) -> tuple[dict[str, Any], Tensor]:
    """Return what a round took, and the words that it came to."""
    settings: dict[str, Any] = {
        "dataset": "mnist",
        "clients": clients,
        "strategy": "analytic",
        "backbone": f"analytic_secure:of_{dimension}",
        "mirrored": False,
        "secure_aggregation": secure,
        "key_shares": 15 if secure and clients > 15 else None,
    }
    app = "analytic_secure:tenth_away" if away else "fedveil.federation.client_app:app"
    given = {name: value for name, value in settings.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.create(Path(folder) / "run", TrainConfig.check(given))
        cpu, wall = clock(), time.perf_counter()
        job = prepare_job(directory.config)
        with LocalGrid(app, nodes=clients, workers=2) as grid:
            run_rounds(grid, job, directory, on_round=lambda _: None)
        told = {
            "cpu_seconds": clock() - cpu,
            "wall_seconds": time.perf_counter() - wall,
            "server_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        checkpoint = directory.checkpoint()
        assert checkpoint is not None
        return told, checkpoint.state.memory[WORDS]


def measured(dimension: int, clients: int, away: int) -> dict[str, Any]:
    """Return a row: the same round with and without secure aggregation."""
    plain, words = run(dimension, clients, secure=False, away=away > 0)
    secure, same = run(dimension, clients, secure=True, away=away > 0)
    if not torch.equal(words, same):
        raise SystemExit(f"D = {dimension}, {clients} clients: the sums differ")
    return {
        "features": dimension,
        "clients": clients,
        "away": away,
        "answer_mb": 8 * Layout(dimension, 10).length / 1e6,
        "plain": plain,
        "secure": secure,
        "times": secure["cpu_seconds"] / plain["cpu_seconds"],
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = arguments.out / "analytic-secure.json"
    kept = json.loads(result.read_text())["rows"] if result.exists() else []
    there = {(row["features"], row["clients"], row["away"]): row for row in kept}
    run(1280, 10, secure=True, away=False)  # what is loaded once is no part of a round
    rows = []
    for dimension, clients in SIZES:
        for away in (0, clients // 10):
            row = there.get((dimension, clients, away)) or measured(dimension, clients, away)
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_result(result, arguments, rows=rows)


if __name__ == "__main__":
    main()
