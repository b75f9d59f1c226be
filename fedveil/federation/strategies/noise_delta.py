"""Noise-based averaging in which the noise leaves the mean exactly."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from torch import Tensor, nn

from fedveil.copies.calibration import (
    Calibration,
    Copies,
    Evaluate,
    below_cap,
    certifiable,
    search_sigma,
)
from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.federation.job import Job
from fedveil.federation.replies import Update
from fedveil.federation.roster import Client, Sampling
from fedveil.federation.strategies.cap import Cap
from fedveil.federation.strategies.fedavg import Distribution, Resume, weighted_mean
from fedveil.federation.strategies.flower_arguments import FedAvgArguments
from fedveil.federation.strategies.noisy_fedavg import NoisyFedAvg
from fedveil.types import Weights


@dataclass(frozen=True)
class SigmaSearch:
    """Where the search for σ starts and ends.

    Attributes:
        start: First σ of the first round that needs noise; later rounds start from the last one.
        relax: Each round starts at this fraction of the last σ, so that σ can fall again.
        limit: Largest σ tried.
    """

    start: float = 0.5
    relax: float = 0.9
    limit: float = 100.0


class NoiseDelta(NoisyFedAvg):
    """Copies w ± σN, σ searched along the draw itself, and deltas averaged.

    A client returns rₖ for the copy sₖ it was sent, and w ← w + Σ nₖ (rₖ - sₖ) / Σ nₖ over those
    that answered. A client that returns its copy untouched adds exactly nothing, so N leaves the
    mean whatever the counts and whoever is missing. The next copies are made from w with its output
    layer brought to ``temperature``, which changes none of its answers.

    Args:
        model: Architecture, freshly initialised; its weights only give the output layer's scale.
        cap: The promise about copies.
        noise: Where the noise goes: ``first-conv``, ``output``, ``all`` or a pattern over the
            parameters' names.
        temperature: How much smaller than at the start the copies' logits are; ``None`` leaves
            them as training makes them.
        smoothing: β in [0, 1): w becomes β·w + (1 - β)·(the new average) once copies carry noise.
            The next copies start from the average itself, so this only steadies what is delivered.
        search: Where the search for σ starts and ends.
        key: Secret of the noise; drawn from the operating system where it is not given.
        run: Name of the run.
        sampling: How each round chooses its clients.
        resume: Where an earlier process of the same run stopped.
        flower: FedAvg's own arguments, by their names.
    """

    fingerprints = True

    def __init__(
        self,
        *,
        model: nn.Module,
        cap: Cap,
        noise: str = "output",
        temperature: float | None = 10.0,
        smoothing: float = 0.0,
        search: SigmaSearch | None = None,
        key: NoiseKey | None = None,
        run: str = "run",
        sampling: Sampling | None = None,
        resume: Resume | None = None,
        **flower: Unpack[FedAvgArguments],
    ) -> None:
        super().__init__(
            model=model,
            cap=cap,
            noise=noise,
            temperature=temperature,
            key=key,
            run=run,
            sampling=sampling,
            resume=resume,
            **flower,
        )
        require_enough_images(cap)
        self.search = search or SigmaSearch()
        self.smoothing = smoothing
        self._delivered: Weights | None = None

    @classmethod
    def of_run(cls, job: Job, resume: Resume, key: NoiseKey) -> "NoiseDelta":
        """Return the strategy of a run, as of ``SeededFedAvg``."""
        config = job.config
        return cls(
            model=job.model,
            cap=Cap(config.cap, job.evaluation.calibration, config.bound, compared=False),
            noise=config.noise or "output",
            temperature=10.0 if config.temperature is None else config.temperature or None,
            smoothing=config.smoothing,
            search=SigmaSearch(start=config.sigma_start, limit=config.sigma_limit),
            key=key,
            sampling=job.sampling,
            resume=resume,
        )

    def distribute(
        self, round_number: int, weights: Weights, clients: Sequence[Client]
    ) -> Distribution:
        """Make the copies from base; ``weights`` is w."""
        self._delivered = weights
        return super().distribute(round_number, weights, clients)

    def passed_cap(self, round_number: int, base: Weights) -> bool:
        """Return True from the first round on in which w is not surely below the cap.

        Without labels nothing tells when w passes the cap, so noise starts with the second round.
        """
        if self.state.noisy:
            return True
        if self.cap.bound == "agreement":
            noisy = round_number > 1
        else:
            evaluate = self.evaluator(round_number, self.cap.shown.labels)
            noisy = not below_cap(evaluate(base), self.cap.accuracy).below
        self.state = replace(self.state, noisy=noisy)
        return noisy

    def calibrate(self, copies: Copies, evaluate: Evaluate, cap: float) -> Calibration:
        """Search from a little below the last round's σ."""
        start = self.state.sigma * self.search.relax or self.search.start
        limit = self.search.limit
        return search_sigma(copies, evaluate, cap=cap, start=min(start, limit), limit=limit)

    def combine(self, round_number: int, sent: Distribution, updates: Sequence[Update]) -> Weights:
        """Return base plus the weighted mean of what each client changed.

        The next base is that model at the fixed temperature; w is it, smoothed.
        """
        base = self.state.base or sent.copies[0]
        received = {client: sent.copies[copy] for client, copy in sent.assignment}
        deltas = [
            (difference(update.weights, received[update.client], self._parameters), update.examples)
            for update in updates
        ]
        step = self.average(deltas)
        mean = {name: base[name] + change for name, change in step.items()}
        weights = self.keep_statistics(mean, base)
        self.state = replace(self.state, base=self.cool(weights))
        if not (self.smoothing and self.state.noisy and self._delivered):
            return weights
        past = [(self._delivered, self.smoothing), (weights, 1 - self.smoothing)]
        return self.keep_statistics(weighted_mean(past), base)


def difference(returned: Weights, sent: Weights, names: Collection[str]) -> dict[str, Tensor]:
    """Return what a client changed: returned - sent, for the parameters ``names``."""
    return {name: returned[name] - sent[name] for name in sent if name in names}


def require_enough_images(cap: Cap) -> None:
    """Refuse a cap that the calibration images are too few to check.

    Noise can bring a copy down to guessing, and no further; so guessing has to pass the test.

    Raises:
        FedveilError: Even a copy that guesses could not be told from one at the cap.
    """
    images, classes = len(cap.shown), cap.shown.labels.bincount()
    guessing = float(classes.max()) / images
    limit = certifiable(images, cap.accuracy)
    if cap.bound == "labels" and limit < guessing:
        raise FedveilError(
            f"{images} calibration images are too few for a cap of {cap.accuracy:.0%}: they tell "
            f"an accuracy below {max(limit, 0):.0%} from the cap, and guessing the commonest class "
            f"is right on {guessing:.0%}. Use a larger test split, or raise --cap"
        )
