"""Levenberg–Marquardt with its closed-form start beside the published attacks, in one run.

LeNet with fresh weights; a federation of 3 clients that share out CIFAR-100's *test* images, on
none of which any constant of an attack was chosen (``--split train``: its training images); one
image a round; the gradients that the server received from one client. Restarts, steps and stopping
are the attacks' own; no attack sees an image. The slow attacks get fewer images
(``--slow-images``), the first ones of those that the fast attacks get.

    FEDVEIL_DATA=... python benchmarks/inversion.py --images 100 --slow-images 8 --out docs/results

``--throughput 64`` adds images per minute of so many victims attacked together and one by one, in
turns. What a step of a search costs does not depend on how long it goes on once its memory of 100
curvature pairs is full, so searches are cut to ``--throughput-steps`` steps of 20 iterations and
reckoned up to 100, and one by one only ``--alone`` victims are timed. Processor seconds stand by
wall-clock ones, since they change less with what else the machine does.

``--batch 2 --keep 6`` attacks batches of several images, by an attacker who knows the
transformation.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from written import write_result

from fedveil.attacks.inversion import (
    DLG,
    IDLG,
    RGAP,
    LevenbergMarquardt,
    Observation,
    build_attack,
)
from fedveil.audit.metrics import bootstrap, exact, label_accuracy, match, median, psnr, wilson
from fedveil.audit.settings import Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import load_dataset
from fedveil.defenses import Defense, parse_defense
from fedveil.models import build_model

SLOW = ("dlg", "idlg", "lm-cold")
ALL = ("lm", "rgap", "dlg", "idlg", "lm-cold")
CLIENTS = 3
STEPS = 100  # of a published search


def attack_of(name: str) -> Any:
    if name == "lm-cold":
        return LevenbergMarquardt(closed_form=False)
    return build_attack(name)


def measure(name: str, watched: WatchedFederation, defense: Defense) -> dict[str, Any]:
    observation = watched.observe(defense)
    images = watched.data.train[watched.ground_truth()]
    trained = images.pixels if defense.transform is None else defense.transform(images.pixels)
    begin, worked = time.perf_counter(), time.process_time()
    result = attack_of(name)(
        observation,
        progress=lambda done, total, loss: print(f"{name} {done}/{total} {loss:.1e}", flush=True),
    )
    wall, work = time.perf_counter() - begin, time.process_time() - worked
    batch = watched.watching.batch
    batches = trained.split(batch)
    found = torch.cat(
        [match(f.float(), own) for f, own in zip(result.images, batches, strict=True)]
    )
    found = found.clamp(0, 1) if defense.transform is None else found
    decibel = psnr(found, trained)
    row: dict[str, Any] = {
        "attack": name,
        "images": len(images),
        "batch": batch,
        "defense": defense.label,
        "wall_seconds": wall,
        "processor_seconds_per_image": work / len(images),
    }
    for key, interval in (
        ("exact", wilson(exact(found, trained))),
        ("label_accuracy", wilson(label_accuracy(result.labels, images.labels.reshape(-1, batch)))),
        ("psnr", bootstrap(decibel, statistic=median)),
        ("seconds_per_image", bootstrap(result.seconds / batch, statistic=median)),
    ):
        row |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    row["psnr_all"] = [round(value, 2) for value in decibel.tolist()]
    row["loss_all"] = result.loss.tolist()
    row["iterations_all"] = result.iterations.tolist()
    return row


def throughput(
    observation: Observation, steps: int, alone: int, turns: int
) -> list[dict[str, Any]]:
    """Time attacks on all victims together against the same attacks on one after another."""
    attacks: dict[str, Any] = {
        "dlg": DLG(steps=steps),
        "idlg": IDLG(steps=steps),
        "rgap": RGAP(),
        "lm": LevenbergMarquardt(),
    }
    rows = []
    for name, attack in attacks.items():
        costs: dict[str, list[tuple[float, float]]] = {"together": [], "alone": []}
        for _ in range(turns):
            costs["together"].append(cost(attack, [observation], search=name in SLOW))
            single = [observation.select(torch.tensor([victim])) for victim in range(alone)]
            costs["alone"].append(cost(attack, single, search=name in SLOW))
        row: dict[str, Any] = {"attack": name, "victims": observation.victims}
        for place, clock in enumerate(("wall", "processor")):
            ratios = []
            for kind, found in costs.items():
                seconds = statistics.median(turn[place] for turn in found)
                row[f"{kind}_images_per_minute_{clock}"] = 60 / seconds
            for one, other in zip(costs["alone"], costs["together"], strict=True):
                ratios.append(one[place] / other[place])
            row[f"times_alone_{clock}"] = statistics.median(ratios)
        rows.append(row)
        print(row, flush=True)
    return rows


def cost(attack: Any, observations: list[Observation], *, search: bool) -> tuple[float, float]:
    """Return wall and processor seconds for an image; of a search, as if it went on for STEPS."""
    begin, worked = time.perf_counter(), time.process_time()
    results = [attack(observation) for observation in observations]
    wall, work = time.perf_counter() - begin, time.process_time() - worked
    images = sum(len(result.loss) for result in results)
    done = sum(int(result.iterations.sum()) for result in results)
    share = STEPS / done if search else 1 / images
    return wall * share, work * share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--slow-images", type=int, default=8)
    parser.add_argument("--attack", action="append", default=None, help="or none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--keep", type=int, default=None)
    parser.add_argument("--throughput", type=int, default=0)
    parser.add_argument("--throughput-steps", type=int, default=15)
    parser.add_argument("--alone", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", default="inversion")
    args = parser.parse_args()
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(os.environ["FEDVEIL_DATA"]) / "cifar100"
        for number, file in enumerate(sorted(source.glob(f"{args.split}-*.parquet"))):
            (Path(folder) / f"train-{number}.parquet").symlink_to(file.resolve())
        data = load_dataset(folder, seed=args.seed)
        model = build_model("lenet", data.shape, len(data.classes), seed=args.seed)

        def watch(images: int, batch: int) -> WatchedFederation:
            watching = Watching(clients=CLIENTS, images=images, batch=batch, seed=args.seed)
            return WatchedFederation(data, model, watching)

        defense = parse_defense(f"dct:keep={args.keep}" if args.keep else "none")
        rows = []
        for name in [] if args.attack == ["none"] else args.attack or ALL:
            count = args.slow_images if name in SLOW else args.images
            watched = watch(count, args.batch)
            rows.append(measure(name, watched, defense))
        rates = []
        if args.throughput:
            seen = watch(args.throughput, 1).observe(parse_defense("none"))
            rates = throughput(seen, args.throughput_steps, args.alone, args.turns)
    own = next((row["seconds_per_image"] for row in rows if row["attack"] == "lm"), None)
    for row in rows:
        row["times_lm"] = row["seconds_per_image"] / own if own else None
    report = {
        "seed": args.seed,
        "threads": threads,
        "dataset": f"cifar100 {args.split}",
        "model": "lenet",
        "rows": rows,
        "throughput": rates,
    }
    print(json.dumps(report, indent=1))
    if args.out:
        write_result(args.out / f"{args.name}.json", args, **report)


if __name__ == "__main__":
    main()
