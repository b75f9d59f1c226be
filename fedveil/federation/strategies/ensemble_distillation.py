"""Federated learning in which nothing that was learnt is ever sent to a client."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from fedveil.copies.noise import NoiseKey
from fedveil.data.augmentation import Augmentation, parse_augmentation
from fedveil.errors import FedveilError
from fedveil.federation.job import Job
from fedveil.federation.replies import Update
from fedveil.federation.roster import Client, Sampling
from fedveil.federation.strategies.fedavg import (
    Distribution,
    Resume,
    SeededFedAvg,
    Sends,
    clone,
    weighted_mean,
)
from fedveil.federation.strategies.flower_arguments import FedAvgArguments
from fedveil.federation.task import UNLABELLED
from fedveil.federation.threads import torch_threads
from fedveil.models.layout import memory_layout
from fedveil.types import Weights

_TEACHER_BATCH = 250
_ANSWERS, _EXAMPLES = "answers", "examples"


@dataclass(frozen=True)
class Distillation:
    """How the server teaches w what a round's answers know.

    Attributes:
        steps: Steps of gradient descent a round.
        batch_size: Images a step.
        learning_rate: Step size of a round's first step; falls in a straight line to zero.
        momentum: Part of the last step that the next one repeats.
        label_share: Weight λ of the images' own labels, where the server has them: w is taught
            (1 - λ)·answers + λ·labels (Hinton et al., "Distilling the Knowledge in a Neural
            Network", 2015, section 2). 0 asks for no labels, 1 for no clients.
        augmentation: Changes the images anew in every step, while what they are stays the same.
    """

    steps: int = 40
    batch_size: int = 50
    learning_rate: float = 0.05
    momentum: float = 0.9
    label_share: float = 0.0
    augmentation: Augmentation = Augmentation()  # noqa: RUF009 (frozen)


class EnsembleDistillation(SeededFedAvg):
    """w learns from what clients' models answer; clients only ever receive the untrained model.

    Each client trains the model of round 1 on its own images and returns it. The server lets what
    comes back classify its unlabelled images, and trains w to give the mean of all probabilities
    returned so far. w, and all that is made of it, stays on the server, so a client receives
    nothing it could not have drawn itself: there is nothing to steal, by any attack or number of
    colluders.

    The price is paid in accuracy, where a client's own images teach little (many classes, few
    images, one class a client). ``shared_rounds`` buys some of it back: after that many rounds of
    plain averaging clients start from what those gave, and that much can be stolen.

    The server sees every client's own model, so this does not combine with secure aggregation.

    Source: Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning",
    NeurIPS 2020, Algorithm 1, without its sending the fused model back; with every client asked
    once, Guha et al., "One-Shot Federated Learning", 2019.

    Args:
        model: Architecture; takes on the weights of each answer.
        unlabelled: The server's images, [N, C, H, W], at least one: uint8, or floats as the model
            takes them. They are left as they are.
        labels: Their classes, int64 [N]; needed where ``distillation.label_share`` is above 0.
        distillation: How w is taught.
        share_unlabelled: Whether clients receive ``unlabelled`` too, in the record ``UNLABELLED``.
            One that has images of a few classes only can then learn what sets them apart from the
            others. The images, not the model, are thereby given away.
        shared_rounds: Rounds of plain federated averaging at the start; not below 0.
        sampling: How each round chooses its clients.
        resume: Where an earlier process of the same run stopped.
        flower: FedAvg's own arguments, by their names.

    Raises:
        FedveilError: Labels are to count, and there are none; or FedAvg's arguments, as of
            ``SeededFedAvg``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        unlabelled: Tensor,
        labels: Tensor | None = None,
        distillation: Distillation | None = None,
        share_unlabelled: bool = False,
        shared_rounds: int = 0,
        sampling: Sampling | None = None,
        resume: Resume | None = None,
        **flower: Unpack[FedAvgArguments],
    ) -> None:
        super().__init__(sampling=sampling, resume=resume, **flower)
        self.distillation = distillation or Distillation()
        if self.distillation.label_share and labels is None:
            raise FedveilError(
                f"label_share is {self.distillation.label_share}, and labels= is not given: give "
                "the classes of unlabelled=, int64 [N], or a label_share of 0"
            )
        # A copy, because it takes on the weights of each answer.
        self.model = deepcopy(model)
        self.unlabelled = unlabelled
        self.share_unlabelled = share_unlabelled
        self.labels = labels
        self.shared_rounds = shared_rounds
        # Floats are the caller's own, and what the model takes as they are.
        pixels = unlabelled if unlabelled.is_floating_point() else unlabelled.float().div_(255)
        layout = memory_layout(self.model, pixels[:1])
        self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self._pixels = pixels.contiguous(memory_format=layout)
        self._delivered: Weights | None = None

    @classmethod
    def of_run(cls, job: Job, resume: Resume, key: NoiseKey) -> "EnsembleDistillation":
        """Return the strategy of a run, as of ``SeededFedAvg``."""
        config = job.config
        return cls(
            model=job.model,
            unlabelled=job.evaluation.calibration.raw,
            distillation=Distillation(
                steps=config.distillation_steps,
                label_share=config.label_share,
                augmentation=parse_augmentation(config.augment),
            ),
            labels=job.evaluation.calibration.labels if config.label_share else None,
            share_unlabelled=config.share_unlabelled,
            shared_rounds=config.shared_rounds,
            sampling=job.sampling,
            resume=resume,
        )

    @property
    def sends(self) -> Sends:
        """What clients receive: after shared rounds, what these have learnt."""
        return "model" if self.shared_rounds else "untrained"

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
        """Return w after it has learnt from the round's answers."""
        assert self._delivered is not None
        if round_number <= self.shared_rounds:
            return super().combine(round_number, sent, updates)
        is_first = self.state.memory is None
        memory = self._remember(updates)
        self.state = replace(self.state, memory=memory)
        targets = self._targets(memory[_ANSWERS])
        start = self._delivered
        if is_first:
            # Mostly far better than the untrained model; worse where clients drifted far apart.
            mean = super().combine(round_number, sent, updates)
            start = min((mean, start), key=lambda weights: self._distance(weights, targets))
        generator = torch.Generator().manual_seed(1_000_003 * self.sampling.seed + round_number)
        # Steps of a few images are faster on one thread, and w then depends on no number of them.
        with torch_threads(1), torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())  # dropout draws the same for the same seed
            return self._teach(start, targets, generator)

    def _remember(self, updates: Sequence[Update]) -> Weights:
        """Return the mean of the class probabilities that every answer so far gives an image."""
        terms = [
            ({_ANSWERS: self._probabilities(update.weights)}, float(update.examples))
            for update in updates
        ]
        if past := self.state.memory:
            terms.append(({_ANSWERS: past[_ANSWERS]}, float(past[_EXAMPLES])))
        examples = torch.tensor(sum(count for _, count in terms), dtype=torch.float64)
        return {_EXAMPLES: examples, **weighted_mean(terms)}

    def _distance(self, weights: Weights, targets: Tensor) -> float:
        """Return the cross entropy of a model's answers on the server's images."""
        return float(F.cross_entropy(self._logits(weights), targets))

    def _probabilities(self, weights: Weights) -> Tensor:
        return torch.softmax(self._logits(weights), dim=1)

    def _logits(self, weights: Weights) -> Tensor:
        self.model.load_state_dict(dict(weights))
        self.model.eval()
        with torch.inference_mode():
            logits = [self.model(some) for some in torch.split(self._pixels, _TEACHER_BATCH)]
        return torch.cat(logits)

    def _targets(self, answers: Tensor) -> Tensor:
        """Return the class probabilities that w is to give the server's images."""
        if self.labels is None:
            return answers
        known = F.one_hot(self.labels, answers.shape[1]).to(answers)
        return torch.lerp(answers, known, self.distillation.label_share)

    def _teach(self, start: Weights, targets: Tensor, generator: torch.Generator) -> Weights:
        self.model.load_state_dict(dict(start))
        self.model.train()
        how = self.distillation
        optimiser = torch.optim.SGD(self.model.parameters(), how.learning_rate, how.momentum)
        schedule = LinearLR(optimiser, start_factor=1.0, end_factor=0.0, total_iters=how.steps)
        size = min(how.batch_size, len(targets))
        for _ in range(how.steps):
            index = torch.randint(len(targets), (size,), generator=generator)
            pixels = how.augmentation(self._pixels[index], generator)
            optimiser.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.model(pixels), targets[index])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        if not bool(loss.isfinite()):
            raise FedveilError(
                f"teaching w diverged: lower Distillation(learning_rate={how.learning_rate:g}), "
                "or, where clients' models answer without bounds, --learning-rate"
            )
        self.model.eval()
        return clone({name: value.detach() for name, value in self.model.state_dict().items()})
