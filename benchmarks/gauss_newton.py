"""How far Levenberg–Marquardt on the gradient residual recovers exactly, and where it stops.

Fresh networks of growing depth, stride and kind, in float64, on CIFAR-10 training images averaged
down to ``--side`` pixels (a Jacobian has a column for each pixel of a batch). The attack runs with
its own steps and stopping from one start (``--restarts``); no attack sees an image. A few images
only: this maps where the method holds, and is no rate. ``--attack ig`` runs inverting gradients, a
first-order search with a weak image prior, on the same observations instead.

    FEDVEIL_DATA=... python benchmarks/gauss_newton.py --out docs/results
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from written import write_result

from fedveil.attacks.inversion import (
    Attack,
    InvertingGradients,
    LevenbergMarquardt,
    Observation,
)
from fedveil.audit.metrics import exact, label_accuracy, match, psnr
from fedveil.data import load_dataset
from fedveil.errors import FedveilError
from fedveil.files import write_atomically
from fedveil.models import CNN, LeNet, ViT, group_norm_resnet
from fedveil.models.normalise import Normalise

Shape = tuple[int, int, int]


def convolutions(
    shape: Shape, activation: Callable[[], nn.Module], depth: int, stride: int, width: int = 16
) -> nn.Module:
    layers: list[nn.Module] = [Normalise()]
    channels = shape[0]
    for number in range(depth):
        step = stride if number < 2 else 1
        layers += [nn.Conv2d(channels, width, 3, step, padding=1), activation()]
        channels = width
    features = nn.Sequential(*layers, nn.Flatten())
    size = features(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(features, nn.Linear(size, 10))


NETWORKS: dict[str, Callable[[Shape], nn.Module]] = {
    "lenet (sigmoid, two strides of 2)": lambda s: LeNet(s, 10),
    "2 convolutions, tanh": lambda s: convolutions(s, nn.Tanh, 2, 1),
    "2 convolutions, ReLU": lambda s: convolutions(s, nn.ReLU, 2, 1),
    "4 convolutions, ReLU": lambda s: convolutions(s, nn.ReLU, 4, 1),
    "6 convolutions, ReLU": lambda s: convolutions(s, nn.ReLU, 6, 1),
    "2 convolutions, stride 2, ReLU": lambda s: convolutions(s, nn.ReLU, 2, 2),
    "4 convolutions, stride 2, ReLU": lambda s: convolutions(s, nn.ReLU, 4, 2),
    "cnn (ReLU, max pooling)": lambda s: CNN(s, 10),
    "resnet-gn": lambda s: group_norm_resnet(s, 10),
    "vit": lambda s: ViT(s, 10),
}


def observed(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> Observation:
    updates = [
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    ]
    names = [name for name, _ in model.named_parameters()]
    gradients = {k: torch.stack([u[i] for u in updates]) for i, k in enumerate(names)}
    return Observation(model, gradients, tuple(images.shape[1:]), 10, batch)  # type: ignore[arg-type]


def measure(
    name: str, images: Tensor, labels: Tensor, batch: int, attack: Attack, seed: int
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = NETWORKS[name]((images.shape[1], images.shape[2], images.shape[3])).double()
    seen = observed(model, images.double(), labels, batch)
    row: dict[str, Any] = {"network": name, "batch": batch, "side": images.shape[-1]}
    row |= {"images": len(images), "weights": sum(p.numel() for p in model.parameters())}
    row["unknowns"] = batch * images[0].numel()
    begin = time.perf_counter()
    try:
        result = attack(seen)
    except FedveilError as error:
        return {**row, "refused": str(error)}
    pairs = zip(result.images, images.double().split(batch), strict=True)
    found = torch.cat([match(part, own) for part, own in pairs])
    decibel = psnr(found.clamp(0, 1), images)
    return {
        **row,
        "exact": float(exact(found.clamp(0, 1), images).double().mean()),
        "psnr": float(decibel.median()),
        "psnr_all": [round(value, 1) for value in decibel.tolist()],
        "labels": float(label_accuracy(result.labels, labels.reshape(-1, batch)).mean()),
        "loss": float(result.loss.median()),
        "steps": float(result.iterations.double().mean()),
        "seconds": time.perf_counter() - begin,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | side | batch | images | unknowns / weights | exact | dB (median) | "
        "loss (median) | labels | steps | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['network']} | {row['side']} | {row['batch']} | {row['images']} "
        f"| {row['unknowns']} / {row['weights']} | {row['exact']:.0%} | {row['psnr']:.1f} "
        f"| {row['loss']:.0e} | {row['labels']:.0%} | {row['steps']:.0f} | {row['seconds']:.0f} |"
        for row in rows
        if "refused" not in row
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, action="append", default=None)
    parser.add_argument("--batch", type=int, action="append", default=None)
    parser.add_argument("--images", type=int, default=8, help="for each network and batch")
    parser.add_argument("--attack", choices=("lm", "ig"), default="lm")
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0, help="start no row after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("cifar10")
    chosen = torch.randperm(
        len(data.train), generator=torch.Generator().manual_seed(args.seed)
    )[: args.images]  # fmt: skip
    attack: Attack = LevenbergMarquardt(
        dtype=torch.float64, closed_form=False, restarts=args.restarts
    )
    stem = "gauss-newton"
    if args.attack == "ig":
        attack = InvertingGradients(
            steps=400, tv=0.02, dtype=torch.float64, solved=1e-12, restarts=args.restarts
        )
        stem = "gauss-newton-ig"
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for side in args.side or [8]:
        pixels = F.adaptive_avg_pool2d(data.train[chosen].pixels, side)
        for batch in args.batch or [1, 2, 4, 8]:
            for name in NETWORKS:
                if time.monotonic() - begin > 60 * args.minutes:
                    left_out.append(f"{name}, side {side}, batch {batch}")
                    continue
                labels = data.train[chosen].labels
                rows.append(measure(name, pixels, labels, batch, attack, args.seed))
                print(rows[-1], flush=True)
    path = args.out / f"{stem}.json"
    write_result(path, args, seed=args.seed, left_out=left_out, rows=rows)
    text = table(rows)
    write_atomically(args.out / f"{stem}.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
