r"""Candidates picked out by membership attacks, against how many images are behind an update.

Real local training on the images of a round: minibatches, one epoch, weights on the wire. The model
is that of a run, since what an image's gradient tells depends on what the model has learnt:

    fedveil train --strategy fedavg --dataset cifar10 --model cnn --clients 10 --fraction 1 \
        --rounds 20 --learning-rate 0.05 --clip 20 --out RUN
    python benchmarks/membership.py --run RUN --out docs/results

After long local training on a model that nobody trained, as strategy ``protected`` asks for it:

    python benchmarks/membership.py --untrained cifar10 --model cnn --clients 2 --single \
        --epochs 30 --batch-size 20 --learning-rate 0.1 --images 500 --defense none --draws 5 \
        --name membership-returned --out docs/results

Images behind one update share its luck, so every row is measured on several updates, of other
images each, and its interval is Student's over these.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from written import write_result

from fedveil.attacks.membership import ATTACKS
from fedveil.audit.membership import Recognition, joined, picked_out
from fedveil.audit.settings import Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import Dataset, load_dataset
from fedveil.defenses import parse_defense
from fedveil.models import build_model
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory

SIZES = (16, 64, 256, 1024, 4096)
_SCORED = 1024  # of the images behind an update
DEFENSES = ("none", "dct:keep=10", "noise:ratio=3")


@dataclass(frozen=True)
class Sent:
    """The model that clients are sent, and how they train it.

    Attributes:
        config: Of the run it is from, or of one that would start with it.
        data: What clients hold.
        model: With its weights.
        epochs: Passes of a client over the images of a round.
    """

    config: TrainConfig
    data: Dataset
    model: nn.Module
    epochs: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Sent":
        """Return the model of a run, or an untrained one."""
        run = None if arguments.run is None else RunDirectory.open(arguments.run)
        if run is None:
            given = ("model", "clients", "batch_size", "learning_rate")
            named = {name: value for name in given if (value := getattr(arguments, name))}
            config = TrainConfig.check({"dataset": arguments.untrained, **named})
        else:
            config = run.config
        data = load_dataset(config.dataset, seed=config.seed)
        model = build_model(config.model, data.shape, len(data.classes), seed=0)
        if run is not None:
            model.load_state_dict(run.model())
        return cls(config, data, model, arguments.epochs)

    def watched(self, images: int, clients: int, updates: int, seed: int) -> WatchedFederation:
        """Return rounds to watch, of clients with so many images each, summed.

        They are fewer where a client has not images for so many.
        """
        own = len(self.data.train) // self.config.clients
        updates = max(1, min(updates, own // images))
        watching = Watching(
            clients=self.config.clients,
            victim=min(3, self.config.clients - 1),
            images=images * clients * updates,
            batch=images,
            aggregate=clients,
            update="fedavg",
            epochs=self.epochs,
            batch_size=self.config.batch_size,
            learning_rate=self.config.learning_rate,
            seed=seed,
            workers=1,
        )
        return WatchedFederation(self.data, self.model, watching)


def rows(
    sent: Sent,
    sizes: tuple[int, ...],
    clients: tuple[int, ...],
    defenses: list[str],
    draws: int,
    together: int,
    attacks: tuple[str, ...],
) -> Iterator[dict[str, Any]]:
    """Yield the rows, smallest rounds first."""
    for images, count, spec in itertools.product(sizes, clients, defenses):
        drawn = [
            picked(sent.watched(images, count, together, seed), spec, attacks)
            for seed in range(draws)
        ]
        for attack in attacks:
            found = [updates[attack] for updates in drawn if attack in updates]
            if found:
                yield {
                    "images": images,
                    "clients": count,
                    "defense": spec,
                    "attack": attack,
                    **summary(found),
                }


def picked(
    federation: WatchedFederation, spec: str, attacks: tuple[str, ...]
) -> dict[str, Recognition]:
    """Return what each attack that knows the defence recognises of the updates of one draw."""
    defense, used = parse_defense(spec), federation.ground_truth()
    informed, seed = federation.observe(defense), federation.watching.seed
    found = picked_out(
        *(defense, informed, federation.data, used),
        seed=seed,
        scored=_SCORED,
        attacks=attacks,
        naive=False,
    )
    return {one.attack: one for one in found if one.adaptive}


def summary(found: list[Recognition]) -> dict[str, Any]:
    """Return means over updates, with intervals over these."""
    (one,) = joined([(updates,) for updates in found])
    told = one.as_json()
    return {
        "picked_out": told["picked_out"],
        "picked_out_low": told["picked_out_low"],
        "picked_out_high": told["picked_out_high"],
        **one.strangers.roc().as_json(),
        "auc_unseen": None if one.unseen is None else one.unseen.roc().auc.value,
        "certain": told["certain"],
        "mistaken": told["mistaken"],
        "updates": one.picked.mean(dim=1).tolist(),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="whose model is sent")
    source.add_argument("--untrained", metavar="DATASET", help="send a model nobody trained")
    parser.add_argument("--model", help="with --untrained")
    parser.add_argument("--clients", type=int, help="with --untrained")
    parser.add_argument("--batch-size", type=int, help="with --untrained")
    parser.add_argument("--learning-rate", type=float, help="with --untrained")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--single", action="store_true", help="no sums of all clients")
    parser.add_argument("--images", type=int, nargs="+", default=SIZES)
    parser.add_argument("--defense", nargs="+", default=DEFENSES)
    parser.add_argument("--attack", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--draws", type=int, default=5, help="of images and strangers, for a row")
    parser.add_argument(
        "--together",
        type=int,
        default=1,
        help="updates against the same strangers, fewer where a client has not images for so many",
    )
    parser.add_argument("--name", default="membership", help="of the JSON file")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sent = Sent.of(arguments)
    found = []
    for row in rows(
        sent,
        tuple(arguments.images),
        (1,) if arguments.single else (1, sent.config.clients),
        arguments.defense,
        arguments.draws,
        arguments.together,
        tuple(arguments.attack),
    ):
        found.append(row)
        print(
            f"{row['clients']:3} clients, {row['images']:5} images each, {row['defense']:15}"
            f"{row['attack']:15}{row['picked_out']:7.1%} "
            f"[{row['picked_out_low']:.1%}, {row['picked_out_high']:.1%}]",
            flush=True,
        )
        # Whoever stops it keeps the rows there are.
        write_result(
            arguments.out / f"{arguments.name}.json",
            arguments,
            training=sent.config.model_dump(),
            rows=found,
        )


if __name__ == "__main__":
    main()
