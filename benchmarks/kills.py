"""Random kills of every part of a run: does each resume end in the same bits?

    python benchmarks/kills.py --kills 20 --out docs/results

Small runs on digits. The training process and a worker are killed on the local engine, whose end is
compared with that of a run left alone, bit by bit; a SuperNode and the SuperLink of a deployment on
loopback, whose runs must finish. Moments are drawn from the seed over the whole of a run. Started
again after an interruption, it goes on with the kills that are missing.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from written import write_result

from fedveil.deployment.control import register, status
from fedveil.deployment.layout import Deployment, create

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.deployment.conftest import NODES, Federation, free_block, train_command, write_sites

APP = "--app=@fedveil/fedveil-run==1.0.0"  # nodes run what is signed, and nothing else
FEDVEIL = str(Path(sys.executable).with_name("fedveil"))
RUN = ["train", "--dataset", "digits", "--clients", "4", "--fraction", "1", "--rounds", "6"]
RUN += ["--strategy", "noise-delta", "--learning-rate", "0.1", "--clip", "5", "--workers", "2"]
RUN += ["--calibration-images", "100", "--report-images", "100"]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each part")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    path = arguments.out / "kills.json"
    found: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() else {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.part:
        with tempfile.TemporaryDirectory() as folder:
            done = found.setdefault(part, [])
            kill = PARTS[part](Path(folder))
            try:
                while len(done) < arguments.kills:
                    generator = random.Random(f"{part} {arguments.seed} {len(done)}")
                    done.append(kill(len(done), generator.random()))
                    print(part, len(done), done[-1], flush=True)
                    write(path, arguments, found)
            finally:
                if isinstance(kill, Deployed):
                    kill.end()


def write(path: Path, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write what is known so far."""
    write_result(
        path,
        arguments,
        seed=arguments.seed,
        summary={
            part: {"kills": len(rows), "as it should be": sum(row["right"] for row in rows)}
            for part, rows in found.items()
        },
        parts=found,
    )


class Local:
    """Runs on the local engine, one of them left alone."""

    def __init__(self, folder: Path, victim: Callable[[subprocess.Popen[bytes]], int]) -> None:
        self.folder, self.victim = folder, victim
        self.key = folder / "whole/noise.key"
        started = time.monotonic()
        self.start("whole").wait()
        self.seconds = time.monotonic() - started
        self.whole = load_file(folder / "whole/model.safetensors")

    def start(self, name: str, *, resume: bool = False) -> subprocess.Popen[bytes]:
        """Start or go on with a run."""
        place = self.folder / name
        key = ["--noise-key", str(self.key)] if self.key.exists() else []
        options = ["train", "--resume", str(place)] if resume else [*RUN, "--out", str(place), *key]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            [FEDVEIL, *options], stdout=quiet, stderr=quiet, start_new_session=True
        )

    def __call__(self, number: int, moment: float) -> dict[str, Any]:
        """Kill once; return when, and whether the run ended as it would have."""
        name = f"run-{number}"
        process = self.start(name)
        time.sleep(moment * self.seconds)
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.victim(process), signal.SIGKILL)
        process.wait()
        rounds = self.folder / name / "rounds.jsonl"
        reached = len(rounds.read_text().splitlines()) if rounds.exists() else 0
        resumed = 0
        while not (self.folder / name / "summary.json").exists() and resumed < 2:
            resumed += 1
            begun = (self.folder / name / "noise.key").exists()
            if not begun:
                subprocess.run(["rm", "-rf", str(self.folder / name)], check=True)
            self.start(name, resume=begun).wait()
        model = self.folder / name / "model.safetensors"
        same = model.exists() and all(
            torch.equal(value, self.whole[key]) for key, value in load_file(model).items()
        )
        row = {"after_rounds": reached, "resumed": resumed, "right": bool(same)}
        return {"seconds": round(moment * self.seconds, 2), **row}


def server(process: subprocess.Popen[bytes]) -> int:
    """Return the training process itself."""
    return process.pid


def worker(process: subprocess.Popen[bytes]) -> int:
    """Return one of the process's children, or itself before it has any."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[-1]) if children else process.pid


class Deployed:
    """A deployment on loopback, of which one part is killed and started again."""

    def __init__(self, folder: Path, part: str) -> None:
        self.part, home = part, folder / "deployment"
        create(home, Deployment("127.0.0.1", free_block(), NODES))
        self.federation = Federation(home)
        write_sites(folder / "sites")
        for name in ("shelf", "superlink", "gate"):
            self.federation.start_part(name)
        self.federation.until(lambda: all(status(home).parts.values()))
        register(home)
        for number in range(NODES):
            self.federation.start_node(number)
        self.federation.until(self.whole)
        self.folder = folder
        started = time.monotonic()
        if self.train(folder / "whole").wait(timeout=600):
            raise RuntimeError(f"the run that is left alone failed: {self.federation.log('whole')}")
        self.seconds = time.monotonic() - started

    def __call__(self, number: int, moment: float) -> dict[str, Any]:
        """Kill once; return when, and whether the run finished."""
        out = self.folder / f"run-{number}"
        process = self.train(out)
        time.sleep(moment * self.seconds)
        self.federation.kill(self.part)
        if self.part == "superlink":
            self.federation.start_part("superlink")
            home = self.federation.home
            self.federation.until(lambda: all(status(home).parts.values()))
        else:
            self.federation.start_node(0)
        process.wait(timeout=600)
        resumed = 0
        while not (out / "summary.json").exists() and resumed < 3:
            resumed += 1
            begun = any(out.glob("noise.key*"))
            self.federation.until(self.whole)
            self.train(out, resume=begun).wait(timeout=600)
        right = (out / "summary.json").exists()
        return {"seconds": round(moment * self.seconds, 2), "resumed": resumed, "right": right}

    def whole(self) -> bool:
        """Whether every node is there."""
        return all(node.status == "online" for node in status(self.federation.home).nodes)

    def train(self, out: Path, *, resume: bool = False) -> subprocess.Popen[bytes]:
        """Start or go on with a run on the deployment."""
        command = train_command(self.federation, out, "--rounds=2", "--timeout=60", APP)
        if resume:
            command = [*command[:4], "--resume", str(out)]
        with (self.federation.logs / f"{out.name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def end(self) -> None:
        """Stop everything."""
        for name in list(self.federation.processes):
            self.federation.kill(name)


PARTS: dict[str, Callable[[Path], Callable[[int, float], dict[str, Any]]]] = {
    "server": lambda folder: Local(folder, server),
    "worker": lambda folder: Local(folder, worker),
    "supernode": lambda folder: Deployed(folder, "node-0"),
    "superlink": lambda folder: Deployed(folder, "superlink"),
}

if __name__ == "__main__":
    main()
