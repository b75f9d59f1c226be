"""How much worse the server's labelled images are told where mirror images are taken for alike.

By it a run without --mirrored chooses; the threshold was chosen between these data sets, on folds
of their training images, which no table reports on.

    FEDVEIL_DATA=... python benchmarks/mirroring.py --out docs/results
"""

import argparse
from pathlib import Path

import torch
from written import write_result

from fedveil.data import load_dataset
from fedveil.federation.feature_choice import MIRRORED_ERROR, mirroring_error
from fedveil.federation.server_app import split_test

_FOLDS = (
    *("mnist@1/12", "mnist@2/12", "mnist@6/12", "digits@1/4"),
    *("cifar10@1/6", "cifar10@3/6", "photos@1/4"),
)
_MOST = 2_000


def main() -> None:
    """Measure and print, and with --out keep, the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in _FOLDS:
        found = []
        for seed in range(arguments.seeds):
            own = split_test(load_dataset(name, seed=seed).test, _MOST, seed=seed).calibration
            found.append(mirroring_error(own, seed=seed))
        rows.append({"dataset": name, "images": len(own), "times": found})
        print(rows[-1], flush=True)
    if arguments.out:
        write_result(arguments.out / "mirroring.json", arguments, most=MIRRORED_ERROR, rows=rows)


if __name__ == "__main__":
    main()
