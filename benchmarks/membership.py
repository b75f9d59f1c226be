r"""Candidates picked out by membership attacks, against how many images are behind an update.

Real local training on the images of a round: minibatches, one epoch, weights on the wire. The model
is that of a run, since what an image's gradient tells depends on what the model has learnt:

    fedveil train --strategy fedavg --dataset cifar10 --model cnn --clients 10 --fraction 1 \
        --rounds 20 --learning-rate 0.05 --clip 20 --out RUN
    python benchmarks/membership.py --run RUN --out docs/results

Images behind one update share its luck, so every row is measured on several updates, of other
images each, and its interval is Student's over these.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from written import write_result

from fedveil.attacks.membership import ATTACKS
from fedveil.audit.membership import Recognition, joined, picked_out
from fedveil.audit.watch import WatchedFederation, Watching
from fedveil.data import Dataset, load_dataset
from fedveil.defenses import parse_defense
from fedveil.models import build_model
from fedveil.runs.directory import RunDirectory

SIZES = (16, 64, 256, 1024, 4096)
_SCORED = 1024  # of the images behind an update
DEFENSES = ("none", "dct:keep=10", "noise:ratio=3")


def watching(run: RunDirectory, images: int, clients: int, seed: int) -> Watching:
    """Return what is watched for one row: a round of ``clients`` with ``images`` each, summed."""
    config = run.config
    return Watching(
        clients=config.clients,
        victim=3,
        images=images * clients,
        batch=images,
        aggregate=clients,
        update="fedavg",
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=seed,
        workers=1,
    )


def rows(
    run: RunDirectory,
    data: Dataset,
    sizes: tuple[int, ...],
    defenses: list[str],
    draws: int,
    attacks: tuple[str, ...],
) -> Iterator[dict[str, Any]]:
    """Yield the rows, smallest rounds first."""
    model = build_model(run.config.model, data.shape, len(data.classes), seed=0)
    model.load_state_dict(run.model())
    for images in sizes:
        for clients in (1, run.config.clients):
            for spec in defenses:
                updates = [
                    picked(WatchedFederation(data, model, watched), spec, attacks)
                    for seed in range(draws)
                    for watched in [watching(run, images, clients, seed)]
                ]
                for attack in attacks:
                    found = [update[attack] for update in updates if attack in update]
                    if found:
                        yield {
                            "images": images,
                            "clients": clients,
                            "defense": spec,
                            "attack": attack,
                            **summary(found),
                        }


def picked(
    federation: WatchedFederation, spec: str, attacks: tuple[str, ...]
) -> dict[str, Recognition]:
    """Return what each attack that knows the defence recognises of one update."""
    defense, used = parse_defense(spec), federation.ground_truth()
    informed, seed = federation.observe(defense), federation.watching.seed
    found = picked_out(
        defense, informed, federation.data, used, seed=seed, scored=_SCORED, attacks=attacks
    )
    return {one.attack: one for one in found if one.adaptive}


def summary(found: list[Recognition]) -> dict[str, Any]:
    """Return means over updates, with intervals over these."""
    (one,) = joined([(update,) for update in found])
    told = one.as_json()
    return {
        "recognised": told["picked_out"],
        "recognised_low": told["picked_out_low"],
        "recognised_high": told["picked_out_high"],
        **one.strangers.roc().as_json(),
        "auc_unseen": None if one.unseen is None else one.unseen.roc().auc.value,
        "certain": told["certain"],
        "mistaken": told["mistaken"],
        "updates": [float(update.picked.mean()) for update in found],
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=SIZES)
    parser.add_argument("--defense", nargs="+", default=DEFENSES)
    parser.add_argument("--attack", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--draws", type=int, default=5, help="updates behind a row")
    parser.add_argument("--name", default="membership", help="of the JSON file")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = RunDirectory.open(arguments.run)
    data = load_dataset(run.config.dataset, seed=run.config.seed)
    found = []
    for row in rows(
        run,
        data,
        tuple(arguments.images),
        arguments.defense,
        arguments.draws,
        tuple(arguments.attack),
    ):
        found.append(row)
        print(
            f"{row['clients']:3} clients, {row['images']:5} images each, {row['defense']:15}"
            f"{row['attack']:15}{row['recognised']:7.1%} "
            f"[{row['recognised_low']:.1%}, {row['recognised_high']:.1%}]",
            flush=True,
        )
    write_result(
        arguments.out / f"{arguments.name}.json",
        " ".join(["python benchmarks/membership.py --run RUN", *_options(arguments)]),
        training=run.config.model_dump(),
        rows=found,
    )


def _options(arguments: argparse.Namespace) -> list[str]:
    sizes = " ".join(map(str, arguments.images))
    defenses = " ".join(arguments.defense)
    attacks = " ".join(arguments.attack)
    return [
        f"--images {sizes}",
        f"--defense {defenses}",
        f"--attack {attacks}",
        f"--draws {arguments.draws}",
        f"--name {arguments.name}",
        "--out DIR",
    ]


if __name__ == "__main__":
    main()
