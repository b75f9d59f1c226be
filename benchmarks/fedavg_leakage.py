r"""What ten local epochs of ten batches of five images tell of a client's fifty images.

The setting of Dimitrov et al., "Data Leakage in Federated Averaging", TMLR 2022, table 1: their
network, step size and measure (images above 20 dB after the assignment that suits decibels best,
as their code has it), on MNIST where they have FEMNIST. Clients' images are training images; their
orders are drawn anew in each epoch, their steps are torch's SGD. The floor is the best of images
without content by the same measure: other images with the client's labels, blurred noise, the mean
of other images. The attack's settings were chosen on a client of seed 100, in the setting that was
published; the others are it with one thing changed: longer steps, momentum, weights that were
trained on other images first, photographs.

    python benchmarks/fedavg_leakage.py --setting published:10 --setting longer:2 \
        --setting momentum:1 --setting trained:2 --setting photographs:2 --work DIR \
        --out docs/results

What is in DIR already is not done again, nor are updates whose scores are in the file in ``--out``;
its rows of other settings stay. So ``--setting momentum:3`` adds two updates to the one there.
"""

import argparse
import copy
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from written import write_result

from fedveil.attacks.inversion import Inversion, LocalSteps, Observation, build_attack
from fedveil.audit.metrics import identified, over_updates
from fedveil.data import Dataset, Images, load_dataset
from fedveil.files import write_atomically

IMAGES, EPOCHS, BATCH = 50, 10, 5
RECOVERED = 20.0  # decibels
STRANGERS = 400
ATTACKS = ("features", "ig:steps=400,tv=0.02")
_FILE = "fedavg-leakage.json"
_SCORES = ("recovered", "floor", "decibels", "identified", "loss", "cpu_seconds")
_FIRST = 1_000  # images of the order from which client, strangers and others are


@dataclass(frozen=True)
class Setting:
    """What a client trains, on what and how.

    Attributes:
        dataset: As ``load_dataset`` reads it.
        learning_rate: Of the client's steps.
        momentum: Of these.
        trained: Steps of 50 images that the weights were trained for before, on images of others.
    """

    dataset: str = "mnist"
    learning_rate: float = 0.004
    momentum: float = 0.0
    trained: int = 0


SETTINGS: Mapping[str, Setting] = {
    "published": Setting(),
    "longer": Setting(learning_rate=0.04),
    "momentum": Setting(momentum=0.9),
    "trained": Setting(trained=1_000),
    "photographs": Setting(dataset="cifar10"),
}


class Network(nn.Module):
    """Two 3×3 convolutions with average pooling, a hidden layer of 100, as in their code."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), 100), nn.ReLU()),
        )
        self.output = nn.Linear(100, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, classes] of float [N, C, H, W] in [0, 1]."""
        logits: Tensor = self.output(self.body((pixels - 0.1307) / 0.3081))
        return logits


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--setting",
        action="append",
        required=True,
        metavar="NAME:UPDATES",
        help=f"NAME of {', '.join(SETTINGS)}",
    )
    parser.add_argument("--work", type=Path, required=True, help="where scores are kept")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    before = earlier(arguments.out / _FILE)
    rows = {(row["attack"], row["setting"]): row for row in before}
    for asked in arguments.setting:
        name, _, updates = asked.partition(":")
        for attack in ATTACKS if name == "published" else ATTACKS[:1]:
            known = rows.get((attack, name), {}).get("scores", [])
            scores = known + [
                kept(arguments.work, attack, name, update)
                for update in range(len(known), int(updates))
            ]
            row = {"attack": attack, "setting": name, **asdict(SETTINGS[name]), **joined(scores)}
            print(json.dumps(row), flush=True)
            rows[attack, name] = row | {"scores": scores}
    write_result(
        arguments.out / _FILE,
        arguments,
        images=IMAGES,
        epochs=EPOCHS,
        batch_size=BATCH,
        recovered_above=RECOVERED,
        published=0.45,
        rows=list(rows.values()),
    )


def earlier(place: Path) -> list[dict[str, Any]]:
    """Return a file's rows, with the scores of those of one update, which are the row's own."""
    rows: list[dict[str, Any]] = (
        json.loads(place.read_text(encoding="utf-8"))["rows"] if place.exists() else []
    )
    for row in rows:
        if row["updates"] == 1 and "scores" not in row:
            row["scores"] = [
                {name: row[name] for name in _SCORES} | {"untold": bool(row["untold"])}
            ]
    return rows


def kept(work: Path, attack: str, name: str, update: int) -> dict[str, Any]:
    """Return the scores of one update, from an earlier run where there are any."""
    place = work / f"{attack.partition(':')[0]}-{name}-{update}.json"
    if not place.exists():
        found = scored(attack, SETTINGS[name], update)
        print(place.name, json.dumps(found), flush=True)
        write_atomically(place, json.dumps(found).encode())
    scores: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return scores


