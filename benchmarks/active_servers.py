"""What servers that plant something in the model read through a sum, and which clients notice.

Three parts: honest models as a client's two inspections see them, from their first weights on;
heads that fish for one class; a hidden layer that sorts images into bins. Each update is the mean
gradient over the images of all clients together, which is all that secure aggregation shows.
Images of the attacked are training images; the server's public ones are test images.

    python benchmarks/active_servers.py --out docs/results
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from inspection import ORDINARY, model_of
from torch import Tensor, nn
from torch.nn import functional as F
from written import write_result

from fedveil.attacks.inversion import (
    Attack,
    Fishing,
    Inversion,
    InvertingGradients,
    LatentBins,
    Observation,
    bait,
    binned,
    infer_labels,
)
from fedveil.audit.metrics import exact, identified, match, over_updates, psnr
from fedveil.data import Dataset, load_dataset
from fedveil.defenses.model_inspection import ModelInspection
from fedveil.defenses.response_inspection import ResponseInspection
from fedveil.models import build_model

LOOKS = (0, 15, 60)
TRIED_ON = 64  # images of the client that inspects
FISHED = (
    # model, clients, images each, noise, updates
    ("lenet", 10, 8, 0.0, 3),
    ("cnn", 10, 8, 0.0, 3),
    ("cnn", 10, 8, 0.1, 3),
    ("cnn", 10, 8, 0.3, 3),
)
SORTED = (
    # dataset, clients, images each, noise, updates
    ("mnist", 10, 1, 0.0, 2),
    ("cifar100", 10, 1, 0.0, 2),
)
STRANGERS = 400
PUBLIC = 500


def honest(seed: int) -> Iterator[dict[str, Any]]:
    """Yield how ordinary models look to a client while they are trained."""
    for name_of_data, name in ORDINARY:
        data = load_dataset(name_of_data)
        model = model_of(name, data, seed)
        optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        generator = torch.Generator().manual_seed(seed)
        own = data.train[torch.randperm(len(data.train), generator=generator)[:TRIED_ON]]
        for step in range(LOOKS[-1] + 1):
            if step in LOOKS:
                seen = inspected(model, own.pixels)
                yield {"dataset": name_of_data, "model": name, "step": step, **seen}
            index = torch.randint(len(data.train), (32,), generator=generator)
            optimiser.zero_grad()
            F.cross_entropy(model(data.train[index].pixels), data.train[index].labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()


def inspected(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return what both inspections say of a model to a client with these images."""
    look, trial = ModelInspection(), ResponseInspection()
    responses = trial(model, images)
    return {
        "dominance": responses.dominance,
        "alike": max(responses.alike.values(), default=0),
        "weights_refuse": bool(look(model.state_dict())),
        "responses_refuse": trial.objection(model, images) is not None,
    }


def observed(model: nn.Module, images: Tensor, labels: Tensor, classes: int) -> Observation:
    """Return what a server has of the sum over these images."""
    loss = F.cross_entropy(model(images), labels)
    update = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    gradients = {name: value[None] for name, value in zip(names, update, strict=True)}
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return Observation(model, gradients, shape, classes, len(images))


