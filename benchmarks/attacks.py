"""Images a minute that inverting gradients searches together and one by one, in the same code.

A fixed number of steps on LeNet, cnn and resnet-gn with CIFAR-10 shapes; nothing depends on what
the images are, so they are random. Both arms take turns, several times over, and the medians of CPU
time are compared: on a busy machine wall-clock time says nothing.

    python benchmarks/attacks.py --out docs/results

With --suite the attacks that search nothing are timed instead, each beside plain work on the same
numbers in the same run: forward and backward passes of the same images by PyTorch alone, one by one
and in batches, and numpy's singular value decomposition of the same gradient.

    python benchmarks/attacks.py --suite --out docs/results
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from timed import cpu_seconds
from torch import nn
from torch.nn import functional as F
from written import write_result

from fedveil.attacks.inversion import (
    Attack,
    FullyConnected,
    IndependentComponents,
    InvertingGradients,
    LocalSteps,
    Observation,
    Peeling,
)
from fedveil.attacks.membership import ATTACKS as MEMBERSHIP
from fedveil.data import Images, load_dataset
from fedveil.memory import keep_freed_memory
from fedveil.models import build_model

SHAPE = (3, 32, 32)
CLASSES = 10


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


def backward(model: nn.Module, images: Images, batch: int) -> Callable[[], None]:
    """Return plain forward and backward passes of images, so many at once."""

    def work() -> None:
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            loss = F.cross_entropy(model(part.pixels), part.labels)
            torch.autograd.grad(loss, list(model.parameters()))

    return work


def update(model: nn.Module, images: Images, local: LocalSteps | None = None) -> Observation:
    """Return what a server has of one client's gradient of these images."""
    named = dict(model.named_parameters())
    loss = F.cross_entropy(model(images.pixels), images.labels)
    found = torch.autograd.grad(loss, list(named.values()))
    gradients = {name: one[None] for name, one in zip(named, found, strict=True)}
    return Observation(model, gradients, SHAPE, CLASSES, len(images), local=local)


def suite(repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row an attack: its processor time beside that of plain work on the same numbers."""
    data = load_dataset("photos")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    images = data.train[order]
    candidates, public, used = images[:512], images[512:1024], images[:64]
    cnn = build_model("cnn", SHAPE, CLASSES, seed=0)
    local = LocalSteps(epochs=2, batch_size=16, learning_rate=0.01)
    plain = {
        "forward and backward one by one": backward(cnn, candidates, 1),
        "forward and backward by 64": backward(cnn, candidates, 64),
    }
    beside = {what: cpu_seconds(work, repeats) for what, work in plain.items()}
    for name, attack in MEMBERSHIP.items():
        seen = update(cnn, used, local if name in ("loss", "gradient-norm") else None)
        own = partial(attack, seen, candidates, public)
        yield timed(name, "512 candidates, cnn", cpu_seconds(own, repeats), beside)
    for batch, hidden in ((16, 512), (64, 1024)):
        torch.manual_seed(0)
        wide = torch.Size(SHAPE).numel()
        mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(wide, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
        )
        seen = update(mlp, images[:batch])
        matrix = seen.gradients["1.weight"][0].double().numpy()
        decompose = partial(np.linalg.svd, matrix, full_matrices=False)
        beside = {
            "forward and backward": cpu_seconds(backward(mlp, images[:batch], batch), repeats),
            "numpy's SVD": cpu_seconds(decompose, repeats),
        }
        attacks: dict[str, Attack] = {"ica": IndependentComponents()}
        if batch == 16:
            attacks = {"fc": FullyConnected(), "peel": Peeling(seconds=20.0), **attacks}
        for name, one in attacks.items():
            setting = f"a batch of {batch}, {hidden} units"
            yield timed(name, setting, cpu_seconds(partial(one, seen), repeats), beside)


def timed(name: str, setting: str, spent: float, beside: dict[str, float]) -> dict[str, Any]:
    """Return a row: seconds, and how many times what stands beside it that is."""
    ratios = {what: spent / seconds for what, seconds in beside.items()}
    return {"attack": name, "setting": setting, "cpu_seconds": spent, "times": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--victims", type=int, default=64)
    parser.add_argument("--alone", type=int, default=4, help="victims of the slow arm")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--suite", action="store_true", help="attacks that search nothing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    keep_freed_memory()
    rows = []
    for row in suite(args.repeats) if args.suite else ():
        rows.append(row)
        print(row, flush=True)
    for name in () if args.suite else ("lenet", "cnn", "resnet-gn"):
        rows.append(measure(name, args.victims, args.alone, args.steps, args.repeats))
        print(rows[-1], flush=True)
    if args.out:
        path = args.out / ("attacks-suite.json" if args.suite else "attacks.json")
        write_result(path, args, threads=threads, load=os.getloadavg()[0], rows=rows)


if __name__ == "__main__":
    main()
