"""How strong the noise must be for a copy to stay below the accuracy cap.

Three parts: a sequential test that stops as soon as the cap is decided, the paper's raising loop,
and a bracketing search that starts from the previous round's strength.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedveil.errors import UnreachableCapError

Blocks = Iterator[tuple[int, int]]
"""Evaluation in progress: (correct, evaluated) images of one block after the other."""

Copies = Callable[[float, int], tuple[Mapping[str, Tensor], ...]]
"""The copies at a strength σ of a numbered draw of the noise."""

Evaluate = Callable[[Mapping[str, Tensor]], Blocks]
"""Starts to evaluate a copy on calibration images drawn in random order."""


@dataclass(frozen=True)
class Verdict:
    """What an evaluation found.

    Attributes:
        below: Whether the accuracy is below the cap, beyond doubt.
        accuracy: Fraction of the evaluated images that were classified rightly.
        images: How many images it took.
    """

    below: bool
    accuracy: float
    images: int


@dataclass(frozen=True)
class Calibration:
    """The strength found for one round.

    Attributes:
        sigma: Strength of the noise, in the units of the noise target.
        draw: Number of the draw of the noise, from 0.
        evaluations: How many copies were evaluated on the way.
        images: How many images those evaluations took in all.
    """

    sigma: float
    draw: int
    evaluations: int
    images: int


def below_cap(blocks: Blocks, cap: float, *, error_rate: float = 1e-3) -> Verdict:
    """Decide by sequential test whether an accuracy lies below the cap.

    The binomial likelihood, averaged over a uniform prior on the accuracy and divided by its value
    at the cap, is a martingale when the accuracy equals the cap, so it ever reaches
    ``1 / error_rate`` with at most that probability (Ville's inequality). Watching it after every
    block is therefore free. Images that run out undecided count as not below.

    Source: Robbins, "Statistical methods related to the law of the iterated logarithm", Annals of
    Mathematical Statistics 41 (1970), section 3 (mixtures of likelihood ratios).

    Args:
        blocks: Evaluation in progress; consumed only as far as needed.
        cap: Accuracy a copy must stay below, in (0, 1).
        error_rate: Probability to pass a copy whose accuracy is the cap or more.
    """
    correct = images = 0
    for right, count in blocks:
        correct, images = correct + right, images + count
        if _log_evidence(correct, images, cap) >= -math.log(error_rate):
            return Verdict(correct < cap * images, correct / images, images)
    return Verdict(False, correct / max(images, 1), images)


def certifiable(images: int, cap: float, *, error_rate: float = 1e-3) -> float:
    """Return the highest accuracy on ``images`` images that ``below_cap`` would still pass.

    Returns:
        A fraction below ``cap``; negative where not even no right answer at all would do.
    """
    for correct in range(int(cap * images), -1, -1):
        below = correct < cap * images
        if below and _log_evidence(correct, images, cap) >= -math.log(error_rate):
            return correct / images
    return -1.0


def _log_evidence(correct: int, images: int, cap: float) -> float:
    wrong = images - correct
    log_beta = math.lgamma(correct + 1) + math.lgamma(wrong + 1) - math.lgamma(images + 2)
    return log_beta - correct * math.log(cap) - wrong * math.log1p(-cap)


def raise_until_below(
    copies: Copies,
    evaluate: Evaluate,
    *,
    cap: float,
    start: float,
    step: float,
    factor: float,
    limit: float,
) -> Calibration:
    """Raise σ turn by turn until every copy's accuracy is at most the cap: the paper's loop.

    Source: noise-based federated averaging, Algorithm 1, the ``while`` loop: each time round, the
    noise is drawn anew and every copy evaluated on all calibration images.

    Args:
        copies: The copies at a strength σ of a draw.
        evaluate: Starts an evaluation of one copy.
        cap: Accuracy that no copy may exceed, θ of the paper.
        start: First σ tried.
        step: Added at each further turn of the loop; not below 0.
        factor: What σ is multiplied by before that; not below 1, and above it if ``step`` is 0.
        limit: Largest σ tried.

    Raises:
        FedveilError: σ passed ``limit``.
    """
    evaluations = images = 0
    sigma, turn = start, 0
    while sigma <= limit * (1 + 1e-9):
        worst = 0.0
        for copy in copies(sigma, turn):
            right, count = (sum(column) for column in zip(*evaluate(copy), strict=True))
            worst = max(worst, right / count)
            evaluations, images = evaluations + 1, images + count
        if worst <= cap:
            return Calibration(sigma, turn, evaluations, images)
        sigma, turn = sigma * factor + step, turn + 1
    raise _out_of_reach(cap, limit)


def search_sigma(
    copies: Copies,
    evaluate: Evaluate,
    *,
    cap: float,
    start: float,
    limit: float,
    growth: float = 1.3,
    precision: float = 1.3,
    draws: int = 5,
) -> Calibration:
    """Bracket the weakest noise that keeps every copy below the cap, then bisect along the draw.

    Moves geometrically from ``start`` to a σ where all copies are below, and bisects (in the
    logarithm) between that and the strongest that failed, until the two are within ``precision``.
    A copy that fails ends its σ's turn at once, so a failure mostly costs one short evaluation.
    A first σ that holds is kept: the next round starts a little lower.

    A draw for which no σ up to ``limit`` suffices is given up for the next: as σ grows, a copy
    tends to the noise alone, and with few classes that may be right more often than the cap.

    Args:
        copies: The copies at a strength σ of a draw; all are verified at the σ returned.
        evaluate: Starts an evaluation of one copy.
        cap: Accuracy every copy must stay below.
        start: First σ tried, above 0.
        limit: Largest σ tried.
        growth: Factor between the σ tried on the way up, above 1.
        precision: Ratio of the bracket's ends at which bisection stops, above 1.
        draws: How many draws of the noise are tried.

    Raises:
        FedveilError: Not even ``limit`` keeps the copies below the cap, for any of the draws.
    """
    evaluations = images = 0

    def holds(sigma: float, draw: int) -> bool:
        nonlocal evaluations, images
        for copy in copies(sigma, draw):
            verdict = below_cap(evaluate(copy), cap)
            evaluations, images = evaluations + 1, images + verdict.images
            if not verdict.below:
                return False
        return True

    for draw in range(draws):
        bracket = _bracket(partial(holds, draw=draw), start, limit, growth)
        if bracket is None:
            continue
        failed, sigma = bracket
        while failed and sigma / failed > precision:
            middle = math.sqrt(failed * sigma)
            failed, sigma = (failed, middle) if holds(middle, draw) else (middle, sigma)
        return Calibration(sigma, draw, evaluations, images)
    raise _out_of_reach(cap, limit)


def _bracket(
    holds: Callable[[float], bool], start: float, limit: float, growth: float
) -> tuple[float, float] | None:
    failed, sigma = 0.0, start
    while not holds(sigma):
        if sigma >= limit:
            return None
        # Ever longer strides: a σ that ran away is caught up with in a few evaluations.
        failed, sigma, growth = sigma, min(sigma * growth, limit), growth**1.5
    return failed, sigma


def _out_of_reach(cap: float, limit: float) -> UnreachableCapError:
    return UnreachableCapError(
        f"no noise up to sigma {limit:g} keeps the copies below the cap of {cap:.0%}: the model "
        "has grown robust to this noise. Add noise to other layers (--noise), raise --cap, or "
        "lower the learning rate"
    )


def agreement_margin(logits: Tensor) -> float:
    """Estimate a model's error without labels: the mean of one minus its confidence.

    A copy's accuracy is at most its agreement with w plus w's error, so a copy whose agreement
    stays below the cap less this margin is below the cap, as long as w is not overconfident on the
    calibration images. An average of clients' models is as a rule underconfident, which errs on
    the safe side.

    Args:
        logits: float [N, classes] of w on unlabelled images.

    Returns:
        A fraction in [0, 1).
    """
    return float(1 - torch.softmax(logits.double(), dim=1).amax(dim=1).mean())
