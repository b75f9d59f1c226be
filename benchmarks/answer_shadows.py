r"""What shadow clients teach a server that sees answers of who is in a client's training.

The strongest attacker known: it has every candidate with its label, and the training program of
strategy ``protected``. It trains shadow clients on random shares of the candidates, with each of
them and without, and scores a candidate by which of the two the answers it sees are more like
(Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022).

``asked``    about the candidate itself, which no client of fedveil's answers as a member: the
             log-likelihood ratio of two normal distributions of its log-odds, sections IV and V
``others``   about the server's images: answers are projected on their principal components, and
             scored along what tells shadows with the candidate from shadows without it (Fisher's
             discriminant); how many components, shadow clients set apart choose

seen of one client alone, and in the sum of ten; as probabilities, as votes, and as votes with the
noise of --epsilon 8. Strangers are the candidates that a client lacks, and one threshold is for
all clients.

    FEDVEIL_DATA=... python benchmarks/answer_shadows.py --out docs/results
"""

import argparse
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from answer_membership import ALONE, untrained
from torch import Tensor
from torch.nn import functional as F
from written import write_result

from fedveil.audit.metrics import RATES, Ranks
from fedveil.data import load_dataset
from fedveil.federation.answers import logits_of
from fedveil.federation.training import train_locally
from fedveil.federation.votes import VoteRelease

_SHARE, _CANDIDATES, _GROUP = 14, 514, 10
_EPSILON = 8.0
_COMPONENTS = (10, 30, 100, 300)
_TINY = 1e-6


@dataclass(frozen=True)
class Clients:
    """Clients that trained alone, and what they answer.

    Attributes:
        members: Bool [V, C], which candidates each has.
        odds: Float64 [V, C], log-odds of the true class of each candidate that is asked about.
        answers: Float64 [V, Q, K], probabilities of the server's images.
    """

    members: Tensor
    odds: Tensor
    answers: Tensor

    def __getitem__(self, part: slice) -> "Clients":
        return Clients(self.members[part], self.odds[part], self.answers[part])


