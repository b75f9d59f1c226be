"""Whole batches read off the first linear layer of ReLU networks: components, peeling, quotients.

Real federations whose clients return the gradient of one batch; the network is wide, fresh and
fully connected, on CIFAR-100's lossless images. Each row is of several updates, of other images
each, and its interval is over these. Some rows are of the mean over ten clients, as a server
has it under secure aggregation, and of what clients return after an epoch of several steps. What
parts images in ``ica`` was chosen on a batch of 128 and one of 256 of these training images, drawn
otherwise.

    python benchmarks/batches.py --out docs/results

``--images``, ``--defense`` and ``--attack`` make some rows only; what else is in the file stays.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
from fedveil.defenses import parse_defense
from fedveil.models.normalise import Normalise


@dataclass(frozen=True)
class Setting:
    """What clients train, and what a server sees of it.

    Attributes:
        images: Of an update, all clients together.
        hidden: Units of each hidden layer.
        updates: Of other images each.
        layers: Hidden ones.
        centred: Whether the network centres its inputs.
        summed: Clients whose mean update the server sees.
        clients: In all, the training images divided among them.
        local_batch: Images of a local step of one epoch; None for the gradient of all.
        defense: Of every client's update.
    """

    images: int
    hidden: int
    updates: int
    layers: int = 1
    centred: bool = False
    summed: int = 1
    clients: int = 2
    local_batch: int | None = None
    defense: str = "none"


SETTINGS = (
    Setting(16, 512, 10),
    Setting(16, 512, 7, layers=3),
    Setting(16, 512, 5, centred=True),
    Setting(64, 1024, 4),
    Setting(64, 1024, 4, centred=True),
    Setting(128, 1024, 2),
    Setting(256, 2048, 2, clients=1),
    Setting(256, 2048, 1, clients=1, centred=True),
    Setting(256, 1024, 1, clients=1),
    Setting(384, 2048, 1, clients=1),
    Setting(160, 1024, 3, summed=10, clients=10),
    Setting(160, 1024, 3, summed=10, clients=10, local_batch=8),
    Setting(160, 1024, 3, summed=10, clients=10, defense="noise:ratio=2"),
)
ATTACKS: Mapping[str, Attack] = {
    "fc": FullyConnected(),
    "peel": Peeling(seconds=20.0),
    "ica:rounds=0": IndependentComponents(rounds=0),
    "ica": IndependentComponents(),
}
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


def rows(
    data: Dataset, seed: int, settings: Sequence[Setting], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the named attacks."""
    for setting in settings:
        watching = Watching(
            clients=setting.clients,
            images=setting.images * setting.updates,
            batch=setting.images // setting.summed,
            aggregate=setting.summed,
            update="gradient" if setting.local_batch is None else "fedavg",
            batch_size=setting.local_batch or 10,
            seed=seed,
            workers=1,
        )
        model = network(data, setting.hidden, setting.layers, centred=setting.centred)
        federation = WatchedFederation(data, model, watching)
        seen = federation.observe(parse_defense(setting.defense))
        used = federation.ground_truth()
        originals = data.train[used].pixels
        generator = torch.Generator().manual_seed(seed)
        strangers = data.train[strangers_to(data.train, used, generator)].pixels
        for name in names:
            if name != "peel" or setting.images <= _MOST_PEELED:
                scores = told(ATTACKS[name], seen, originals, strangers)
                yield {**asdict(setting), "attack": name, **scores}


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


def setting_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a row from others."""
    return row["attack"], *(row.get(field.name, field.default) for field in fields(Setting))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, nargs="+", help="settings of so many images only")
    parser.add_argument("--defense", help="settings with it only")
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    place = arguments.out / "batches.json"
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    some = arguments.images or arguments.defense or len(arguments.attack) < len(ATTACKS)
    if some and place.exists():
        found = {setting_of(row): row for row in json.loads(place.read_text())["rows"]}
    settings = [
        one
        for one in SETTINGS
        if one.images in (arguments.images or [one.images])
        and one.defense == (arguments.defense or one.defense)
    ]
    data = load_dataset(arguments.dataset, seed=arguments.seed)
    for row in rows(data, arguments.seed, settings, arguments.attack):
        found[setting_of(row)] = row
        print(json.dumps(row), flush=True)
        # Kept row by row: the last ones take minutes.
        write_result(place, arguments, rows=list(found.values()))


if __name__ == "__main__":
    main()