def scored(attack: str, setting: Setting, update: int) -> dict[str, Any]:
    """Attack one client's update, and score what is rebuilt beside images without content."""
    data = load_dataset(setting.dataset)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(update))
    own, others = data.train[order[:IMAGES]], data.train[order[IMAGES : IMAGES + 2 * STRANGERS]]
    model = sent(data, order[_FIRST:], setting, update)
    observation = observed(model, own, setting, update)
    begin = time.process_time()
    result: Inversion
    if attack.startswith("ig"):
        # What a server that simulates nothing does: the update as one gradient.
        observation = Observation(
            model, observation.gradients, observation.shape, observation.classes, IMAGES
        )
    result = build_attack(attack)(observation)
    spent = time.process_time() - begin
    found, strangers = result.images[0].float().clamp(0, 1), others.pixels[:STRANGERS]
    decibels = assigned(found, own.pixels)
    content_free = [
        float((assigned(images, own.pixels) > RECOVERED).double().mean())
        for images in without_content(own.labels, others[torch.arange(STRANGERS, 2 * STRANGERS)])
    ]
    return {
        "recovered": float((decibels > RECOVERED).double().mean()),
        "floor": max(content_free),
        "decibels": float(decibels.mean()),
        "identified": float(identified(found[None], own.pixels, strangers).mean()),
        "untold": bool(result.untold is not None and result.untold[0]),
        "loss": float(result.loss[0]),
        "cpu_seconds": spent,
    }


def sent(data: Dataset, others: Tensor, setting: Setting, seed: int) -> Network:
    """Return what the server sends: fresh weights, or such as others' images have trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Network(data.shape, len(data.classes))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(setting.trained):
        batch = data.train[others[torch.randint(len(others), (50,), generator=generator)]]
        optimizer.zero_grad()
        F.cross_entropy(model(batch.pixels), batch.labels).backward()
        optimizer.step()
    return model


def observed(model: nn.Module, held: Images, setting: Setting, seed: int) -> Observation:
    """Return what a server has of a client that trained on its images and sent weights back."""
    own, steps, rate = copy.deepcopy(model), 0, setting.learning_rate
    optimizer = torch.optim.SGD(own.parameters(), rate, momentum=setting.momentum)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for index in torch.randperm(IMAGES, generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(own(held.pixels[index]), held.labels[index]).backward()
            optimizer.step()
            steps += 1
    returned = dict(own.named_parameters())
    gradients = {
        name: ((sent - returned[name]) / (rate * steps)).detach()[None]
        for name, sent in model.named_parameters()
    }
    local = LocalSteps(EPOCHS, BATCH, rate)
    shape, classes = held.pixels.shape[1:], own.output.out_features
    return Observation(model, gradients, tuple(shape), classes, IMAGES, local=local)


def assigned(found: Tensor, originals: Tensor) -> Tensor:
    """Return decibels of each original to the image assigned to it, [N]; theirs, by the truth."""
    from scipy.optimize import linear_sum_assignment

    apart = torch.cdist(originals.double().flatten(1), found.double().flatten(1)).square()
    decibels = -10 * (apart / originals[0].numel()).clamp_min(1e-20).log10()
    rows, columns = linear_sum_assignment(decibels.numpy(), maximize=True)
    return decibels[torch.from_numpy(rows), torch.from_numpy(columns)]


def without_content(labels: Tensor, others: Any) -> list[Tensor]:
    """Return images that hold nothing of a client's: others of its labels, noise, a mean image."""
    places = [
        (others.labels == label).nonzero()[:, 0][int((labels[:place] == label).sum())]
        for place, label in enumerate(labels)
    ]
    channels, side = others.pixels.shape[1:3]
    coarse = (len(labels), channels, side // 4, side // 4)
    noise = torch.rand(coarse, generator=torch.Generator().manual_seed(0))
    return [
        others.pixels[torch.stack(places)],
        F.interpolate(noise, side, mode="bicubic").clamp(0, 1),
        others.pixels.mean(dim=0, keepdim=True).repeat(len(labels), 1, 1, 1),
    ]


def joined(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over updates; intervals are over these."""
    row: dict[str, Any] = {"updates": len(scores)}
    for name in ("recovered", "identified"):
        share = over_updates(torch.tensor([[one[name]] * IMAGES for one in scores]))
        row |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
    for name in ("floor", "decibels", "loss", "cpu_seconds"):
        row[name] = sum(one[name] for one in scores) / len(scores)
    return row | {"untold": sum(one["untold"] for one in scores)}


if __name__ == "__main__":
    main()
