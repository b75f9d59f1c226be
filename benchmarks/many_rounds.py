"""Membership told by one client's updates of many rounds, against the number of rounds.

An ordinary federation from an untrained model: every client trains on the same images in each round
and the model moves on. The server scores candidates in each round's updates of all clients, and
puts the rounds together, with and without the other clients to compare with.

    python benchmarks/many_rounds.py --out docs/results

Images of one client share its luck, so every row is of several federations, each with another
victim and other images, and its interval is Student's over these.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from written import write_result

from fedveil.attacks.membership import ATTACKS, ManyRounds
from fedveil.audit.metrics import Ranks, over_updates, recognised
from fedveil.audit.scoring import strangers_to
from fedveil.audit.settings import Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import load_dataset
from fedveil.defenses import Defense
from fedveil.models import build_model

_STRANGERS, _PUBLIC = 1_000, 512


def scores(dataset: str, watching: Watching, attacks: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield each attack's scores of the images used, then of strangers, [R, K, N + S]."""
    data = load_dataset(dataset, seed=0)
    model = build_model("cnn", data.shape, len(data.classes), seed=0)
    federation = WatchedFederation(data, model, watching)
    rounds, used = federation.follow(Defense("none")), federation.ground_truth()
    generator = torch.Generator().manual_seed(watching.seed)
    strangers = strangers_to(data.train, used, generator, most=_STRANGERS)
    candidates = data.train[torch.cat([used, strangers])]
    public = data.test[:_PUBLIC]
    for name in attacks:
        attack = ATTACKS[name]
        yield name, torch.stack([attack(one, candidates, public).double() for one in rounds])


def row(found: list[Tensor], images: int) -> dict[str, Any]:
    """Return the operating points of scores [N + S], a federation each."""
    own, others = (
        torch.stack(part) for part in zip(*((f[:images], f[images:]) for f in found), strict=True)
    )
    picked = torch.stack([recognised(a, b) for a, b in zip(own, others, strict=True)])
    share = over_updates(picked)
    return {
        **Ranks.of(own, others).roc().as_json(),
        "picked_out": share.value,
        "picked_out_low": share.low,
        "picked_out_high": share.high,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--images", type=int, default=256, help="of a client")
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--attack", nargs="+", default=["gradient", "span", "loss"])
    parser.add_argument("--draws", type=int, default=4, help="federations")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Tensor]] = {name: [] for name in arguments.attack}
    for seed in range(arguments.draws):
        watching = Watching(
            clients=10,
            victim=seed % 10,
            images=arguments.images,
            batch=arguments.images,
            update="fedavg",
            epochs=arguments.epochs,
            batch_size=10,
            learning_rate=0.05,
            repeats=max(arguments.rounds),
            seed=seed,
            workers=1,
        )
        for name, each in scores(arguments.dataset, watching, arguments.attack):
            found[name].append(each)
            print(seed, name, flush=True)
    rows = []
    for name, federations in found.items():
        for rounds in arguments.rounds:
            alone = [each[:rounds, 0].mean(0) for each in federations]
            together = [
                ManyRounds(base=ATTACKS[name]).combined([*each[:rounds]])[0] for each in federations
            ]
            for way, told in (("alone", alone), ("against others", together)):
                rows.append({"attack": name, "rounds": rounds, "scores": way})
                rows[-1] |= row(told, arguments.images)
                print(rows[-1], flush=True)
    write_result(arguments.out / "membership-many-rounds.json", arguments, rows=rows)


if __name__ == "__main__":
    main()
