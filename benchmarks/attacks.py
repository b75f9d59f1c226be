"""Images a minute that inverting gradients searches together and one by one, in the same code.

A fixed number of steps on LeNet, cnn and resnet-gn with CIFAR-10 shapes; nothing depends on what
the images are, so they are random. Both arms take turns, several times over, and the medians of CPU
time are compared: on a busy machine wall-clock time says nothing.

    python benchmarks/attacks.py --out docs/results
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from torch.nn import functional as F

from fedveil.attacks.inversion import InvertingGradients, Observation
from fedveil.files import write_atomically
from fedveil.memory import keep_freed_memory
from fedveil.models import build_model

SHAPE = (3, 32, 32)


def observation(name: str, victims: int) -> Observation:
    model = build_model(name, SHAPE, 10, seed=0)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(victims, *SHAPE, generator=generator)
    labels = torch.randint(10, (victims,), generator=generator)
    updates = [
        torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        for x, y in zip(images, labels, strict=True)
    ]
    names = [key for key, _ in model.named_parameters()]
    gradients = {k: torch.stack([u[i] for u in updates]) for i, k in enumerate(names)}
    return Observation(model, gradients, SHAPE, 10)


def seconds(seen: Observation, together: int, steps: int) -> tuple[float, float]:
    attack = InvertingGradients(steps=steps, together=together, solved=0.0)
    wall, cpu = time.perf_counter(), time.process_time()
    spent = float(attack(seen).iterations.double().mean())
    return (time.process_time() - cpu) / spent, (time.perf_counter() - wall) / spent


def measure(name: str, victims: int, alone: int, steps: int, repeats: int) -> dict[str, Any]:
    many, few = observation(name, victims), observation(name, alone)
    together, apart = [], []
    for _ in range(repeats):
        together.append(tuple(value / victims for value in seconds(many, victims, steps)))
        apart.append(tuple(value / alone for value in seconds(few, 1, steps)))
    row: dict[str, Any] = {"model": name, "victims": victims, "one_by_one_victims": alone}
    for place, clock in enumerate(("cpu", "wall")):
        batch = statistics.median(run[place] for run in together)
        single = statistics.median(run[place] for run in apart)
        row[f"{clock}_ms_per_image_and_step"] = 1e3 * batch
        row[f"{clock}_ms_one_by_one"] = 1e3 * single
        row[f"{clock}_times"] = single / batch
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--victims", type=int, default=64)
    parser.add_argument("--alone", type=int, default=4, help="victims of the slow arm")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    keep_freed_memory()
    rows = []
    for name in ("lenet", "cnn", "resnet-gn"):
        rows.append(measure(name, args.victims, args.alone, args.steps, args.repeats))
        print(rows[-1], flush=True)
    report = {
        "command": " ".join(["python", "benchmarks/attacks.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": threads,
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        content = (json.dumps(report, indent=1) + "\n").encode()
        write_atomically(args.out / "attacks.json", content)


if __name__ == "__main__":
    main()
