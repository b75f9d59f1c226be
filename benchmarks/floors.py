"""What images without content reach in an identification among 100, whatever the batch.

Unrelated training photographs, blurred noise and a mean image stand in for reconstructions of 1,280
CIFAR-10 images. ``matched`` is the scorer of fedveil until issue 17, which assigned each batch to
its originals by least squared error, by the truth, before it looked for the nearest of 100
candidates; ``now`` is ``fedveil.audit.metrics.identified``, which matches nothing. No model and no
attack take part.

    FEDVEIL_DATA=... python benchmarks/floors.py --out docs/results
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from written import write_result

from fedveil.audit.metrics import CANDIDATES, identified, match, over_updates
from fedveil.audit.scoring import Scorer
from fedveil.data import load_dataset

BATCHES = (1, 16, 64, 160, 256)
KINDS = ("photographs", "blurred noise", "mean image")
IMAGES = 1280


def matched(found: Tensor, originals: Tensor, strangers: Tensor) -> Tensor:
    """Return what the earlier scorer called identified, float64 [V·N] of 0 and 1."""
    batches = originals.split(found.shape[1])
    images = torch.cat([match(f, own) for f, own in zip(found, batches, strict=True)])
    candidates = torch.cat([originals, strangers])
    distances = torch.cdist(images.double().flatten(1), candidates.double().flatten(1))
    turns = (torch.arange(len(originals))[:, None] + torch.arange(CANDIDATES)) % len(candidates)
    return (distances.gather(1, turns).argmin(dim=1) == 0).double()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = load_dataset(arguments.dataset, seed=arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    used = torch.randperm(len(data.train), generator=generator)[:IMAGES]
    scorer = Scorer.of(data, used, None, arguments.seed)
    originals, rows = scorer.victims.pixels, []
    for batch in BATCHES:
        for kind, (images, _) in zip(
            KINDS, scorer.content_free(IMAGES // batch, batch, generator, knows=False), strict=True
        ):
            row = {"batch": batch, "kind": kind, "images": IMAGES, "updates": IMAGES // batch}
            for name, scores in (
                ("matched", matched(images, originals, scorer.strangers)),
                ("now", identified(images, originals, scorer.strangers)),
            ):
                told = over_updates(scores.view(-1, batch))
                row |= {name: told.value, f"{name}_low": told.low, f"{name}_high": told.high}
            rows.append(row)
            print(f"{batch:4} {kind:15} {row['matched']:6.1%} {row['now']:6.1%}", flush=True)
    write_result(arguments.out / "floors.json", arguments, seed=arguments.seed, rows=rows)


if __name__ == "__main__":
    main()
