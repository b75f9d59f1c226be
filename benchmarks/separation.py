"""How many mixed images are parted: filters of a place together, beside differences one by one.

CIFAR-100 training images mixed at random, as the gradient of a first linear layer mixes a batch;
what a mixture is does not matter to either. The *cosine* is that of an image's true column of the
mixing to the nearest that was found; from 0.9 on sharpening finds the rest. Differences of
neighbouring pixels one by one, by FastICA, are what ``ica`` began with until 30 November.

    python benchmarks/separation.py --out docs/results
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from written import write_result

from fedveil.attacks.inversion.separation import separated
from fedveil.data import load_dataset

IMAGES = (128, 256, 384, 512)
_NEAR = 0.9
_MOST_SINGLY = 256  # images; it has failed there


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, nargs="+", default=list(IMAGES))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("cifar100", seed=arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    order = torch.randperm(len(data.train), generator=generator)
    rows: list[dict[str, Any]] = []
    for images in arguments.images:
        pixels = data.train[order[:images]].pixels.double()
        mixing = torch.randn(images, images, generator=generator, dtype=torch.float64)
        mixed = mixing @ pixels.flatten(1)
        for method in ("one by one", "together") if images <= _MOST_SINGLY else ("together",):
            begin = time.process_time()
            if method == "together":
                found = separated(mixed, data.shape, steps=200, seed=arguments.seed)
            else:
                found = singly(mixed.reshape(pixels.shape), arguments.seed)
            spent = time.process_time() - begin
            alike = F.normalize(found, dim=0).T @ F.normalize(mixing, dim=0)
            cosine = alike.abs().amax(dim=0)
            rows.append(
                {
                    "images": images,
                    "method": method,
                    "cosine": float(cosine.median()),
                    "above_09": float((cosine > _NEAR).double().mean()),
                    "cpu_seconds": spent,
                }
            )
            print(rows[-1], flush=True)
            write_result(arguments.out / "separation.json", arguments, rows=rows)


def singly(mixed: Tensor, seed: int) -> Tensor:
    """Return how images [r, C, H, W] are mixed, [r, r], by their neighbours' differences."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    analysis = FastICA(whiten="unit-variance", max_iter=200, tol=1e-4, random_state=seed)
    samples = [mixed.diff(dim=axis).flatten(1) for axis in (2, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        analysis.fit(torch.cat(samples, dim=1).T.numpy())
    return torch.from_numpy(analysis.mixing_)


if __name__ == "__main__":
    main()
