"""Levenberg–Marquardt on the gradient residual: exact recovery where no closed form applies."""

import time
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import jvp, vmap

from fedveil.attacks.inversion.gradients import (
    Gradient,
    GradientMap,
    check_attackable,
    infer_labels,
    survived,
    surviving,
)
from fedveil.attacks.inversion.observation import (
    Inversion,
    Observation,
    Progress,
    UpdateKnowledge,
    Uses,
)
from fedveil.attacks.inversion.rgap import RGAP
from fedveil.attacks.inversion.subspace import Subspace, range_of
from fedveil.errors import InapplicableAttackError

_MOST = 8
_SOLVED = 1e-7  # squared relative residual: calibrated on training images, it means over 50 dB
_EXHAUSTED = 1e-12  # float32 rounding of the observation
_ROUNDINGS = 4.0
_STALLED = 0.9
_TRIES = 8
_ROWS = 2  # sketched equations for each unknown
_GREY, _NOISE = 0.5, 0.1


@dataclass(frozen=True)
class _Problem:
    """One victim's equations ``gradient(images(u)) = observed`` in the unknowns u."""

    map: GradientMap
    subspace: Subspace
    labels: Tensor
    observed: Gradient
    sanitizer: UpdateKnowledge | None
    bins: Tensor | None
    signs: Tensor

    def residual(self, unknowns: Tensor) -> Tensor:
        images = self.subspace.images(unknowns.reshape(len(self.labels), -1))
        gradient = self.map(images, self.labels)
        dummy, left = surviving(gradient, self.observed, self.sanitizer)
        return torch.cat([(dummy[name] - left[name]).flatten() for name in left])

    def loss(self, unknowns: Tensor) -> float:
        with torch.no_grad():
            missed = self.residual(unknowns)
        _, left = surviving(self.observed, self.observed, self.sanitizer)
        size = sum(float(value.square().sum()) for value in left.values())
        return float(missed.square().sum()) / max(size, 1e-30)

    def sketch(self, rows: Tensor) -> Tensor:
        # Random signs and sums keep the solution of consistent equations, at two rows an unknown
        # instead of one a weight.
        if self.bins is None:
            return rows
        short = rows.new_zeros(len(rows), int(self.bins.max()) + 1)
        return short.index_add_(1, self.bins, rows * self.signs)

    def normal_equations(self, unknowns: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        def along(direction: Tensor) -> Tensor:
            return jvp(self.residual, (unknowns,), (direction,))[1]  # type: ignore[no-any-return]

        directions = torch.eye(len(unknowns)).to(unknowns)
        with torch.no_grad():
            slopes = torch.cat(
                [self.sketch(vmap(along)(part)) for part in torch.split(directions, columns)]
            )
            missed = self.sketch(self.residual(unknowns)[None])[0]
        return slopes @ slopes.T, slopes @ missed


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt:
    """Solve for the image whose gradient is the observed one, by damped Gauss–Newton steps.

    The label is read off the last layer. The Jacobian of the gradient with respect to the unknowns
    comes from batched forward-mode derivatives in blocks of columns and is sketched at once, so
    memory holds two rows an unknown whatever the model's size. A start is given up at the first
    step that does not take a tenth off the attacker's own loss: those that find the solution take
    more, and the next start is the better use of the time.

    Sources: the residual is that of Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019; the
    damping is Marquardt's, "An Algorithm for Least-Squares Estimation of Nonlinear Parameters",
    1963; the start in closed form is ``RGAP``.

    Args:
        steps: Most steps for each victim and start.
        restarts: Most cold starts (grey plus noise); later ones are tried only where the
            attacker's own loss shows no solution, and the lowest loss is kept.
        closed_form: Start from the closed form where the model allows it; a victim whose gradient
            is then explained needs no step.
        columns: Columns of the Jacobian computed at once; memory grows with it.
        dtype: float32, or float64 at twice the time for systems so stiff that float32 stalls.
        device: Where to compute; None for a GPU when there is one.
        seed: Seeds the cold starts and the sketch.

    Raises:
        FedveilError: On a call, what ``check_attackable`` refuses, a batch of more than 8, or
            fewer known entries of the update than unknowns.

    Example:
        >>> LevenbergMarquardt(steps=20)(observation).images  # doctest: +SKIP
    """

    uses: ClassVar = Uses(linear=True, sanitizer=True)

    steps: int = 20
    restarts: int = 3
    closed_form: bool = True
    columns: int = 64
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    seed: int = 0

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images."""
        begin = time.perf_counter()
        check_attackable(observation, attack="lm", most=_MOST)
        search = _Search(self, observation)
        found = self._closed_form(observation)
        shared = (time.perf_counter() - begin) / observation.victims
        seconds = []
        for victim in range(observation.victims):
            begin = time.perf_counter()
            if found is None or float(found.loss[victim]) > search.solved:
                search.run(victim, None if found is None else found.images[victim])
            else:
                search.accept(found.images[victim], float(found.loss[victim]))
            seconds.append(shared + time.perf_counter() - begin)
            if progress:
                progress(victim + 1, observation.victims, search.losses[-1])
        return Inversion(
            images=torch.stack(search.images),
            labels=search.labels,
            loss=torch.tensor(search.losses, dtype=torch.float64),
            seconds=torch.tensor(seconds),
            iterations=torch.tensor(search.iterations),
        )

    def _closed_form(self, observation: Observation) -> Inversion | None:
        # The closed form takes every equation at its word; what a sanitiser destroyed is none.
        if not self.closed_form or observation.images > 1 or observation.sanitizer is not None:
            return None
        try:
            return RGAP()(observation)
        except InapplicableAttackError:
            return None


@dataclass
class _Search:
    """The victims' results as they come in."""

    attack: LevenbergMarquardt
    observation: Observation
    images: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = self.attack.device or gpu
        like = torch.zeros((), dtype=self.attack.dtype, device=self.device)
        self.subspace = range_of(self.observation.knows, self.observation.shape).to(like)
        self.map = GradientMap.of(self.observation, dtype=self.attack.dtype, device=self.device)
        self.labels = infer_labels(self.observation).cpu()
        self.solved = max(_SOLVED, _ROUNDINGS * self.observation.rounding)
        self.generator = torch.Generator().manual_seed(self.attack.seed)
        unknowns = self.subspace.size * self.observation.images
        observed = self._observed(0)
        self._check_determined(observed, unknowns)
        _, left = surviving(observed, observed, self.observation.sanitizer)
        weights = sum(value.numel() for value in left.values())
        rows = min(weights, _ROWS * unknowns + 64)
        self.bins: Tensor | None = None
        if rows < weights:
            bins = torch.cat(
                [
                    torch.arange(rows),
                    torch.randint(rows, (weights - rows,), generator=self.generator),
                ]
            )
            self.bins = bins[torch.randperm(weights, generator=self.generator)].to(self.device)
        signs = torch.randint(2, (weights,), generator=self.generator) * 2 - 1
        self.signs = signs.to(like)

    def _check_determined(self, observed: Gradient, unknowns: int) -> None:
        """Refuse what has many exact solutions; each step would find one, and none the image."""
        told = survived(observed, self.observation.sanitizer)
        equations = sum(int(where.sum()) for where in told.values())
        if equations < unknowns:
            raise InapplicableAttackError(
                f"attack lm solves for {unknowns} unknowns, and {equations} entries of the update "
                "tell of them; use --attack ig, whose prior fills in the rest"
            )

    def accept(self, images: Tensor, loss: float, iterations: int = 0) -> None:
        self.images.append(images.detach().cpu().double())
        self.losses.append(loss)
        self.iterations.append(iterations)

    def run(self, victim: int, start: Tensor | None) -> None:
        problem = self._problem(victim)
        starts = [] if start is None else [start.to(self.device, self.attack.dtype).clamp(0, 1)]
        best: tuple[float, Tensor] | None = None
        spent = 0
        floor = max(_EXHAUSTED, self.observation.rounding)
        for attempt in range(len(starts) + self.attack.restarts):
            images = starts[attempt] if attempt < len(starts) else self._cold()
            unknowns = self.subspace.coordinates(images).flatten()
            unknowns, loss, steps = _descend(problem, unknowns, self.attack, floor)
            spent += steps
            if best is None or loss < best[0]:
                best = loss, unknowns
            if best[0] <= self.solved or attempt < len(starts):
                break
        assert best is not None
        flat = best[1].reshape(self.observation.images, -1)
        self.accept(self.subspace.images(flat), best[0], spent)

    def _problem(self, victim: int) -> _Problem:
        return _Problem(
            map=self.map,
            subspace=self.subspace,
            labels=self.labels[victim].to(self.device),
            observed=self._observed(victim),
            sanitizer=self.observation.sanitizer,
            bins=self.bins,
            signs=self.signs,
        )

    def _observed(self, victim: int) -> dict[str, Tensor]:
        gradients = self.observation.gradients
        return {
            name: gradients[name][victim].detach().to(self.device, self.attack.dtype)
            for name in self.map.parameters
        }

    def _cold(self) -> Tensor:
        shape = (self.observation.images, *self.observation.shape)
        noise = torch.randn(shape, generator=self.generator) * _NOISE + _GREY
        return noise.to(self.device, self.attack.dtype)


def _descend(
    problem: _Problem, unknowns: Tensor, attack: LevenbergMarquardt, floor: float
) -> tuple[Tensor, float, int]:
    damping = 1e-3
    loss = problem.loss(unknowns)
    step = 0
    while step < attack.steps and loss > floor:
        step += 1
        normal, slope = problem.normal_equations(unknowns, attack.columns)
        before = loss
        ridge = torch.eye(len(normal)).to(normal) * normal.diagonal().mean()
        for _ in range(_TRIES):
            factor, failed = torch.linalg.cholesky_ex(normal + damping * ridge)
            if not failed:
                moved = unknowns - torch.cholesky_solve(slope[:, None], factor)[:, 0]
                reached = problem.loss(moved)
                if reached < loss:
                    unknowns, loss, damping = moved, reached, damping / 10
                    break
            damping *= 4
        if not loss < _STALLED * before:
            break
    return unknowns, loss, step
