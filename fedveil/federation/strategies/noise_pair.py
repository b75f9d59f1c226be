"""The paper's noise-based federated averaging, Algorithm 1."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from torch import nn

from fedveil.copies.calibration import Calibration, Copies, Evaluate, raise_until_below
from fedveil.copies.noise import NoiseKey
from fedveil.federation.job import Job
from fedveil.federation.replies import WEIGHT_KEY, Update
from fedveil.federation.roster import Client, Sampling
from fedveil.federation.strategies.cap import Cap
from fedveil.federation.strategies.fedavg import (
    Distribution,
    Resume,
    clone,
    unmarked,
    weighted_mean,
)
from fedveil.federation.strategies.flower_arguments import FedAvgArguments
from fedveil.federation.strategies.noisy_fedavg import NoisyFedAvg, require_labels
from fedveil.types import Weights


@dataclass(frozen=True)
class RaisingLoop:
    """The paper's schedule of σ: every round starts low and raises until both copies are capped.

    Attributes:
        start: First σ of a round.
        step: Added at each turn.
        factor: What σ is multiplied by before that; the paper does not tell how σ is raised.
        limit: Largest σ tried.
    """

    start: float = 0.1
    step: float = 0.1
    factor: float = 1.0
    limit: float = 100.0


class NoisePair(NoisyFedAvg):
    """Algorithm 1 as this project reads it; the extracted text has lost symbols.

    Each round the copies are base ± N with N ~ Normal(0, σ²) on the first convolution, σ raised
    until both accuracies are at most θ. ``base`` becomes the weighted mean of what the clients
    return. w becomes the weighted mean of the same and of ``server_clients`` that merely hold the
    previous w, each with the sample count of a client drawn at random. While no noise was needed,
    w = base.

    Source: "noise-based federated averaging" (in Korean), Algorithm 1; docs/noise.md gives the
    reading symbol by symbol.

    Args:
        model: Architecture; its weights are not used.
        cap: The promise about copies; by labels only.
        noise: Where the noise goes; the paper has ``first-conv``.
        temperature: As of ``NoiseDelta``; the paper has none.
        schedule: How σ is raised.
        server_clients: Number of server-side clients, |s_t|.
        key: Secret of the noise; drawn from the operating system where it is not given.
        run: Name of the run.
        sampling: How each round chooses its clients.
        resume: Where an earlier process of the same run stopped.
        flower: FedAvg's own arguments, by their names.

    Raises:
        FedveilError: ``cap`` asks for the label-free bound.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        cap: Cap,
        noise: str = "first-conv",
        temperature: float | None = None,
        schedule: RaisingLoop | None = None,
        server_clients: int = 5,
        key: NoiseKey | None = None,
        run: str = "run",
        sampling: Sampling | None = None,
        resume: Resume | None = None,
        **flower: Unpack[FedAvgArguments],
    ) -> None:
        require_labels(cap, "noise-pair")
        super().__init__(
            model=model,
            cap=cap,
            noise=noise,
            temperature=temperature,
            relative=False,
            key=key,
            run=run,
            sampling=sampling,
            resume=resume,
            **flower,
        )
        self.schedule = schedule or RaisingLoop()
        self.server_clients = server_clients
        self._delivered: Weights | None = None
        self._checks = 0

    @classmethod
    def of_run(cls, job: Job, resume: Resume, key: NoiseKey) -> "NoisePair":
        """Return the strategy of a run, as of ``SeededFedAvg``."""
        config = job.config
        return cls(
            model=job.model,
            cap=Cap(config.cap, job.evaluation.calibration, config.bound, compared=False),
            noise=config.noise or "first-conv",
            temperature=config.temperature or None,
            schedule=RaisingLoop(
                start=config.sigma_start,
                step=config.sigma_step,
                factor=config.sigma_factor,
                limit=config.sigma_limit,
            ),
            server_clients=config.server_clients,
            key=key,
            sampling=job.sampling,
            resume=resume,
        )

    def distribute(
        self, round_number: int, weights: Weights, clients: Sequence[Client]
    ) -> Distribution:
        """Make the copies from base; ``weights`` is w, which the server-side clients will hold."""
        self._delivered = weights
        sent = super().distribute(round_number, weights, clients)
        return replace(sent, evaluations=sent.evaluations + 1, images=sent.images + self._checks)

    def passed_cap(self, round_number: int, base: Weights) -> bool:
        """Evaluate the copies without noise, the first turn of the paper's loop."""
        labels = self.cap.shown.labels
        correct = sum(right for right, _ in self.evaluator(round_number, labels)(base))
        self._checks = len(labels)
        noisy = correct > self.cap.accuracy * len(labels)
        self.state = replace(self.state, noisy=noisy)
        return noisy

    def calibrate(self, copies: Copies, evaluate: Evaluate, cap: float) -> Calibration:
        """Raise σ from the schedule's start, every round anew."""
        schedule = self.schedule
        return raise_until_below(
            copies,
            evaluate,
            cap=cap,
            start=schedule.start,
            step=schedule.step,
            factor=schedule.factor,
            limit=schedule.limit,
        )

    def combine(self, round_number: int, sent: Distribution, updates: Sequence[Update]) -> Weights:
        """Return w, and keep base, the mean without server-side clients, for the next copies."""
        returned = [(unmarked(update, sent), float(update.examples)) for update in updates]
        previous = self.state.base or sent.copies[0]
        base = self.keep_statistics(weighted_mean(returned), previous)
        self.state = replace(self.state, base=self.cool(base))
        if not self.state.noisy or self._delivered is None:
            return clone(base)
        counts = self._server_counts(round_number, updates)
        held = [(self._delivered, float(count)) for count in counts]
        return self.keep_statistics(weighted_mean(returned + held), base)

    def _server_counts(self, round_number: int, updates: Sequence[Update]) -> list[float]:
        said = self.clients if self.weighted_by_key == WEIGHT_KEY else ()
        known: list[float] = [c.examples for c in said if c.examples is not None]
        bound = self._bound(updates)
        drawn_from = [
            count if bound is None else min(count, bound)
            for count in known or [update.examples for update in updates]
        ]
        generator = random.Random(f"fedveil server clients {self.sampling.seed} {round_number}")
        return [generator.choice(drawn_from) for _ in range(self.server_clients)]
