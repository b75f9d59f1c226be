"""What a network of the user's scores that w was taught to, beside w, as ``fedveil train`` runs it.

    python benchmarks/analytic_distilled.py --runs RUNS --out docs/results

``--distil-into cnn``, three seeds. Runs are kept under RUNS, and one that is there is read instead.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from written import write_result

from fedveil import train

DATASETS = ("digits", "photos")


def row(path: Path, dataset: str, seed: int) -> dict[str, Any]:
    """Return what a run came to; it is trained unless it is there."""
    if not (path / "summary.json").exists():
        train(path, dataset=dataset, seed=seed, distil_into="cnn", secure_aggregation=False)
    summary = json.loads((path / "summary.json").read_text())
    taught = summary["analytic"]["distilled"]
    return {
        "dataset": dataset,
        "seed": seed,
        "images": taught["images"],
        "accuracy": summary["accuracy"],
        "distilled": taught["accuracy"],
        "report_images": summary["report_images"],
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for dataset in DATASETS:
        for seed in range(arguments.seeds):
            rows.append(row(arguments.runs / f"{dataset}-{seed}", dataset, seed))
            print(rows[-1], flush=True)
    write_result(arguments.out / "analytic-distilled.json", arguments, rows=rows)


if __name__ == "__main__":
    main()
