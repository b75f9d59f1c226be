"""Whole batches read off the first linear layer of ReLU networks: components, peeling, quotients.

Real federations whose clients return the gradient of one batch; the network is wide, fresh and
fully connected, on CIFAR-100's lossless images. Each row is of several updates, of other images
each, and its interval is over these.

    python benchmarks/batches.py --out docs/results
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from written import write_result

from fedveil.attacks.inversion import (
    Attack,
    FullyConnected,
    IndependentComponents,
    Observation,
    Peeling,
)
from fedveil.audit.metrics import exact, identified, match, over_updates, psnr
from fedveil.audit.scoring import strangers_to
from fedveil.audit.settings import Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import Dataset, load_dataset
from fedveil.defenses import Defense
from fedveil.models.normalise import Normalise

ROWS = (
    # centred inputs, hidden units, hidden layers, images, updates
    (False, 512, 1, 16, 10),
    (False, 512, 3, 16, 7),
    (True, 512, 1, 16, 5),
    (False, 1024, 1, 64, 4),
    (True, 1024, 1, 64, 4),
    (False, 1024, 1, 128, 2),
)
_MOST_PEELED = 64  # images; peeling stops at its limit beyond


def network(data: Dataset, hidden: int, layers: int, *, centred: bool) -> nn.Module:
    """Return a fully connected ReLU network with fresh weights."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [Normalise()] if centred else []
    parts.append(nn.Flatten())
    wide = torch.Size(data.shape).numel()
    for _ in range(layers):
        parts += [nn.Linear(wide, hidden), nn.ReLU()]
        wide = hidden
    return nn.Sequential(*parts, nn.Linear(wide, len(data.classes)))


def rows(data: Dataset, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of both attacks."""
    for centred, hidden, layers, images, updates in ROWS:
        watching = Watching(clients=2, images=images * updates, batch=images, seed=seed, workers=1)
        federation = WatchedFederation(
            data, network(data, hidden, layers, centred=centred), watching
        )
        seen = federation.observe(Defense("none"))
        originals = data.train[federation.ground_truth()].pixels
        attacks: dict[str, Attack] = {"fc": FullyConnected()}
        if images <= _MOST_PEELED:
            attacks["peel"] = Peeling(seconds=20.0)
        attacks |= {
            "ica:rounds=0": IndependentComponents(rounds=0),
            "ica": IndependentComponents(),
        }
        used = federation.ground_truth()
        generator = torch.Generator().manual_seed(seed)
        strangers = data.train[strangers_to(data.train, used, generator)].pixels
        for name, attack in attacks.items():
            yield {
                "centred": centred,
                "hidden": hidden,
                "layers": layers,
                "images": images,
                "updates": updates,
                "attack": name,
                **told(attack, seen, originals, strangers),
            }


def told(attack: Attack, seen: Observation, originals: Tensor, strangers: Tensor) -> dict[str, Any]:
    """Return shares exact and identified, decibels and seconds of one attack.

    The floor is what photographs of others in place of what was found are identified with.
    """
    begin = time.process_time()
    result = attack(seen)
    spent = time.process_time() - begin
    right, distances = [], []
    for found, own in zip(result.images.float(), originals.split(seen.images), strict=True):
        matched = match(found, own)
        right.append(exact(matched, own).double())
        distances.append(psnr(matched.clamp(0, 1), own))
    share = over_updates(torch.stack(right))
    half = len(strangers) // 2
    found = result.images.float().clamp(0, 1)
    others = strangers[half:][torch.arange(seen.victims * seen.images) % half]
    known, floor = (
        float(identified(images, originals, strangers[:half]).mean())
        for images in (found, others.view_as(found))
    )
    return {
        "exact": share.value,
        "exact_low": share.low,
        "exact_high": share.high,
        "whole_updates": float(torch.stack(right).all(dim=1).double().mean()),
        "identified": known,
        "identified_floor": floor,
        "untold": 0 if result.untold is None else int(result.untold.sum()),
        "psnr": float(torch.cat(distances).median()),
        "cpu_seconds_an_update": spent / seen.victims,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for row in rows(load_dataset(arguments.dataset, seed=arguments.seed), arguments.seed):
        found.append(row)
        print(
            f"{'centred' if row['centred'] else 'in [0, 1]'}, {row['layers']} × "
            f"{row['hidden']:4} units, {row['images']:3} images, "
            f"{row['attack']:13}{row['exact']:7.1%} exact, {row['cpu_seconds_an_update']:.2f} s",
            flush=True,
        )
        # Kept row by row: the last ones take minutes.
        write_result(arguments.out / "batches.json", arguments, rows=found)


if __name__ == "__main__":
    main()
