"""What a federation in closed form costs beside FedAvg, and its pieces beside their floor.

    python benchmarks/analytic_cost.py --out docs/results

In one run: a client's processor time and bytes until w is as good as FedAvg's after 20 rounds
(CIFAR-10, 100 clients × 500 images); dictionary features beside plain PyTorch and beside
scikit-learn's patches with numpy; the sums beside the matrix product in them; and whole runs with
more and more clients, with the memory of the largest of their processes. Quote the ratios.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",
}

import numpy as np
import torch
from sklearn.feature_extraction.image import extract_patches_2d
from timed import cpu_seconds
from torch import Tensor
from torch.nn import functional as F
from written import write_result

from fedveil import train
from fedveil.analytic import Layout, Statistics, rows_of
from fedveil.data import Images, load_dataset
from fedveil.features import Dictionary, default_options, features_of, learn_dictionary
from fedveil.federation.training import LocalTraining, train_locally
from fedveil.models import build_model

FILTERS = 32
REPEATS = 5


def plain_features(dictionary: Dictionary, pixels: Tensor) -> Tensor:
    """Return the same features as a convolution of normalised patches would be written."""
    how = dictionary.settings
    patches = F.unfold(pixels, how.patch, stride=how.stride).transpose(1, 2)
    patches = patches - patches.mean(-1, keepdim=True)
    patches = patches / (patches.square().mean(-1, keepdim=True) + 10 / 255**2).sqrt()
    values = patches @ dictionary.filters.T - dictionary.offset
    side = (pixels.shape[-1] - how.patch) // how.stride + 1
    both = torch.cat([F.relu(values - how.threshold), F.relu(-values - how.threshold)], -1)
    maps = both.transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(maps, how.pool).flatten(1)


def scikit_features(dictionary: Dictionary, pixels: Tensor) -> list[np.ndarray]:
    """Return one image's rectified products after another, by scikit-learn's patches and numpy."""
    how, found = dictionary.settings, []
    for image in pixels.permute(0, 2, 3, 1).numpy():
        patches = extract_patches_2d(image, (how.patch, how.patch))
        flat = patches.transpose(0, 3, 1, 2).reshape(len(patches), -1)
        flat = flat - flat.mean(1, keepdims=True)
        flat = flat / np.sqrt(np.square(flat).mean(1, keepdims=True) + 10 / 255**2)
        values = flat @ dictionary.filters.numpy().T - dictionary.offset.numpy()
        both = np.concatenate(
            [np.maximum(values - how.threshold, 0), np.maximum(-values - how.threshold, 0)], 1
        )
        side = int(np.sqrt(len(patches)))
        cells = both.reshape(side, side, -1)
        half = -(-side // 2)
        parts = [
            cells[r : r + half, c : c + half].mean((0, 1))
            for r in (0, side - half)
            for c in (0, side - half)
        ]
        found.append(np.concatenate(parts))
    return found


def features_row(pixels: Tensor) -> dict[str, Any]:
    """Return what 100 images' features cost, three ways."""
    images = pixels.float().div(255)
    options = default_options((3, 32, 32), 128, mirrored=False)
    dictionary = learn_dictionary(pixels, options, seed=0)
    some = images[:100]
    ours = cpu_seconds(lambda: features_of(dictionary, some), REPEATS)
    plain = cpu_seconds(lambda: plain_features(dictionary, some), REPEATS)
    scikit = cpu_seconds(lambda: scikit_features(dictionary, some), REPEATS)
    return {
        "filters": options.filters,
        "images": len(some),
        "cpu_seconds": ours,
        "plain_torch_times": plain / ours,
        "scikit_learn_times": scikit / ours,
    }


