"""Where ``noise-delta`` puts its noise, what that costs w, and what a thief makes of a copy.

Every pattern gets the same cap and the same search: of two limits of a client's gradient the one
whose w is better on the calibration images of another seed. Then it is trained with three seeds,
and a thief of each run attacks with no label and with some; two of no label collude.

    python benchmarks/noise_patterns.py --work DIR --out docs/results

What is in DIR already is not done again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from written import write_result

from fedveil import api
from fedveil.audit.settings import TheftSettings
from fedveil.audit.theft import THIEF, Attempt, Theft, TheftReport, run_theft_audit

PATTERNS = {
    "output": "the head alone (the default)",
    "first-conv": "the first layer alone",
    "hidden.*": "the last hidden layer",
    "hidden.*,output.*": "the last hidden layer and the head",
    "all": "all layers",
}
TRAINING: dict[str, Any] = {
    "dataset": "digits",
    "model": "cnn",
    "clients": 10,
    "fraction": 0.5,
    "rounds": 30,
    "epochs": 2,
    "learning_rate": 0.1,
    "workers": 1,
}
CAP = 0.6
CLIPS = (20.0, 1.0)
CHOSEN_ON = 100  # seed
SEEDS = (0, 1, 2)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where runs and thieves are kept")
    parser.add_argument("--labels", default="0,10")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, labels = arguments.work, tuple(map(int, arguments.labels.split(",")))
    plain = [trained(work, None, CLIPS[0], seed) for seed in SEEDS]
    rows = [told(work, pattern, labels) for pattern in PATTERNS]
    for row in rows:
        print(
            json.dumps({key: value for key, value in row.items() if key != "thieves"}),
            *map(json.dumps, row["thieves"]),
            sep="\n  ",
        )
    write_result(
        arguments.out / "noise-patterns.json",
        arguments,
        training=TRAINING | {"strategy": "noise-delta", "cap": CAP, "clips": CLIPS},
        seeds=SEEDS,
        chosen_on_seed=CHOSEN_ON,
        fedavg=mean([summary(run)["accuracy"] for run in plain]),
        rows=rows,
    )


def trained(work: Path, pattern: str | None, clip: float, seed: int) -> Path:
    """Return the directory of a run; without a pattern it is plain averaging's."""
    place = "fedavg" if pattern is None else "".join(c if c.isalnum() else "-" for c in pattern)
    run = work / f"{place}-{clip:g}-{seed}"
    if not (run / "summary.json").exists():
        kept = {"strategy": "fedavg"}
        if pattern is not None:
            kept = {"strategy": "noise-delta", "noise": pattern, "cap": CAP}
        api.train(run, **TRAINING, **kept, clip=clip, seed=seed)
    return run


def summary(run: Path) -> dict[str, Any]:
    """Return what a run says of itself."""
    content: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return content


def rounds(run: Path) -> list[dict[str, Any]]:
    """Return what each round told."""
    lines = (run / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def seen_by_owner(run: Path) -> float:
    """Return the best round's accuracy on the calibration images."""
    return max(float(one["calibration"]) for one in rounds(run))


def told(work: Path, pattern: str, labels: tuple[int, ...]) -> dict[str, Any]:
    """Return a pattern's row."""
    clip = max(CLIPS, key=lambda clip: seen_by_owner(trained(work, pattern, clip, CHOSEN_ON)))
    runs = [trained(work, pattern, clip, seed) for seed in SEEDS]
    found = [summary(run) for run in runs]
    reports = [[audited(run, work, labels, 1), audited(run, work, (0,), 2)] for run in runs]
    return {
        "pattern": pattern,
        "where": PATTERNS[pattern],
        "clip": clip,
        "w": mean([one["accuracy"] for one in found]),
        "as_received": mean([one["copies_max"] for one in found]),
        "over_cap": sum(one["rounds_over_cap"] for one in found),
        "sigma": mean([rounds(run)[-1]["sigma"] for run in runs]),
        "thieves": [
            thieves([pair[colluders - 1] for pair in reports], count, colluders)
            for count, colluders in (*((count, 1) for count in labels), (0, 2))
        ],
    }


def audited(run: Path, work: Path, labels: tuple[int, ...], colluders: int) -> TheftReport:
    """Return what a thief, or several together, make of a run's copies."""
    settings = TheftSettings(run=run, labels=labels, colluders=(colluders,), thieves=1)
    return run_theft_audit(settings, out=work / f"theft-{run.name}-{colluders}", workers=1)


def thieves(reports: list[TheftReport], labels: int, colluders: int) -> dict[str, Any]:
    """Return the best attack by the owner's view, the thief's own choice, and training alone."""
    thefts = [one for report in reports for one in report.thefts if one.thief.labels == labels]
    name, best = strongest([theft.attempts for theft in thefts])
    chosen = [report.row(THIEF, labels, colluders)["accuracy"] for report in reports]
    _, alone = strongest([theft.alone for theft in thefts])
    return {
        "labels": labels,
        "colluders": colluders,
        "best": name,
        "accuracy": mean(best),
        "chosen_by_thief": mean(chosen),
        "alone": mean(alone),
        "by_attack": by_attack(thefts),
    }


def strongest(arms: list[tuple[Attempt, ...]]) -> tuple[str, list[float]]:
    """Return the attack that all tried whose mean accuracy is the greatest, and its accuracies."""
    common = set.intersection(*({one.attack for one in arm} for arm in arms))
    found = {
        name: [next(one.accuracy for one in arm if one.attack == name) for arm in arms]
        for name in sorted(common)
    }
    return max(found.items(), key=lambda item: sum(item[1]))


def by_attack(thefts: list[Theft]) -> dict[str, float]:
    """Return each attack's mean accuracy over the thieves that tried it."""
    tried: dict[str, list[float]] = {}
    for theft in thefts:
        for one in theft.attempts:
            tried.setdefault(one.attack, []).append(one.accuracy)
    return {name: sum(values) / len(values) for name, values in tried.items()}


def mean(values: list[float]) -> dict[str, Any]:
    """Return the mean over seeds, and the least and the most."""
    return {"mean": sum(values) / len(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    main()
