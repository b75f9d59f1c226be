r"""What a client makes of its copies under ``noise-delta`` with no label at all, and with a few.

Runs of three seeds, trained with the strategy's defaults (fingerprints and archive on):

    for s in 0 1 2; do
    fedveil train --dataset mnist --model cnn --clients 100 --fraction 0.1 --rounds 20 \
        --learning-rate 0.1 --clip 20 --strategy noise-delta --cap 0.6 --seed $s --out runs/delta$s
    done
    python benchmarks/zero_labels.py --run runs/delta0 --run runs/delta1 --run runs/delta2 \
        --labels 0 --colluders 1,2 --thieves 4 --work DIR --out docs/results

Thieves of one run share its model, so the interval of each row is Student's over runs.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from written import write_result

from fedveil.audit.metrics import over_updates
from fedveil.audit.settings import TheftSettings
from fedveil.audit.theft import OWNER, THIEF, TheftReport, run_theft_audit
from fedveil.runs.directory import RunDirectory

ROWS = ("direct", "cluster", "every + cluster", "colluding + cluster", THIEF, OWNER)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, action="append", required=True)
    parser.add_argument("--labels", default="0")
    parser.add_argument("--colluders", default="1,2")
    parser.add_argument("--thieves", type=int, default=4)
    parser.add_argument("--work", type=Path, required=True, help="where thieves are kept")
    parser.add_argument("--name", default="theft-zero-labels", help="of the JSON file")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    labels, colluders = (
        tuple(map(int, text.split(","))) for text in (arguments.labels, arguments.colluders)
    )
    reports = [
        run_theft_audit(
            TheftSettings(run=run, labels=labels, colluders=colluders, thieves=arguments.thieves),
            out=arguments.work / run.name,
            workers=1,
        )
        for run in arguments.run
    ]
    rows = [
        row(reports, name, count, together)
        for count in labels
        for together in colluders
        for name in ROWS
        if all(has(report, name, count, together) for report in reports)
    ]
    for one in rows:
        print(
            f"{one['labels']:4} {one['colluders']} {one['attack']:28}{one['accuracy']:7.1%} "
            f"[{one['accuracy_low']:.1%}, {one['accuracy_high']:.1%}] alone {one['alone']:.1%}, "
            f"over the cap {one['over_cap']} of {len(one['accuracies'])}"
        )
    write_result(
        arguments.out / f"{arguments.name}.json",
        arguments,
        training=[RunDirectory.open(run).config.model_dump() for run in arguments.run],
        delivered=[report.reference for report in reports],
        rows=rows,
    )


def has(report: TheftReport, name: str, labels: int, colluders: int) -> bool:
    """Say whether every thief of a run tried an attack."""
    return name in {
        row["attack"]
        for row in report.rows()
        if (row["labels"], row["colluders"]) == (labels, colluders)
    }


def row(reports: list[TheftReport], name: str, labels: int, colluders: int) -> dict[str, Any]:
    """Return one row over runs."""
    arms = [
        theft.attempts
        for report in reports
        for theft in report.thefts
        if (theft.thief.labels, theft.thief.colluders) == (labels, colluders)
    ]
    if name == THIEF:
        single = [max(arm, key=lambda attempt: attempt.held_out).accuracy for arm in arms]
    else:
        single = [one.accuracy for arm in arms for one in arm if one.attack == name]
    found = [report.row(name, labels, colluders) for report in reports]
    told: dict[str, Any] = {"labels": labels, "colluders": colluders, "attack": name}
    for column in ("accuracy", "alone"):
        means = torch.tensor([one[column] for one in found], dtype=torch.float64)
        interval = over_updates(means[:, None].repeat(1, 2))
        told |= {
            column: interval.value,
            f"{column}_low": interval.low,
            f"{column}_high": interval.high,
        }
    told["advantage"] = told["accuracy"] - told["alone"]
    return told | {"accuracies": single, "over_cap": sum(value > 0.6 for value in single)}


if __name__ == "__main__":
    main()
