r"""What clients' answers to the server's images tell of who is in their training.

Clients train alone as strategy ``protected`` has them train; a server that has candidates with
their labels, and sees other clients' answers to compare with, scores each candidate:

``asked``     it asks about the candidate itself, which no client of fedveil's answers as a member:
              what the rule of ``fedveil.federation.answers.asked_about`` is there for
``shifted``   it asks about the candidate moved by one pixel, which that rule does not find
``student``   it asks about images of nobody's, and trains a student on the answers (Jagielski et
              al., "Students Parrot Their Teachers", NeurIPS 2023), whose loss is the score

each for one client, seen alone, and for the sum of ten.

    FEDVEIL_DATA=... python benchmarks/answer_membership.py --out docs/results
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from written import write_result

from fedveil.audit.metrics import Ranks
from fedveil.data import Dataset, Images, load_dataset, parse_partition
from fedveil.data.partition import partition
from fedveil.federation.answers import logits_of
from fedveil.federation.training import LocalTraining, train_locally
from fedveil.models import build_model

_CLIENTS, _GROUP, _STRANGERS, _STEPS = 100, 10, 1_000, 600
ALONE = LocalTraining(
    epochs=30, batch_size=20, learning_rate=0.1, decay=True, momentum=0.9, clip=1.0
)


@dataclass(frozen=True)
class Federation:
    """Twenty clients that trained alone: ten that are attacked, and ten to compare with.

    Attributes:
        data: The images.
        shares: Which training images each of the hundred clients has.
        models: States of the twenty's models.
        questions: The server's images.
    """

    data: Dataset
    shares: list[Tensor]
    models: list[dict[str, Tensor]]
    questions: Images

    @classmethod
    def of(cls, dataset: str, seed: int) -> "Federation":
        """Train them."""
        data = load_dataset(dataset, seed=seed)
        scheme = parse_partition("iid")
        shares = partition(data.train.labels, clients=_CLIENTS, scheme=scheme, seed=seed)
        models = []
        for client in range(2 * _GROUP):
            model, own = untrained(data), data.train[shares[client]]
            generator = torch.Generator().manual_seed(1_000 * seed + client)
            train_locally(model, own, ALONE, generator=generator)
            models.append({name: value.clone() for name, value in model.state_dict().items()})
            print(f"seed {seed}: client {client} of {2 * _GROUP}", flush=True)
        return cls(data, list(shares), models, data.test[:2_000])

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return what each client answers, [20, N, K]."""
        model = untrained(self.data)
        return torch.stack([logits_of(model, state, pixels).softmax(1) for state in self.models])

    def students(self, answers: Tensor) -> list[dict[str, Tensor]]:
        """Return a model taught each of the answers [V, N, K] to the questions."""
        taught = []
        for number, targets in enumerate(answers):
            model, generator = untrained(self.data).train(), torch.Generator().manual_seed(number)
            optimiser = torch.optim.SGD(model.parameters(), 0.05, 0.9)
            for _ in range(_STEPS):
                index = torch.randint(len(targets), (50,), generator=generator)
                optimiser.zero_grad()
                F.cross_entropy(model(self.questions[index].pixels), targets[index]).backward()
                optimiser.step()
            taught.append({name: value.clone() for name, value in model.state_dict().items()})
        return taught


def untrained(data: Dataset) -> nn.Module:
    return build_model("cnn", data.shape, len(data.classes), seed=0)


def _fit(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the log-likelihood ratio of the true class against the others, [V, N]."""
    index = labels.expand(len(probabilities), -1)[:, :, None]
    right = probabilities.double().gather(2, index).squeeze(2).clamp(1e-12, 1 - 1e-12)
    return right.log() - (1 - right).log()


def _sums(probabilities: Tensor) -> Tensor:
    return torch.stack([part.mean(0) for part in probabilities.split(_GROUP)])


def rows(federation: Federation, seed: int) -> list[tuple[str, str, Ranks]]:
    """Return where members stand among strangers, by question and by what is seen."""
    train, shares = federation.data.train, federation.shares
    generator = torch.Generator().manual_seed(seed)
    outside = torch.cat(shares[2 * _GROUP :])
    strangers = outside[torch.randperm(len(outside), generator=generator)[:_STRANGERS]]
    members = torch.cat(shares[:_GROUP])
    candidates = train[torch.cat([members, strangers])]
    answers = federation.probabilities(federation.questions.pixels)
    alone = federation.students(answers[:_GROUP])
    summed = federation.students(_sums(answers))
    model, pixels = untrained(federation.data), candidates.pixels
    asked = federation.probabilities(pixels)
    shifted = federation.probabilities(pixels.roll(1, dims=3))
    told = {
        "asked": (asked[:_GROUP], _sums(asked)),
        "shifted": (shifted[:_GROUP], _sums(shifted)),
        "student": tuple(
            torch.stack([logits_of(model, state, pixels).softmax(1) for state in states])
            for states in (alone, summed)
        ),
    }
    sizes = [len(share) for share in shares[:_GROUP]]
    found = []
    for question, (single, both) in told.items():
        fits = _fit(single, candidates.labels)
        # How hard an image is, the other clients' answers tell.
        scores = fits - (fits.sum(0) - fits) / (len(fits) - 1)
        own = [part[v] for v, part in enumerate(scores[:, : len(members)].split(sizes, dim=1))]
        least = min(map(len, own))
        inside = torch.stack([one[:least] for one in own])
        found.append((question, "one client", Ranks.of(inside, scores[:, len(members) :])))
        of_ten = _fit(both, candidates.labels)
        score = (of_ten[0] - of_ten[1])[None]
        ranks = Ranks.of(score[:, : len(members)], score[:, len(members) :])
        found.append((question, "sum of ten", ranks))
    return found


def main() -> None:
    """Measure and print, and with --out keep, the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[tuple[str, str], list[Ranks]] = {}
    for seed in range(arguments.seeds):
        for question, seen, ranks in rows(Federation.of(arguments.dataset, seed), seed):
            parts.setdefault((question, seen), []).append(ranks)
    table: list[dict[str, Any]] = []
    for (question, seen), several in parts.items():
        roc = Ranks.joined(several).roc()
        print(f"{question:10}{seen:12}{roc.as_text()}")
        table.append({"question": question, "seen": seen, **roc.as_json()})
    if arguments.out:
        write_result(
            arguments.out / "answer-membership.json",
            arguments,
            strangers=_STRANGERS,
            rows=table,
        )


if __name__ == "__main__":
    main()
