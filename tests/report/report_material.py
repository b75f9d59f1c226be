"""Directories of runs and audits as the other commands write them, small and made up."""

import json
from pathlib import Path

import numpy as np

CANARY = "the-secret-canary-7f3a"
NASTY = "<script>alert('x')</script>&\"'`{{7*7}}"


def configuration(**changes):
    return {
        "dataset": "digits",
        "model": "cnn",
        "strategy": "noise-delta",
        "cap": 0.6,
        "rounds": 3,
        "report_images": 2000,
        "seed": 0,
        **changes,
    }


def make_run(
    path: Path, *, copies=(0.3, 0.5, 0.55), accuracy=0.9, images=500, chance=None, **changes
) -> Path:
    path.mkdir(parents=True)
    lines = [
        {
            "round": number,
            "accuracy": accuracy,
            "copies": [copy, copy / 2],
            "sigma": 1.5,
            "seconds": 2.0,
            "loss": 0.1,
            "clients": [1],
        }
        for number, copy in enumerate(copies, start=1)
    ]
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = configuration(rounds=len(copies), **changes)
    summary = {
        "accuracy": accuracy,
        "report_images": images,
        "calibration_images": 200,
        "configuration": settings,
        "versions": {"fedveil": "0.1.0", "torch": "2.13.0"},
        "chance": chance,
    }
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.json").write_text(json.dumps({"configuration": settings}))
    for name in ("noise.key", "checkpoint.safetensors", "model.safetensors", "archive.bin"):
        (path / name).write_text(CANARY)
    return path


def leakage_row(attack="lm", defense="none", *, adaptive=False, identified=1.0, **changes):
    return {
        "attack": attack,
        "defense": defense,
        "adaptive": adaptive,
        "images": 4,
        "exact": identified,
        "exact_low": 0.0,
        "exact_high": 1.0,
        "identified": identified,
        "identified_low": max(0.0, identified - 0.1),
        "identified_high": min(1.0, identified + 0.05),
        "label_accuracy": 1.0,
        "psnr_original": 40.0,
        "psnr_trained": 50.0,
        "ssim_original": 0.9,
        "seconds_per_image": 0.5,
        **changes,
    }


LEAKAGE_ROWS = (
    leakage_row(),
    leakage_row(defense="dct:keep=3", identified=0.25),
    leakage_row(defense="dct:keep=3", adaptive=True, identified=0.75),
)


def membership_row(defense="none", *, auc=0.9, found=0.4, spread=0.02, **changes):
    """A row of membership; ``found`` None where too few images can tell."""
    ends = {"_low": -spread, "": 0.0, "_high": spread}
    return {
        "attack": "span",
        "defense": defense,
        "adaptive": True,
        "images": 64,
        "updates": 8,
        "picked_out": 0.5,
        "picked_out_floor": 0.01,
        "strangers": {
            "strangers": 1000,
            **{f"auc{end}": min(1.0, auc + by) for end, by in ends.items()},
            **{
                f"tpr_at_1{end}": None if found is None else min(1.0, max(0.0, found + by))
                for end, by in ends.items()
            },
        },
        "certain": None,
        **changes,
    }


def make_leakage(
    path: Path, rows=LEAKAGE_ROWS, *, arrays=True, side=8, membership=(), **settings
) -> Path:
    path.mkdir(parents=True)
    content = {
        "settings": {"dataset": "photos", "model": "lenet", **settings},
        "rows": list(rows),
        "membership": list(membership),
    }
    (path / "leakage.json").write_text(json.dumps(content))
    if arrays:
        random = np.random.default_rng(0)
        originals = random.random((4, 3, side, side), dtype=np.float32)
        pictures = {"originals": originals}
        for row in rows:
            kind = "adaptive" if row["adaptive"] else "naive"
            noise = random.normal(0, 0.1, originals.shape).astype(np.float32)
            pictures[f"images/{row['attack']}/{row['defense']}/{kind}"] = originals + noise
        np.savez_compressed(path / "reconstructions.npz", **pictures)
    return path