def trained(dataset: str, count: int, seed: int) -> Clients:
    """Train clients on random shares of the candidates."""
    data = load_dataset(dataset, seed=0)
    candidates, questions = data.train[:_CANDIDATES], data.test[: len(data.test) // 2]
    fresh, generator = untrained(data), torch.Generator().manual_seed(seed)
    pixels, asked = candidates.pixels, questions.pixels
    members = torch.zeros(count, _CANDIDATES, dtype=torch.bool)
    odds, answers = [], []
    for number in range(count):
        own = torch.randperm(_CANDIDATES, generator=generator)[:_SHARE]
        members[number, own] = True
        model = deepcopy(fresh)
        train_locally(model, candidates[own], ALONE, generator=generator)
        state = model.state_dict()
        told = logits_of(model, state, pixels).double().log_softmax(1)
        right = told.gather(1, candidates.labels[:, None]).squeeze(1)
        odds.append(right - torch.log1p(-right.exp().clamp(max=1 - 1e-12)))
        answers.append(logits_of(model, state, asked).double().softmax(1))
        if number % 100 == 99:
            print(f"{number + 1} of {count} clients", flush=True)
    return Clients(members, torch.stack(odds), torch.stack(answers))


def of_asked(shadows: Clients, seen: Clients) -> Tensor:
    """Return scores [V, C] by the answer about the candidate itself."""
    means, spreads = [], []
    for there in (shadows.members, ~shadows.members):
        weights = there.double()
        count = weights.sum(0)
        mean = (shadows.odds * weights).sum(0) / count
        square = ((shadows.odds - mean).square() * weights).sum(0) / (count - 1)
        means.append(mean)
        spreads.append(square.sqrt())
    inside, outside = (
        -0.5 * ((seen.odds - mean) / spread).square() - spread.log()
        for mean, spread in zip(means, spreads, strict=True)
    )
    return inside - outside


@dataclass(frozen=True)
class Discriminant:
    """What tells answers of clients with a candidate from answers of clients without it.

    Attributes:
        mean: Float64 [F], of a client's answers.
        components: Float64 [F, P], principal ones.
        spread: Float64 [P, P], covariance of a client's answers along them.
        differences: Float64 [C, P], of the means with each candidate and without it.
    """

    mean: Tensor
    components: Tensor
    spread: Tensor
    differences: Tensor

    @classmethod
    def of(cls, answers: Tensor, members: Tensor, count: int) -> "Discriminant":
        """Learn it of shadow clients' answers [V, F]."""
        mean = answers.mean(0)
        centred = answers - mean
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        components = directions[:count].T
        rows, inside = centred @ components, members.double()
        outside = 1 - inside
        differences = inside.T @ rows / inside.sum(0)[:, None]
        differences -= outside.T @ rows / outside.sum(0)[:, None]
        spread = rows.T @ rows / len(rows)
        return cls(mean, components, spread, differences)

    def scores(self, seen: Tensor, *, clients: int, noise: float) -> Tensor:
        """Score sums [V, F] of so many clients' answers, with noise on each number, [V, C]."""
        rows = (seen - clients * self.mean) @ self.components
        whole = clients * self.spread
        whole.diagonal().add_(noise**2 + _TINY * float(whole.diagonal().mean()))
        along = torch.linalg.solve(whole, self.differences.T)
        return rows @ along / (self.differences.T * along).sum(0).clamp(min=1e-12).sqrt()


def ranks(scores: Tensor, members: Tensor) -> Ranks:
    """Return where members stand among all strangers, by thresholds that are for all clients."""
    strangers = scores[~members].sort().values
    least = int(members.sum(1).min())  # clients of one sum may have the same candidate
    inside = torch.stack([row[there][:least] for row, there in zip(scores, members, strict=True)])
    limits = [strangers[-1 - int(rate * len(strangers))] for rate in RATES]
    above = torch.searchsorted(strangers, inside.contiguous()).double() / len(strangers)
    return Ranks(above, tuple((inside > limit).double() for limit in limits), len(strangers))


@dataclass(frozen=True)
class Seen:
    """What a server sees of answers about its own images.

    Attributes:
        kind: As what clients answer.
        clients: Of how many it sees the sum.
    """

    kind: str
    clients: int

    def attacked(self, shadows: Clients, targets: Clients) -> Ranks:
        """Return where members stand; shadows set apart say how many components are looked at."""
        cut = len(shadows.members) * 4 // 5 // self.clients * self.clients
        end = len(shadows.members) // self.clients * self.clients
        learnt, apart = shadows[:cut], shadows[cut:end]
        best = max(
            _COMPONENTS, key=lambda count: float(self._ranks(learnt, apart, count).above.mean())
        )
        print(f"{self.kind}, {self.clients}: {best} components", flush=True)
        return self._ranks(shadows, targets, best)

    def _ranks(self, shadows: Clients, others: Clients, count: int) -> Ranks:
        how = Discriminant.of(self._told(shadows), shadows.members, count)
        sums = self._told(others).unflatten(0, (-1, self.clients)).sum(1)
        generator = torch.Generator().manual_seed(0)
        noise = self._noise(others.answers.shape[1])
        sums += noise * torch.randn(sums.shape, generator=generator, dtype=torch.float64)
        members = others.members.unflatten(0, (-1, self.clients)).any(1)
        return ranks(how.scores(sums, clients=self.clients, noise=noise), members)

    def _told(self, clients: Clients) -> Tensor:
        answers = clients.answers
        if self.kind != "probabilities":
            answers = F.one_hot(answers.argmax(2), answers.shape[2]).double()
        return answers.flatten(1)

    def _noise(self, questions: int) -> float:
        if self.kind != "noised votes":
            return 0.0
        asked = None if self.clients == 1 else self.clients
        return VoteRelease(_EPSILON).noise(questions, clients=self.clients, asked=asked)


def main() -> None:
    """Measure and print, and with --out keep, the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--shadows", type=int, default=1_000)
    parser.add_argument("--targets", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every = trained(arguments.dataset, arguments.shadows + arguments.targets, seed=0)
    shadows, seen = every[: arguments.shadows], every[arguments.shadows :]
    found = {("asked", "probabilities", "one client"): ranks(of_asked(shadows, seen), seen.members)}
    for kind in ("probabilities", "votes", "noised votes"):
        for name, clients in (("one client", 1), ("sum of ten", _GROUP)):
            found["others", kind, name] = Seen(kind, clients).attacked(shadows, seen)
    table = []
    for (question, kind, name), told in found.items():
        roc = told.roc()
        print(f"{question:8}{kind:15}{name:12}{roc.as_text()}")
        table.append({"question": question, "answers": kind, "seen": name, **roc.as_json()})
    if arguments.out:
        write_result(
            arguments.out / "answer-shadows.json",
            arguments,
            epsilon=_EPSILON,
            images_a_client=_SHARE,
            candidates=_CANDIDATES,
            rows=table,
        )


if __name__ == "__main__":
    main()
