"""The thief's own yardstick: images it has labels for and leaves out of training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BATCH = 100
_FEW, _SOME = 30, 100


@dataclass(frozen=True)
class Fold:
    """One division of the labelled images.

    Attributes:
        train: int64 [K], what to learn from.
        held_out: int64 [N - K], what to check with.
    """

    train: Tensor
    held_out: Tensor


@dataclass(frozen=True, order=True)
class Score:
    """How a model does on held-out images; the greater is the better.

    Attributes:
        accuracy: Fraction classified rightly; decides.
        confidence: Minus the mean cross entropy; decides between equal accuracies, which are
            common with ten labels.
    """

    accuracy: float
    confidence: float


def folds(labels: int, *, seed: int) -> tuple[Fold, ...]:
    """Divide labelled images: five folds of fewer than 30, three of fewer than 100, else a quarter.

    Args:
        labels: How many images, at least 2.
        seed: Seeds the division.
    """
    order = torch.randperm(labels, generator=torch.Generator().manual_seed(seed))
    if labels >= _SOME:
        quarter = labels // 4
        return (Fold(order[quarter:], order[:quarter]),)
    parts = order.tensor_split(min(5 if labels < _FEW else 3, labels))
    return tuple(
        Fold(torch.cat([p for j, p in enumerate(parts) if j != i]), part)
        for i, part in enumerate(parts)
    )


def predict(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return logits [N, classes] in evaluation mode; ``model`` ends in channels-last memory.

    Args:
        model: Takes float [N, C, H, W].
        pixels: float [N, C, H, W] in [0, 1].
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.eval()
    with torch.inference_mode():
        blocks = [
            model(block.contiguous(memory_format=torch.channels_last))
            for block in torch.split(pixels, _BATCH)
        ]
    return torch.cat(blocks).clone()


def score(logits: Tensor, labels: Tensor) -> Score:
    """Score logits [N, classes] by labels, int64 [N]; what is not finite scores nothing."""
    if not torch.isfinite(logits).all():
        return Score(0.0, -float("inf"))
    accuracy = (logits.argmax(1) == labels).double().mean()
    return Score(float(accuracy), -float(F.cross_entropy(logits.double(), labels)))


def pooled(scores: Sequence[tuple[Score, int]]) -> Score:
    """Return the mean score of folds, each weighted by its number of held-out images."""
    total = sum(count for _, count in scores)
    return Score(
        sum(part.accuracy * count for part, count in scores) / total,
        sum(part.confidence * count for part, count in scores) / total,
    )
