"""What a server makes of clients' images from what these answer about its own: paired logits.

    python benchmarks/paired_logits.py --out docs/results
    python benchmarks/paired_logits.py --together 10 --out docs/results

Takahashi, Liu and Liu, "Breaching FedMD: Image Recovery via Paired-Logits Inversion Attack", CVPR
2023: the server learns to turn what a client and what the server's own model say of an image into
the image, on its own images, and asks for the image of which the client is sure and the server is
less so. The server has labels, and sees each client alone, or the mean of what ten answer, which is
all that secure aggregation leaves it.

Digits, clients of 14 images that train as strategy ``protected`` has them train: of each seed ten
that are seen alone, and five sums of ten. Twice: the server's images are of all classes; or they
lack the class that is asked for. A picture is scored by its correlation with the nearest of the
images of the class that are behind the answers; the floor is the same picture with the nearest of
as many images of the class that nobody has, and the mean of the server's images of the class is
scored beside it. Pictures of the same answers come of one network, so the interval is Student's
over clients, or over sums; those of a seed share the server's images and its model.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from answer_membership import ALONE, untrained
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from written import write_result

from fedveil.data import Dataset, Images, load_dataset, parse_partition
from fedveil.data.partition import partition
from fedveil.federation.answers import logits_of
from fedveil.federation.training import train_locally

SHARES, STEPS, SURE = 100, 800, 3
SEEN = {1: 10, 10: 5}  # so many of clients together
GAPS = (0.0, 1.0, 2.0)


def trained(data: Dataset, own: Images, seed: int) -> dict[str, Tensor]:
    """Return the state of a model that somebody trained alone."""
    model = untrained(data)
    train_locally(model, own, ALONE, generator=torch.Generator().manual_seed(seed))
    return {name: value.clone() for name, value in model.state_dict().items()}


def said(data: Dataset, states: Sequence[dict[str, Tensor]], asked: Tensor) -> Tensor:
    """Return the log of what models say of images on average, [Q, K], no lower than -12."""
    told = [logits_of(untrained(data), state, asked).log_softmax(1) for state in states]
    return (torch.stack(told).logsumexp(0) - math.log(len(told))).clamp(min=-12.0)


def inverted(client: Tensor, server: Tensor, images: Tensor, seed: int) -> nn.Module:
    """Return a network from pairs of log-probabilities [Q, 2K] to images [Q, P]."""
    torch.manual_seed(seed)
    pairs = torch.cat([client, server], 1)
    network = nn.Sequential(nn.Linear(pairs.shape[1], 128), nn.ReLU(), nn.Linear(128, 128))
    network.extend([nn.ReLU(), nn.Linear(128, images.shape[1]), nn.Sigmoid()])
    optimiser = torch.optim.Adam(network.parameters(), 2e-3, weight_decay=1e-4)
    for _ in range(STEPS):
        index = torch.randint(len(images), (64,))
        noisy = pairs[index] + 0.1 * torch.randn(64, pairs.shape[1])
        optimiser.zero_grad()
        F.mse_loss(network(noisy), images[index]).backward()
        optimiser.step()
    return network.eval()


def nearest(picture: Tensor, images: Tensor) -> float:
    """Return the correlation of a picture [P] with the nearest of some images [N, P]."""
    rows = torch.cat([picture[None], images]).double()
    return float(torch.corrcoef(rows)[0, 1:].max())


def attacked(data: Dataset, seed: int, together: int, *, lacking: bool) -> Iterator[dict[str, Any]]:
    """Yield how near pictures come to the images behind what is seen, class by class."""
    scheme = parse_partition("iid")
    shares = partition(data.train.labels, clients=SHARES, scheme=scheme, seed=seed)
    behind = SEEN[together] * together
    strangers = data.train[torch.cat(list(shares[behind:]))]
    everything = data.test[: len(data.test) // 2]
    groups = [shares[first : first + together] for first in range(0, behind, together)]
    answering = [
        [
            trained(data, data.train[share], seed * behind + number * together + place)
            for place, share in enumerate(group)
        ]
        for number, group in enumerate(groups)
    ]

    @cache
    def of_server(without: int | None) -> tuple[Images, Tensor]:
        public = everything if without is None else everything[everything.labels != without]
        return public, said(data, [trained(data, public, seed)], public.pixels)

    @cache
    def learnt(number: int, without: int | None) -> tuple[Tensor, nn.Module]:
        public, server = of_server(without)
        client = said(data, answering[number], public.pixels)
        return client, inverted(client, server, public.pixels.flatten(1), seed)

    for name in range(10):
        without = name if lacking else None
        public, server = of_server(without)
        for number, group in enumerate(groups):
            own = data.train[torch.cat(group)]
            private = own[own.labels == name].pixels.flatten(1)
            if not len(private):
                continue
            client, network = learnt(number, without)
            sure = client[:, name].topk(SURE).indices
            told, known = client[sure].mean(0), server[sure].mean(0)
            target = F.one_hot(torch.tensor(name), 10).float()
            others = strangers[strangers.labels == name].pixels.flatten(1)
            generator = torch.Generator().manual_seed(seed * 1_000 + number)
            drawn = torch.randperm(len(others), generator=generator)[: len(private)]
            mean = public.pixels[public.labels == name].flatten(1).mean(0)
            for gap in GAPS:
                # The client surer and the server less sure than of any image that was asked about.
                pair = [told + gap * target, known - gap * target]
                with torch.inference_mode():
                    picture = network(torch.cat([x.log_softmax(0) for x in pair])[None])[0]
                yield {
                    "seen": (seed, number),
                    "gap": gap,
                    "correlation": nearest(picture, private),
                    "floor": nearest(picture, others[drawn]),
                    "mean_of_the_class": None if lacking else nearest(mean, private),
                }


def summary(rows: list[dict[str, Any]], gap: float) -> dict[str, Any]:
    """Return means over what was seen, and what pictures have over the floor with its interval."""
    seen: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if row["gap"] == gap:
            seen.setdefault(row["seen"], []).append(row)
    names = ("correlation", "floor", "mean_of_the_class")
    means = {
        name: [fmean(row[name] for row in own) for own in seen.values() if own[0][name] is not None]
        for name in names
    }
    over = np.subtract(means["correlation"], means["floor"])
    low, high = stats.t.interval(0.95, len(over) - 1, over.mean(), stats.sem(over))
    return {
        "seen": len(seen),
        "pictures": sum(map(len, seen.values())),
        "gap": gap,
        **{name: fmean(values) if values else None for name, values in means.items()},
        "over": [float(over.mean()), float(low), float(high)],
    }


def main() -> None:
    """Measure and print, and with --out keep, the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--together", type=int, choices=SEEN, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    together = arguments.together
    for lacking in (False, True):
        rows = [
            row
            for seed in range(arguments.seeds)
            for row in attacked(load_dataset("digits", seed=seed), seed, together, lacking=lacking)
        ]
        for gap in GAPS:
            found.append({"server_lacks_the_class": lacking, **summary(rows, gap)})
            print(found[-1], flush=True)
    if arguments.out:
        suffix = "" if together == 1 else f"-sums-of-{together}"
        path = arguments.out / f"paired-logits{suffix}.json"
        write_result(path, arguments, clients_together=together, rows=found)


if __name__ == "__main__":
    main()
