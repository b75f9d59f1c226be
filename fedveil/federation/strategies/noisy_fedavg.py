"""What both noise strategies share: degraded copies in place of the model, and a cap on them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from logging import WARNING
from typing import Unpack

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fedveil.copies.batch_statistics import reestimate_batch_norm
from fedveil.copies.calibration import (
    Blocks,
    Calibration,
    Copies,
    Evaluate,
    Verdict,
    agreement_margin,
    below_cap,
)
from fedveil.copies.noise import NoiseKey, NoiseTarget, add_noise, noise_target
from fedveil.copies.temperature import Temperature
from fedveil.errors import FedveilError
from fedveil.federation.evaluation import count_correct
from fedveil.federation.roster import Client, Sampling
from fedveil.federation.strategies.cap import Cap, claimed_accuracy, disagreement
from fedveil.federation.strategies.fedavg import Distribution, Resume, SeededFedAvg
from fedveil.federation.strategies.flower_arguments import FedAvgArguments
from fedveil.models import has_batch_norm
from fedveil.types import Weights

_BLOCK = 100
_BATCH_NORM_IMAGES = 500
_OWN = (
    "If the app normalises its images, give Cap a Dataset or DataLoader of what its model receives"
)


@dataclass(frozen=True)
class Calibrator:
    """Evaluates copies on the server's calibration images.

    Attributes:
        model: Architecture; takes on the weights of each copy.
        pixels: float [N, C, H, W] in [0, 1].
        labels: int64 [N] that a copy must not predict too often: the true ones, or w's own.
        seed: Seeds the order of the images.
    """

    model: nn.Module
    pixels: Tensor
    labels: Tensor
    seed: int

    def __call__(self, weights: Mapping[str, Tensor]) -> Blocks:
        """Evaluate block by block in random order; yields (correct, images)."""
        self.model.load_state_dict(dict(weights))
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.labels), generator=generator)
        for index in torch.split(order, _BLOCK):
            yield count_correct(self.model, self.pixels[index], self.labels[index]), len(index)


class NoisyFedAvg(SeededFedAvg):
    """Federated averaging in which clients receive w + σN or w - σN, never w.

    Until w passes the cap, copies are w itself. Then half of a round's clients receive one sign of
    the noise, half the other. Where the model keeps batch statistics, each copy carries its own.

    Args:
        model: Architecture, freshly initialised; its weights only give the output layer's scale.
        cap: The promise about copies.
        noise: Where the noise goes: ``first-conv``, ``output``, ``all`` or a pattern over the
            parameters' names.
        relative: Whether σ counts in units of each layer's root mean square.
        temperature: How much smaller than at the start the copies' logits are; ``None`` leaves
            them as training makes them.
        key: Secret of the noise; drawn from the operating system where it is not given.
        run: Name of the run, a part of what the noise is derived from.
        sampling: How each round chooses its clients.
        resume: Where an earlier process of the same run stopped.
        flower: FedAvg's own arguments, by their names.
    """

    keeps_cap = True

    def __init__(
        self,
        *,
        model: nn.Module,
        cap: Cap,
        noise: str = "all",
        relative: bool = True,
        temperature: float | None = None,
        key: NoiseKey | None = None,
        run: str = "run",
        sampling: Sampling | None = None,
        resume: Resume | None = None,
        **flower: Unpack[FedAvgArguments],
    ) -> None:
        super().__init__(sampling=sampling, resume=resume, **flower)
        cap.check_model(model)
        channels, height, width = cap.shown.raw.shape[1:]
        shape = (channels, height, width)
        # A copy, because evaluating a client's copy means taking on its weights.
        self.model = deepcopy(model).eval()
        self.cap = cap
        self.target: NoiseTarget = noise_target(model, shape, noise, relative=relative)
        self.temperature = Temperature.of(model, shape, temperature) if temperature else None
        self.run = run
        self._warned = False
        self._key = key or NoiseKey.generate()
        named = model.named_parameters(remove_duplicate=False)
        self._parameters = frozenset(name for name, _ in named)
        self._batch_norm = has_batch_norm(model)
        self._pixels = cap.shown.pixels

    @abstractmethod
    def calibrate(self, copies: Copies, evaluate: Evaluate, cap: float) -> Calibration:
        """Find the draw and the strength of a round's noise."""

    def distribute(
        self, round_number: int, weights: Weights, clients: Sequence[Client]
    ) -> Distribution:
        """Send w while it is below the cap, and w ± σN after."""
        base = self.state.base or weights
        self.state = replace(self.state, base=base)
        if not self.passed_cap(round_number, base):
            plain = self.marked(round_number, super().distribute(round_number, base, clients))
            labels, cap = self.yardstick(weights)
            checked = self._check(plain, self.evaluator(round_number, labels), cap)
            if all(verdict.below for verdict in checked):
                return _counted(plain, checked)
            self.state = replace(self.state, noisy=True)
        return self._degrade(round_number, base, weights, clients)

    @abstractmethod
    def passed_cap(self, round_number: int, base: Weights) -> bool:
        """Return whether this round's copies need noise, and remember it in the state."""

    def _degrade(
        self, round_number: int, base: Weights, weights: Weights, clients: Sequence[Client]
    ) -> Distribution:
        @cache
        def noise(draw: int) -> Weights:
            return self.target.draw(
                base, self._key, run=self.run, round_number=round_number, group=f"draw {draw}"
            )

        def copies(sigma: float, draw: int) -> tuple[Weights, Weights]:
            return self.pair(base, noise(draw), sigma)

        labels, cap = self.yardstick(weights)
        evaluate = self.evaluator(round_number, labels)
        found = self.calibrate(copies, evaluate, cap)
        half = -(-len(clients) // 2)
        assignment = tuple((client, int(i >= half)) for i, client in enumerate(clients))

        def addressed(sigma: float, draw: int) -> Distribution:
            sent = Distribution(copies(sigma, draw), assignment, sigma)
            return self.marked(round_number, sent)

        sent = addressed(found.sigma, found.draw)
        checked = self._check(sent, evaluate, cap)
        if checked and not checked[-1].below:
            # The shared copies are below the cap, but not every client's own: these are searched.
            first = found
            found = self.calibrate(lambda s, d: addressed(s, d).copies, evaluate, cap)
            sent = addressed(found.sigma, found.draw)
            found = replace(
                found,
                evaluations=found.evaluations + first.evaluations,
                images=found.images + first.images,
            )
        self.state = replace(self.state, sigma=found.sigma)
        return _counted(sent, checked, found)

    @staticmethod
    def _check(sent: Distribution, evaluate: Evaluate, cap: float) -> list[Verdict]:
        """Return the verdicts on the fingerprinted copies, up to and with the first to fail."""
        checked: list[Verdict] = []
        for copy in sent.copies if sent.shared else ():
            checked.append(below_cap(evaluate(copy), cap))
            if not checked[-1].below:
                break
        return checked

    @property
    def needs_statistics(self) -> bool:
        """No: clients' statistics are of noisy copies, so w's are measured on the server."""
        return not self._batch_norm

    def pair(self, base: Weights, noise: Weights, sigma: float) -> tuple[Weights, Weights]:
        """Return base + σN and base - σN, each with batch statistics of its own."""
        plus, minus = (self.with_statistics(add_noise(base, noise, s)) for s in (sigma, -sigma))
        return plus, minus

    def with_statistics(self, weights: Weights) -> Weights:
        """Return ``weights`` with batch statistics measured under them, where the model has any."""
        if not self._batch_norm:
            return weights
        return reestimate_batch_norm(self.model, weights, self._pixels[:_BATCH_NORM_IMAGES])

    def cool(self, weights: Weights) -> Weights:
        """Return ``weights`` at the strategy's temperature; their answers stay the same."""
        return self.temperature.apply(weights) if self.temperature else weights

    def yardstick(self, weights: Weights) -> tuple[Tensor, float]:
        """Return the labels a copy is judged by and the cap on its agreement with them.

        Without labels these are the answers of w. The cap on agreement is never put below twice
        chance: a copy that agrees with w no more than that holds nothing of it.
        """
        if self.cap.bound == "labels":
            return self.cap.shown.labels, self.cap.accuracy
        self.model.load_state_dict(dict(weights))
        with torch.inference_mode():
            logits = torch.cat([self.model(block) for block in torch.split(self._pixels, _BLOCK)])
        floor = min(2 / logits.shape[1], 0.75 * self.cap.accuracy)
        return logits.argmax(1), max(self.cap.accuracy - agreement_margin(logits), floor)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds as Flower does, the calibration compared with the app's own evaluation.

        Raises:
            FedveilError: They disagree about the same weights, so the cap would not hold.
        """
        if not self.cap.compared:
            compared = evaluate_fn
        elif evaluate_fn is None:
            self._cannot_tell("start was given no evaluate_fn")
            compared = None
        else:
            compared = self._compared(evaluate_fn)
        return super().start(
            grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, compared
        )

    def _compared(
        self, evaluate: Callable[[int, ArrayRecord], MetricRecord | None]
    ) -> Callable[[int, ArrayRecord], MetricRecord | None]:
        def compared(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            told = evaluate(server_round, arrays)
            claimed = claimed_accuracy(told)
            if claimed is None:
                self._cannot_tell("evaluate_fn tells no accuracy")
            elif self.cap.bound == "labels":
                blocks = self.evaluator(0, self.cap.shown.labels)(arrays.to_torch_state_dict())
                right, total = (sum(column) for column in zip(*blocks, strict=True))
                if wrong := disagreement(right, total, claimed):
                    raise FedveilError(wrong)
            return told

        return compared

    def _cannot_tell(self, why: str) -> None:
        if not self._warned and self.cap.evaluate is None:
            log(WARNING, "the cap is not compared with the app's own evaluation: %s. %s", why, _OWN)
        self._warned = True

    def evaluator(self, round_number: int, labels: Tensor) -> Evaluate:
        """Return the calibration evaluator of a round."""
        if self.cap.evaluate is not None:
            return self.cap.own_evaluation
        seed = 1_000_003 * self.sampling.seed + round_number
        return Calibrator(self.model, self._pixels, labels, seed)

    def keep_statistics(self, mean: Weights, base: Weights) -> Weights:
        """Return the averaged parameters with the server's own buffers around them.

        Clients' buffers were measured under noise, so w's are measured anew on the server.
        """
        state = {
            name: mean[name].to(value.dtype) if name in self._parameters else value
            for name, value in base.items()
        }
        return self.with_statistics(state)


def _counted(
    sent: Distribution, checked: Sequence[Verdict], found: Calibration | None = None
) -> Distribution:
    """Return ``sent`` with what it took to find and check it."""
    return replace(
        sent,
        evaluations=len(checked) + (found.evaluations if found else 0),
        images=sum(verdict.images for verdict in checked) + (found.images if found else 0),
    )


def require_labels(cap: Cap, strategy: str) -> None:
    """Refuse the label-free bound where a strategy has no use for it."""
    if cap.bound != "labels":
        raise FedveilError(
            f"bound {cap.bound!r} is for noise-delta; {strategy} follows the paper, whose loop "
            "evaluates accuracy: leave --bound out"
        )
