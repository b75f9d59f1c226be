r"""Single images behind ReLU and max pooling: ``layers`` beside ``ig``, image by image.

Training images of CIFAR-100, one an update, each the gradient of one image by a network with fresh
weights. The schedules of ``layers`` were chosen on four images from the 900th on, which are not
among them.

    python benchmarks/patterns.py --images 10 --out docs/results
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from written import write_result

from fedveil.attacks.inversion import Observation, build_attack
from fedveil.data import Dataset, load_dataset
from fedveil.models import build_model

_EXACT = 40.0  # dB


def observed(model: nn.Module, data: Dataset, images: int) -> tuple[Observation, Tensor]:
    """Return what a server has of updates of one image each, and the images."""
    part = data.train[torch.arange(images)]
    pixels = part.pixels
    named = dict(model.named_parameters())
    updates = [
        torch.autograd.grad(
            F.cross_entropy(model(pixels[i : i + 1]), part.labels[i : i + 1]), list(named.values())
        )
        for i in range(images)
    ]
    gradients = {
        name: torch.stack([update[place] for update in updates]) for place, name in enumerate(named)
    }
    return Observation(model, gradients, data.shape, len(data.classes)), pixels


def decibels(images: Tensor, originals: Tensor) -> list[float]:
    """Return the PSNR of each image, [V, C, H, W]."""
    missed = (images.clamp(0, 1).double() - originals.double()).square().flatten(1).mean(dim=1)
    return [float(value) for value in -10 * missed.clamp_min(1e-20).log10()]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--attack", nargs="+", default=["ig", "layers"])
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset(arguments.dataset, seed=arguments.seed)
    classes = len(data.classes)
    model = build_model(arguments.model, data.shape, classes, seed=arguments.seed).train()
    seen, originals = observed(model, data, arguments.images)
    rows: list[dict[str, Any]] = []
    for text in arguments.attack:
        found = build_attack(text)(seen)
        reached = decibels(found.images[:, 0], originals)
        rows.append(
            {
                "attack": text,
                "images": arguments.images,
                "psnr": reached,
                "psnr_median": float(torch.tensor(reached).median()),
                "exact": sum(one > _EXACT for one in reached),
                "untold": [] if found.untold is None else found.untold.tolist(),
                "loss": found.loss.tolist(),
                "seconds_per_image": float(found.seconds.double().mean()),
            }
        )
        print(rows[-1], flush=True)
        write_result(arguments.out / "patterns.json", arguments, rows=rows)


if __name__ == "__main__":
    main()
