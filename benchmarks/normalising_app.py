"""A Flower app that normalises its images, under a cap of 60 %: is it refused, or is the cap held?

Ten seeds of the app in tests/federation/normalising_app.py, three rounds each on real worker
processes: once with raw calibration images, as fedveil once took in silence and sent copies of 76
to 92 %, and once with the app's own. Every copy that was sent is evaluated as the app does it, on
images that neither the cap nor a client had.

    python benchmarks/normalising_app.py --seeds 10 --out docs/results
"""

import argparse
import sys
from pathlib import Path

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from torch.utils.data import TensorDataset
from written import write_result

from fedveil.data import Images
from fedveil.errors import FedveilError
from fedveil.federation import Cap, NoiseDelta
from fedveil.federation.engines.local import LocalGrid

PLACE = Path(__file__).parents[1] / "tests/federation"
CAP, ROUNDS = 0.6, 3


def outcome(grid: Grid, cap: Cap, seed: int) -> dict[str, object]:
    """Run the app once; return what became of it and the best copy that was sent."""
    import normalising_app as app

    torch.manual_seed(seed)
    net, sent, told = app.Net(), [], app.held_out(app.normalised(), 1)

    def accuracy(_: int, arrays: ArrayRecord) -> MetricRecord:
        right = app.right(arrays.to_torch_state_dict(), told)
        return MetricRecord({"accuracy": right / len(told[1])})

    strategy = NoiseDelta(model=net, cap=cap)
    strategy.started = lambda *_: sent.extend(strategy.sent.copies if strategy.sent else ())
    refused = None
    try:
        weights = ArrayRecord(net.state_dict())
        strategy.start(grid, weights, num_rounds=ROUNDS, evaluate_fn=accuracy)
    except FedveilError as error:
        refused = str(error)
    best = max((app.right(copy, told) / len(told[1]) for copy in sent), default=None)
    return {"seed": seed, "refused": refused, "best_copy": best, "copies": len(sent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sys.path.insert(0, str(PLACE))
    import normalising_app as app

    pixels, labels = app.held_out(app.raw(), 0)
    caps = {
        "raw images": Cap(CAP, Images((pixels * 255).to(torch.uint8), labels)),
        "the app's own images": Cap(CAP, TensorDataset(*app.held_out(app.normalised(), 0))),
    }
    with LocalGrid("normalising_app:app", nodes=2, workers=1) as grid:
        rows = [
            {"calibrated_on": name, **outcome(grid, cap, seed)}
            for name, cap in caps.items()
            for seed in range(options.seeds)
        ]
    for name in caps:
        own = [row for row in rows if row["calibrated_on"] == name]
        refused = sum(row["refused"] is not None for row in own)
        over = sum(row["best_copy"] is not None and row["best_copy"] >= CAP for row in own)
        best = max(row["best_copy"] or 0.0 for row in own)
        print(f"{name}: {refused} of {len(own)} refused, {over} over the cap, best {best:.1%}")
    path = options.out / "normalising-app.json"
    write_result(path, options, cap=CAP, rounds=ROUNDS, rows=rows)


if __name__ == "__main__":
    main()
