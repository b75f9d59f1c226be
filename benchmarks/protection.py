"""What a protected round costs beside a round of plain federated averaging.

Runs of ``fedveil train`` on MNIST take turns, there and back (A B C, C B A, ...), with the same
local training, that of the theft study. The first rounds are left out: in them no noise is needed
yet. Time is that of a round without the report's own evaluations: clients, messages, noise,
calibration, distillation, the archive. Quote the ratios.

    FEDVEIL_DATA=... python benchmarks/protection.py --turns 4 --rounds 12 --out docs/results
"""

import argparse
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_COMMON = {"dataset": "mnist", "model": "cnn", "clients": 100, "fraction": 0.1, "workers": 2}
_SHORT = {"epochs": 1, "learning_rate": 0.2, "clip": 20.0}
_LONG = {
    "epochs": 30,
    "batch_size": 20,
    "learning_rate": 0.1,
    "decay": True,
    "momentum": 0.9,
    "clip": 1.0,
    "augment": "crop:2,rotate:15,zoom:0.15,shear:0.15",
}
# Each with the baseline it is measured against: the one that trains its clients alike.
_ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {**_SHORT, "strategy": "fedavg", "archive": False}),
    "noise-delta": ("fedavg", {**_SHORT, "strategy": "noise-delta"}),
    "noise-delta, one copy a sign": (
        "fedavg",
        {**_SHORT, "strategy": "noise-delta", "fingerprint": 0.0, "archive": False},
    ),
    "fedavg, trained alike": (
        "fedavg, trained alike",
        {**_LONG, "strategy": "fedavg", "archive": False},
    ),
    "protected": (
        "fedavg, trained alike",
        {**_LONG, "strategy": "protected", "distillation_steps": 120},
    ),
}


def round_seconds(settings: dict[str, Any], rounds: int, skipped: int) -> list[float]:
    """Train once; return the seconds of each round after the first ``skipped``."""
    from fedveil.federation.training_run import run_to_completion
    from fedveil.runs.config import TrainConfig
    from fedveil.runs.directory import RunDirectory

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.check({**_COMMON, **settings, "rounds": rounds})
        directory = RunDirectory.create(Path(folder) / "run", config)
        run_to_completion(directory)
        return [record.seconds for record in directory.rounds()[skipped:]]


def measure(arms: list[str], turns: int, rounds: int, skipped: int) -> dict[str, list[float]]:
    """Return the median seconds of a round in each turn of each arm."""
    medians: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(turns):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            seconds = round_seconds(_ARMS[arm][1], rounds, skipped)
            medians[arm].append(statistics.median(seconds))
            print(f"turn {turn + 1}: {arm}: {medians[arm][-1]:.3f} s a round", flush=True)
    return medians


def main() -> None:
    """Run the comparison and print, and with --out keep, its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12, help="of each run")
    parser.add_argument("--skipped", type=int, default=4, help="rounds at a run's start")
    parser.add_argument("--arm", action="append", choices=list(_ARMS), help="default: all")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arms = arguments.arm or list(_ARMS)
    medians = measure(arms, arguments.turns, arguments.rounds, arguments.skipped)
    rows = [
        {
            "arm": arm,
            "seconds": statistics.median(medians[arm]),
            "baseline": _ARMS[arm][0],
            "ratio": statistics.median(
                own / base for own, base in zip(medians[arm], medians[_ARMS[arm][0]], strict=True)
            ),
            "turns": medians[arm],
        }
        for arm in arms
        if _ARMS[arm][0] in medians
    ]
    for row in rows:
        print(f"{row['arm']}: {row['seconds']:.3f} s, {row['ratio']:.2f} x {row['baseline']}")
    if arguments.out:
        from written import write_result

        write_result(
            arguments.out / "protection.json",
            arguments,
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
            rows=rows,
        )


if __name__ == "__main__":
    main()
