"""Levenberg–Marquardt with its closed-form start beside the published attacks, in one run.

LeNet with fresh weights; a federation of 3 clients that share out CIFAR-100's *test* images, on
none of which any constant of an attack was chosen; one image a round; the gradients that the server
received from one client. Restarts, steps and stopping are the attacks' own; no attack sees an
image. The slow attacks get fewer images (``--slow-images``), the first ones of those that the fast
attacks get.

    FEDVEIL_DATA=... python benchmarks/inversion.py --images 100 --slow-images 8 --out docs/results
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from torch import nn

from fedveil.attacks.inversion import LevenbergMarquardt, build_attack
from fedveil.audit.metrics import bootstrap, exact, label_accuracy, median, psnr, wilson
from fedveil.audit.watch import WatchedFederation
from fedveil.data import Dataset, load_dataset
from fedveil.defenses import parse_defense
from fedveil.models import build_model

SLOW = ("dlg", "idlg", "lm-cold")


def attack_of(name: str) -> Any:
    if name == "lm-cold":
        return LevenbergMarquardt(closed_form=False)
    return build_attack(name)


def measure(
    name: str, watched: WatchedFederation, data: Dataset, model: nn.Module
) -> dict[str, Any]:
    observation = watched.observe(model, data, parse_defense("none"))
    images = data.train[watched.ground_truth(data)]
    begin = time.perf_counter()
    result = attack_of(name)(
        observation,
        progress=lambda done, total, loss: print(f"{name} {done}/{total} {loss:.1e}", flush=True),
    )
    wall = time.perf_counter() - begin
    found = result.images[:, 0].float().clamp(0, 1)
    decibel = psnr(found, images.pixels)
    row: dict[str, Any] = {"attack": name, "images": len(images), "wall_seconds": wall}
    for key, interval in (
        ("exact", wilson(exact(found, images.pixels))),
        ("label_accuracy", wilson(label_accuracy(result.labels, images.labels[:, None]))),
        ("psnr", bootstrap(decibel, statistic=median)),
        ("seconds_per_image", bootstrap(result.seconds, statistic=median)),
    ):
        row |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    row["psnr_all"] = [round(value, 2) for value in decibel.tolist()]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--slow-images", type=int, default=8)
    parser.add_argument("--attack", action="append", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(os.environ["FEDVEIL_DATA"]) / "cifar100"
        for number, file in enumerate(sorted(source.glob("test-*.parquet"))):
            (Path(folder) / f"train-{number}.parquet").symlink_to(file.resolve())
        data = load_dataset(folder, seed=args.seed)
        model = build_model("lenet", data.shape, len(data.classes), seed=args.seed)
        rows = []
        for name in args.attack or ["lm", "rgap", "dlg", "idlg", "lm-cold"]:
            count = args.slow_images if name in SLOW else args.images
            watched = WatchedFederation(
                folder, "lenet", clients=3, victim=0, rounds=count, seed=args.seed
            )
            rows.append(measure(name, watched, data, model))
    own = next((row["seconds_per_image"] for row in rows if row["attack"] == "lm"), None)
    for row in rows:
        row["times_lm"] = row["seconds_per_image"] / own if own else None
    report = {
        "command": " ".join(["python", "benchmarks/inversion.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": threads,
        "dataset": "cifar100 test",
        "model": "lenet",
        "rows": rows,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "inversion.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