def sums_row(dimension: int) -> dict[str, Any]:
    """Return what a client's sums cost beside half a matrix product."""
    rows = torch.randint(-300, 300, (2_000, dimension), dtype=torch.int16)
    labels = torch.randint(10, (len(rows),))
    doubles = rows.double()
    ours = cpu_seconds(lambda: Statistics.of(rows, labels, classes=10), REPEATS)
    floor = cpu_seconds(lambda: doubles.T @ doubles, REPEATS) / 2
    row = {"features": dimension, "images": len(rows), "cpu_seconds": ours}
    return row | {"times_half_a_product": ours / floor}


def to_the_same_accuracy(client: Images, out: Path, rounds: int) -> dict[str, Any]:
    """Return what all clients together spend until w is as good as FedAvg's."""
    common = {"dataset": "cifar10", "secure_aggregation": False, "seed": 0}
    averaged = train(
        out / "fedavg", **common, strategy="fedavg", rounds=rounds, archive=False, clip=5.0
    )
    closed = train(out / "closed", **common, filters=FILTERS)
    model = build_model("cnn", (3, 32, 32), 10, seed=0)
    size = 4 * sum(value.numel() for value in model.state_dict().values())
    options = default_options((3, 32, 32), FILTERS, mirrored=True)
    dictionary = learn_dictionary(client.raw, options, seed=0)
    steps = LocalTraining(epochs=1, batch_size=10, learning_rate=0.05, clip=5.0)
    generator = torch.Generator().manual_seed(0)
    epoch = cpu_seconds(lambda: train_locally(model, client, steps, generator=generator), REPEATS)
    sums = cpu_seconds(
        lambda: Statistics.of(rows_of(dictionary, client.raw), client.labels, classes=10),
        REPEATS,
    )
    layout, tensors = Layout(options.dimension, 10), dictionary.sent().values()
    told = sum(4 * value.numel() for value in tensors)
    trainings = rounds * 10
    return {
        "rounds": rounds,
        "fedavg_accuracy": averaged["accuracy"],
        "closed_accuracy": closed["accuracy"],
        "fedavg_client_seconds": trainings * epoch,
        "closed_client_seconds": 100 * sums,
        "times_less_client_time": trainings * epoch / (100 * sums),
        "fedavg_bytes": 2 * trainings * size,
        "closed_bytes": 100 * (8 * layout.length + told),
        "times_fewer_bytes": 2 * trainings * size / (100 * (8 * layout.length + told)),
    }


def many_clients(clients: int, out: Path) -> dict[str, Any]:
    """Return the wall time and memory of a whole run on MNIST, in processes of its own."""
    run = (
        "import resource, sys; from fedveil import train; from pathlib import Path; "
        f"train(Path(sys.argv[1]), dataset='mnist', clients={clients}, filters=16, fraction=1.0, "
        "secure_aggregation=False, workers=2, archive=False); "
        "print([resource.getrusage(who).ru_maxrss for who in "
        "(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)])"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", run, str(out / f"many-{clients}")],
        check=True,
        capture_output=True,
        text=True,
    )
    own, children = json.loads(done.stdout.strip().splitlines()[-1])
    summary = json.loads((out / f"many-{clients}" / "summary.json").read_text())
    return {
        "clients": clients,
        "seconds": time.monotonic() - begin,
        "server_megabytes": own / 1024,
        "worker_megabytes": children / 1024,
        "accuracy": summary["accuracy"],
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    data = load_dataset("cifar10", seed=0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        found = {
            "features": features_row(data.test.raw[:2_000]),
            "sums": [sums_row(dimension) for dimension in (256, 1_280, 4_096)],
        }
        print(json.dumps(found), flush=True)
        found["many_clients"] = [many_clients(clients, out) for clients in arguments.clients]
        print(json.dumps(found["many_clients"]), flush=True)
        found["to_the_same_accuracy"] = to_the_same_accuracy(
            data.train[:500], out, arguments.rounds
        )
        print(json.dumps(found["to_the_same_accuracy"]), flush=True)
    write_result(arguments.out / "analytic-cost.json", arguments, **found)


if __name__ == "__main__":
    main()