def theft_row(attack="retrain the first layer", *, accuracy=0.8, alone=0.6, labels=10, **changes):
    return {
        "attack": attack,
        "labels": labels,
        "colluders": 1,
        "accuracy": accuracy,
        "accuracy_low": max(0.0, accuracy - 0.02),
        "accuracy_high": min(1.0, accuracy + 0.02),
        "alone": alone,
        "alone_low": alone,
        "alone_high": alone,
        "advantage": accuracy - alone,
        "advantage_low": accuracy - alone - 0.02,
        "advantage_high": accuracy - alone + 0.02,
        **changes,
    }


THEFT_ROWS = (
    theft_row(),
    theft_row("direct use", accuracy=0.5),
    theft_row(accuracy=0.9, alone=0.85, labels=100),
    theft_row(accuracy=0.91, alone=0.85, labels=100, colluders=5),
)


def make_theft(path: Path, rows=THEFT_ROWS, **settings) -> Path:
    path.mkdir(parents=True)
    content = {"settings": {"dataset": "mnist", **settings}, "rows": list(rows)}
    (path / "theft.json").write_text(json.dumps(content))
    return path


def frontier_row(defense="dct", strength=3.0, *, accuracy=0.6, identified=0.2, **changes):
    return {
        "defense": defense,
        "strength": strength,
        "attack": "ig",
        "adaptive": True,
        "accuracy": accuracy,
        "identified": identified,
        "psnr_original": 15.0,
        **changes,
    }


FRONTIER_ROWS = (
    frontier_row("none", None, accuracy=0.7, identified=0.98, adaptive=False),
    frontier_row(),
    frontier_row(identified=0.05, adaptive=False),
    frontier_row("jpeg", 10.0, accuracy=0.5, identified=0.4),
)


def make_frontier(path: Path, rows=FRONTIER_ROWS) -> Path:
    path.mkdir(parents=True)
    content = {"settings": {"dataset": "cifar10"}, "rows": list(rows)}
    (path / "frontier.json").write_text(json.dumps(content))
    return path


def egress_row(attack="lira", *, auc=0.7, found=0.1, **changes):
    low = None if found is None else max(0.0, found - 0.02)
    high = None if found is None else min(1.0, found + 0.02)
    return {
        "attack": attack,
        "auc": auc,
        "auc_low": auc - 0.03,
        "auc_high": min(1.0, auc + 0.03),
        "tpr_at_1": found,
        "tpr_at_1_low": low,
        "tpr_at_1_high": high,
        **changes,
    }


def make_egress(path: Path, rows=(), *, untold=(), **changes) -> Path:
    path.mkdir(parents=True)
    content = {
        "subject": "runs/a",
        "settings": {"images": 1000, "shadows": 4},
        "members": 1000,
        "others": 999,
        "accuracy_members": 0.99,
        "accuracy_others": 0.9,
        "rows": list(rows) or [egress_row("loss", auc=0.6, found=0.03), egress_row()],
        "exposed": [{"image": 7, "label": 3, "score": 9.5, "others_above": 0}],
        "untold": list(untold),
        **changes,
    }
    (path / "egress.json").write_text(json.dumps(content))
    return path


def sums_row(*, seen=True, auc=0.6, found=0.01, holder="100 clients", images=1400):
    row = egress_row("tracing", auc=auc, found=found)
    return {"holder": holder, "seen": seen, "images": images, **row}


def make_sums(
    path: Path,
    rows=(),
    *,
    subject="runs/a",
    rebuilt=(8, 1.0, 0.6, 0.9),
    forecast=0.01,
    allowed=None,
) -> Path:
    path.mkdir(parents=True)
    names = ("images", "from_one_client", "from_the_round", "floor")
    alone = sums_row(seen=False, auc=0.99, found=0.8, holder="one client", images=14)
    content = {
        "subject": subject,
        "settings": {"images": 2000, "rebuilt": 8},
        "dimension": 176,
        "epsilon": None,
        "public": 500,
        "strangers": 1000,
        "forecast": forecast and {"public": 1400, "auc": 0.6, "tpr_at_1": forecast},
        "allowed": allowed and {"auc": 0.6, "tpr_at_1": allowed},
        "rows": list(rows) or [sums_row(), alone],
        "rebuilt": dict(zip(names, rebuilt, strict=True)) if rebuilt else None,
        "untold": ["another map may <b>"],
    }
    (path / "sums.json").write_text(json.dumps(content))
    return path
