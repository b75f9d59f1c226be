"""The thief's own yardstick: images it has labels for and leaves out of training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.models.layout import memory_layout

_BATCH = 100
_FEW, _SOME = 30, 100
_NO_CONFIDENCE = -1e9
_SCALES = (0.0, *(2.0**power for power in range(-8, 9)))


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
        confidence: Minus the mean cross entropy, at the temperature that suits the logits best;
            decides between equal accuracies, which are common with ten labels. Without the
            temperature, which is fitted for all models alike, it would prefer whatever is unsure.
    """

    accuracy: float
    confidence: float


def folds(labels: int, *, seed: int) -> tuple[Fold, ...]:
    """Divide labelled images: five folds of fewer than 30, three of fewer than 100, else a quarter.

    Args:
        labels: How many images, at least 2; of none there is no fold.
        seed: Seeds the division.
    """
    if not labels:
        return ()
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
    """Return logits [N, classes] in evaluation mode; ``model`` ends in its fastest layout.

    Args:
        model: Takes float [N, C, H, W].
        pixels: float [N, C, H, W] in [0, 1].
    """
    layout = memory_layout(model, pixels[:1])
    model.eval()
    with torch.inference_mode():
        blocks = [
            model(block.contiguous(memory_format=layout)) for block in torch.split(pixels, _BATCH)
        ]
    return torch.cat(blocks).clone()


def score(logits: Tensor, labels: Tensor) -> Score:
    """Score logits [N, classes] by labels, int64 [N]; what is not finite scores nothing."""
    if not torch.isfinite(logits).all():
        return Score(0.0, _NO_CONFIDENCE)
    accuracy = (logits.argmax(1) == labels).double().mean()
    losses = [float(F.cross_entropy(logits.double() * scale, labels)) for scale in _SCALES]
    return Score(float(accuracy), -min(losses))


def score_folds(folds: Sequence[Fold], labels: Tensor, logits: Iterable[Tensor]) -> Score:
    """Score what each fold's model says to the fold's held-out images, all folds as one.

    Args:
        folds: The divisions.
        labels: int64 [N], of all labelled images.
        logits: For each fold those of its held-out images, float [K, classes].

    Returns:
        Where there is no fold, for want of labels, the least score.
    """
    if not folds:
        return Score(0.0, _NO_CONFIDENCE)
    return score(torch.cat(list(logits)), labels[torch.cat([fold.held_out for fold in folds])])