def drawn(data: Dataset, images: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return images and labels of a round, and strangers."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    used, others = data.train[order[:images]], data.train[order[images : images + STRANGERS]]
    return used.pixels, used.labels, others.pixels


def fished(seed: int) -> Iterator[dict[str, Any]]:
    """Yield what a head that fishes for one class gives."""
    data = load_dataset("cifar100")
    classes = len(data.classes)
    for name, clients, each, noise, updates in FISHED:
        honest_model = build_model(name, data.shape, classes, seed=seed)
        then: Attack = InvertingGradients(steps=600)
        attack = Fishing() if name == "lenet" else Fishing(then=then)
        rows: list[dict[str, Any]] = []
        seen: dict[str, Any] = {}
        for update in range(updates):
            images, labels, strangers = drawn(data, clients * each, 1000 * seed + update)
            # A round of the honest model tells which classes are there once.
            counts = infer_labels(observed(honest_model, images, labels, classes))[0].bincount()
            target = int((counts == 1).nonzero()[update % int((counts == 1).sum())])
            model = bait(honest_model, data.shape, target, noise=noise, seed=update)
            begin = time.process_time()
            result = attack(observed(model, images, labels, classes))
            spent = time.process_time() - begin
            caught = images[labels == target]
            # An inspecting client need not hold the image that is fished for.
            if not rows:
                seen = inspected(model, images[-TRIED_ON:])
            rows.append(seen | told(result, caught, strangers, most=1) | {"cpu_seconds": spent})
        yield {
            "model": name,
            "clients": clients,
            "images_each": each,
            "noise": noise,
            "attack": "fish" if name == "lenet" else "fish-ig:steps=600",
            **joined(rows),
        }


def sorted_into_bins(seed: int) -> Iterator[dict[str, Any]]:
    """Yield what a hidden layer that sorts images gives."""
    for name_of_data, clients, each, noise, updates in SORTED:
        data = load_dataset(name_of_data)
        classes = len(data.classes)
        public = data.test[torch.arange(min(PUBLIC, len(data.test)))].pixels
        fresh = build_model("mnist-cnn", data.shape, classes, seed=seed)
        model = binned(fresh, data.shape, public, noise=noise)
        seen = inspected(model, data.train[torch.arange(TRIED_ON)].pixels)
        rows = []
        for update in range(updates):
            images, labels, strangers = drawn(data, clients * each, 1000 * seed + update)
            begin = time.process_time()
            result = LatentBins()(observed(model, images, labels, classes))
            spent = time.process_time() - begin
            rows.append(seen | told(result, images, strangers) | {"cpu_seconds": spent})
        yield {
            "dataset": name_of_data,
            "model": "mnist-cnn",
            "clients": clients,
            "images_each": each,
            "noise": noise,
            "attack": "latent",
            **joined(rows),
        }


def told(
    result: Inversion, originals: Tensor, strangers: Tensor, *, most: int | None = None
) -> dict[str, Any]:
    """Return shares exact and identified among the images that were to be had, with the floor."""
    found = result.images.float().clamp(0, 1)[:, :most]
    half = len(strangers) // 2
    others = strangers[half:][torch.arange(found.shape[1]) % half][None]
    matched = match(found[0], originals) if len(originals) == found.shape[1] else found[0]
    alike = matched.shape == originals.shape
    known, floor = (
        float(identified(images, originals, strangers[:half]).mean()) if alike else 0.0
        for images in (found, others)
    )
    return {
        "exact": exact(matched, originals).double() if alike else torch.zeros(1),
        "decibels": psnr(matched, originals) if alike else torch.zeros(1),
        "identified": known,
        "identified_floor": floor,
        "untold": int(result.untold.sum()) if result.untold is not None else 0,
    }


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of several updates; intervals are over these."""
    share = over_updates(torch.stack([row["exact"] for row in rows]))
    count = len(rows)
    decibels = torch.cat([row["decibels"] for row in rows])
    means = ("identified", "identified_floor", "cpu_seconds")
    first = ("dominance", "alike", "weights_refuse", "responses_refuse")
    return {
        "updates": count,
        "exact": share.value,
        "exact_low": share.low,
        "exact_high": share.high,
        "psnr": float(decibels.median()),
        **{name: sum(row[name] for row in rows) / count for name in means},
        "untold": sum(row["untold"] for row in rows),
        **{name: rows[0][name] for name in first},
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="all by default")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.out / "active-servers.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found = {name: found.get(name, []) for name in PARTS}
    for name in arguments.part or PARTS:
        found[name] = []
        for row in PARTS[name](arguments.seed):
            found[name].append(row)
            print(row, flush=True)
            write_result(path, arguments, **found)


PARTS = {"fished": fished, "sorted": sorted_into_bins, "honest": honest}


if __name__ == "__main__":
    main()
