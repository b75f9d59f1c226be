"""Federated learning in which nothing that was learnt is ever sent to a client."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.data.augmentation import Augmentation
from fedveil.federation.fedavg import (
    Distribution,
    Resume,
    Sampling,
    SeededFedAvg,
    Weights,
    clone,
    weighted_mean,
)
from fedveil.federation.replies import Update
from fedveil.federation.roster import Client
from fedveil.federation.task import UNLABELLED

_TEACHER_BATCH = 250


@dataclass(frozen=True)
class Distillation:
    """How the server teaches w what a round's answers know.

    Attributes:
        images: Unlabelled images a round, drawn at random; no more than there are.
        steps: Steps of gradient descent a round.
        batch_size: Images a step.
        learning_rate: Step size.
        momentum: Part of the last step that the next one repeats.
        augmentation: Changes the images anew in every round, so that few go further.
    """

    images: int = 1_000
    steps: int = 40
    batch_size: int = 50
    learning_rate: float = 0.05
    momentum: float = 0.9
    augmentation: Augmentation = Augmentation()  # noqa: RUF009 (frozen)


class EnsembleDistillation(SeededFedAvg):
    """w learns from what clients' models answer; clients only ever receive the untrained model.

    Each client trains the model of round 1 on its own images and returns it. The server lets all
    that came back classify its unlabelled images, and trains w to give the mean of their
    probabilities. w, and all that is made of it, stays on the server, so a client receives nothing
    it could not have drawn itself: there is nothing to steal, by any attack or number of colluders.

    The price is paid in accuracy, where a client's own images teach little (many classes, few
    images, one class a client). ``shared_rounds`` buys some of it back: after that many rounds of
    plain averaging clients start from what those gave, and that much can be stolen.

    The server sees every client's own model, so this does not combine with secure aggregation.

    Source: Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning",
    NeurIPS 2020, Algorithm 1, without its sending the fused model back; with every client asked
    once, Guha et al., "One-Shot Federated Learning", 2019.

    Args:
        model: Architecture; takes on the weights of each answer.
        unlabelled: The server's images, uint8 [N, C, H, W], at least one.
        distillation: How w is taught.
        share_unlabelled: Whether clients receive ``unlabelled`` too, in the record ``UNLABELLED``.
            One that has images of a few classes only can then learn what sets them apart from the
            others. The images, not the model, are thereby given away.
        shared_rounds: Rounds of plain federated averaging at the start; not below 0.
        sampling: How each round chooses its clients.
        resume: Where an earlier process of the same run stopped.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        unlabelled: Tensor,
        distillation: Distillation | None = None,
        share_unlabelled: bool = False,
        shared_rounds: int = 0,
        sampling: Sampling | None = None,
        resume: Resume | None = None,
    ) -> None:
        super().__init__(sampling=sampling, resume=resume)
        self.model = model
        self.unlabelled = unlabelled
        self.share_unlabelled = share_unlabelled
        self.distillation = distillation or Distillation()
        self.shared_rounds = shared_rounds
        self._delivered: Weights | None = None

    def distribute(
        self, round_number: int, weights: Weights, clients: Sequence[Client]
    ) -> Distribution:
        """Send the untrained model, or what the shared rounds made of it; ``weights`` is w."""
        self._delivered = weights
        if round_number <= self.shared_rounds + 1:
            self.state = replace(self.state, base=clone(weights))
        assert self.state.base is not None
        return super().distribute(round_number, self.state.base, clients)

    def attachments(self) -> dict[str, ArrayRecord]:
        """Return the server's images, where clients are to learn from them."""
        if not self.share_unlabelled:
            return {}
        return {UNLABELLED: ArrayRecord({"images": self.unlabelled})}

    def combine(self, round_number: int, sent: Distribution, updates: Sequence[Update]) -> Weights:
        """Return w after it has learnt from the round's answers.

        The first time w is the answers' mean, a far better start than the untrained model.
        """
        assert self._delivered is not None
        if round_number <= self.shared_rounds:
            return super().combine(round_number, sent, updates)
        start = self._delivered
        if round_number == self.shared_rounds + 1:
            start = super().combine(round_number, sent, updates)
        generator = torch.Generator().manual_seed(1_000_003 * self.sampling.seed + round_number)
        images = self._draw(generator)
        return self._teach(start, images, self._answers(images, updates), generator)

    def _draw(self, generator: torch.Generator) -> Tensor:
        order = torch.randperm(len(self.unlabelled), generator=generator)
        chosen = self.unlabelled[order[: self.distillation.images]]
        pixels = chosen.to(torch.float32).div_(255)
        return self.distillation.augmentation(pixels, generator).contiguous(
            memory_format=torch.channels_last
        )

    def _answers(self, images: Tensor, updates: Sequence[Update]) -> Tensor:
        """Return the mean of the clients' class probabilities, float [N, classes]."""
        answers = [
            ({"probabilities": self._probabilities(update.weights, images)}, update.examples)
            for update in updates
        ]
        return weighted_mean(answers)["probabilities"]

    def _probabilities(self, weights: Weights, images: Tensor) -> Tensor:
        self.model.load_state_dict(dict(weights))
        self.model.eval()
        with torch.inference_mode():
            logits = torch.cat([self.model(some) for some in torch.split(images, _TEACHER_BATCH)])
        return torch.softmax(logits, dim=1)

    def _teach(
        self, start: Weights, images: Tensor, answers: Tensor, generator: torch.Generator
    ) -> Weights:
        self.model.load_state_dict(dict(start))
        self.model.train()
        optimiser = torch.optim.SGD(
            self.model.parameters(), self.distillation.learning_rate, self.distillation.momentum
        )
        for index in self._batches(len(images), generator):
            optimiser.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.model(images[index]), answers[index])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        self.model.eval()
        return clone({name: value.detach() for name, value in self.model.state_dict().items()})

    def _batches(self, images: int, generator: torch.Generator) -> Iterator[Tensor]:
        size = min(self.distillation.batch_size, images)
        for _ in range(self.distillation.steps):
            yield torch.randint(images, (size,), generator=generator)
