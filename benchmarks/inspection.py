"""How often a client's inspection of the model is wrong, and what an imprint that evades it reads.

Ordinary models are trained for some hundred steps and inspected on the way, from their first
weights on. Imprint blocks have their rows disturbed by Gaussian noise until they are no longer
parallel: the share of images that the attack still recovers exactly stands beside the verdict.
Images are CIFAR-10's and MNIST's training images.

    FEDVEIL_DATA=... python benchmarks/inspection.py --out docs/results
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from written import write_result

from fedveil.attacks.inversion import FullyConnected, Observation
from fedveil.audit.metrics import exact, identified, match
from fedveil.data import Dataset, load_dataset
from fedveil.defenses.model_inspection import ModelInspection
from fedveil.files import write_atomically
from fedveil.models import CNN, Imprint, build_model

ORDINARY = (
    ("mnist", "lenet"),
    ("mnist", "cnn"),
    ("mnist", "mnist-cnn"),
    ("mnist", "mlp"),
    ("cifar10", "lenet"),
    ("cifar10", "cnn"),
    ("cifar10", "mlp"),
    ("cifar10", "resnet-gn"),
    ("cifar10", "resnet-bn"),
    ("cifar10", "vit"),
)
COSINES = (0.3, 0.5, 0.7, 0.9)
DISTURBANCES = (0.0, 0.1, 0.3, 0.6, 0.9, 1.2, 2.0, 4.0)
LOOKS = 5


def model_of(name: str, data: Dataset, seed: int) -> nn.Module:
    if name != "mlp":
        return build_model(name, data.shape, len(data.classes), seed=seed)
    torch.manual_seed(seed)
    pixels = data.shape[0] * data.shape[1] * data.shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 512), nn.ReLU(), nn.Linear(512, 10))


def largest(model: nn.Module, cosine: float) -> int:
    look = ModelInspection(cosine=cosine, rows=0)
    return max((found.rows for found in look(model.state_dict())), default=0)


def ordinary(dataset: str, name: str, seed: int, steps: int) -> list[dict[str, Any]]:
    data = load_dataset(dataset)
    model = model_of(name, data, seed)
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for step in range(steps + 1):
        if step % (steps // (LOOKS - 1)) == 0:
            groups = {str(cosine): largest(model, cosine) for cosine in COSINES}
            rows.append({"dataset": dataset, "model": name, "seed": seed, "step": step, **groups})
        index = torch.randint(len(data.train), (32,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(model(data.train[index].pixels), data.train[index].labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
    return rows


def imprinted(data: Dataset, bins: int, disturbance: float, batch: int, seed: int) -> Any:
    torch.manual_seed(seed)
    model = Imprint(CNN(data.shape, 10), data.shape, bins=bins)
    with torch.no_grad():
        model.measure.weight *= 1 + disturbance * torch.randn_like(model.measure.weight)
    index = torch.randperm(len(data.train))[: 64 + 99]
    candidates, labels = data.train[index].pixels, data.train[index].labels
    images = candidates[: 64 // batch * batch]
    updates = [
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for x, y in zip(images.split(batch), labels[: len(images)].split(batch), strict=True)
    ]
    names = [name for name, _ in model.named_parameters()]
    gradients = {k: torch.stack([u[i] for u in updates]) for i, k in enumerate(names)}
    result = FullyConnected()(Observation(model, gradients, data.shape, 10, batch))
    pairs = zip(result.images.float(), images.split(batch), strict=True)
    found = torch.cat([match(part, own) for part, own in pairs])
    return {
        "bins": bins,
        "disturbance": disturbance,
        "batch": batch,
        "seed": seed,
        "images": len(images),
        "exact": float(exact(found, images).double().mean()),
        "identified": float(identified(result.images.float(), images, candidates[64:]).mean()),
        **{str(cosine): largest(model, cosine) for cosine in COSINES},
    }


def table(honest: list[dict[str, Any]], leaky: list[dict[str, Any]], look: ModelInspection) -> str:
    column = str(look.cosine)
    alarms = sum(row[column] > look.rows for row in honest)
    runs = len({(row["dataset"], row["model"], row["seed"]) for row in honest})
    lines = [
        f"False alarms: {alarms} of {len(honest)} looks at ordinary models ({runs} training runs, "
        f"{LOOKS} looks each). Largest group of parallel rows in any of them: "
        + ", ".join(f"{max(row[str(c)] for row in honest)} at cosine {c}" for c in COSINES)
        + f". The limit is {look.rows} at cosine {look.cosine}.",
        "",
        "| bins | noise on rows | batch | images | exact | identified | refused |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = sorted({(row["bins"], row["disturbance"], row["batch"]) for row in leaky})
    for key in keys:
        own = [row for row in leaky if (row["bins"], row["disturbance"], row["batch"]) == key]
        means = {k: sum(row[k] for row in own) / len(own) for k in ("exact", "identified")}
        refused = sum(row[column] > look.rows for row in own)
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {sum(row['images'] for row in own)} "
            f"| {means['exact']:.0%} | {means['identified']:.0%} | {refused} of {len(own)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=2, help="0 and 1 chose the cosine")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    honest = []
    for dataset, name in ORDINARY:
        for seed in seeds:
            honest += ordinary(dataset, name, seed, args.steps)
            print(honest[-1], flush=True)
    data = load_dataset("cifar10")
    leaky = []
    for bins in (128, 512):
        for disturbance in DISTURBANCES:
            leaky += [imprinted(data, bins, disturbance, 16, seed) for seed in seeds]
            print(leaky[-1], flush=True)
    look = ModelInspection()
    write_result(
        args.out / "inspection.json",
        args,
        seeds=list(seeds),
        inspection={"cosine": look.cosine, "rows": look.rows, "entries": look.entries},
        ordinary=honest,
        imprint=leaky,
    )
    text = table(honest, leaky, look)
    write_atomically(args.out / "inspection.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
