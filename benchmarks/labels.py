"""How many labels of a batch the last layer's gradient gives away: by counts and one by one.

Untrained and shortly trained models on CIFAR-10; batches of all classes and of two; images that
neither trained the models nor chose the one constant of the method.

    FEDVEIL_DATA=... python benchmarks/labels.py --out docs/results
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from written import write_result

from fedveil.attacks.inversion import Observation, infer_labels
from fedveil.attacks.inversion.gradients import labels_one_by_one
from fedveil.audit.metrics import label_accuracy
from fedveil.data import Images, load_dataset
from fedveil.models import build_model

TRAINING = 20_000  # images 30,000 to 39,999 chose the constant; the rest is reported
REPORTED = 40_000


def train(model: nn.Module, images: Images, steps: int, generator: torch.Generator) -> None:
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        index = torch.randint(TRAINING, (64,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(model(images[index].pixels), images[index].labels).backward()
        optimiser.step()


def batches(images: Images, size: int, count: int, classes: int) -> Tensor:
    """Return indices [count, size]; of the classes c and c + 3 where only two are wanted."""
    pool = torch.arange(REPORTED, len(images))
    if classes > 2:
        return pool[: size * count].reshape(count, size)
    labels = images.labels[pool]
    chosen = [pool[(labels == c % 10) | (labels == (c + 3) % 10)][:size] for c in range(count)]
    return torch.stack(chosen)


def measure(model: nn.Module, images: Images, index: Tensor) -> dict[str, float]:
    updates = []
    for batch in index:
        loss = F.cross_entropy(model(images[batch].pixels), images[batch].labels)
        updates.append(torch.autograd.grad(loss, list(model.parameters())))
    names = [name for name, _ in model.named_parameters()]
    gradients = {k: torch.stack([u[i] for u in updates]) for i, k in enumerate(names)}
    shape = tuple(images.raw.shape[1:])
    seen = Observation(model, gradients, shape, 10, index.shape[1])  # type: ignore[arg-type]
    truth = images.labels[index]
    single = labels_one_by_one(gradients["output.bias"], index.shape[1])
    return {
        "one_by_one": float(label_accuracy(single, truth).mean()),
        "counts": float(label_accuracy(infer_labels(seen), truth).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = load_dataset("cifar10").train
    rows: list[dict[str, Any]] = []
    for name, steps in (("cnn", 150), ("resnet-gn", 40)):
        model = build_model(name, (3, 32, 32), 10, seed=args.seed)
        for trained in (0, steps):
            train(model, images, trained, torch.Generator().manual_seed(args.seed))
            for size in (16, 64):
                for classes in (10, 2):
                    found = measure(model, images, batches(images, size, args.batches, classes))
                    row = {"model": name, "steps": trained, "batch": size, "classes": classes}
                    rows.append({**row, "batches": args.batches, **found})
                    print(rows[-1], flush=True)
    write_result(args.out / "labels.json", args, seed=args.seed, rows=rows)


if __name__ == "__main__":
    main()
