"""What one round of sums gives: every data set, three seeds, as ``fedveil train`` runs it.

    python benchmarks/analytic.py --runs RUNS --out docs/results

Runs are kept under RUNS, and one that is there already is read instead of trained again, as is a
row of the result that is to be written. w is the same to the bit with and without secure
aggregation, which costs the larger ones minutes, so they leave it out here.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fedveil import train

sys.path.insert(0, str(Path(__file__).parent))
from written import write_result

SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"dataset": "digits"},
    "photos": {"dataset": "photos"},
    "mnist": {"dataset": "mnist", "secure_aggregation": False},
    "cifar10": {"dataset": "cifar10", "secure_aggregation": False, "filters": 780},
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = arguments.out / "analytic-runs.json"
    kept = json.loads(result.read_text())["rows"] if result.exists() else []
    there = {(row["dataset"], row["seed"]): row for row in kept}
    rows = []
    for name, settings in SETTINGS.items():
        for seed in range(arguments.seeds):
            run = arguments.runs / f"{name}-{seed}"
            rows.append(there.get((name, seed)) or row(run, {**settings, "seed": seed}))
            print(rows[-1], flush=True)
    write_result(result, arguments, rows=rows)


def row(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a run came to; it is trained unless it is there."""
    if not (path / "summary.json").exists():
        train(path, **settings)
    summary = json.loads((path / "summary.json").read_text())
    sums, config = summary["analytic"], summary["configuration"]
    return {
        **settings,
        "secure_aggregation": config["secure_aggregation"],
        "accuracy": summary["accuracy"],
        "report_images": summary["report_images"],
        "images": sums["images"],
        "clients": sums["clients"],
        "features": sums["dimension"],
        "images_per_feature": sums["images_per_feature"],
        "answer_bytes": sums["answer_bytes"],
        "penalty": sums["penalty"],
        "seconds": summary["seconds"],
    }


if __name__ == "__main__":
    main()
