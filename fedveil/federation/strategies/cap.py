"""The cap on what a client's copy may be able to do, and what it is measured with."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from flwr.app import MetricRecord
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedveil.copies.calibration import Blocks
from fedveil.data import Images
from fedveil.errors import FedveilError

_BATCH = 100
_CHANNELS = (1, 3)
# Transformed pixels overshoot a little; normalised ones lie far outside.
_LEAST, _MOST = -0.5, 1.5
_SLACK = 0.03
_DEVIATIONS = 3.0
_LABELS = ("label", "labels", "fine_label", "target", "y")


@dataclass(frozen=True)
class Cap:
    """The promise about copies, and what it is checked with.

    Attributes:
        accuracy: θ: accuracy every copy stays below, in (0, 1).
        images: Calibration images, which no report uses: ``Images`` of pixels in [0, 1] for a
            model that takes those, or what the app's own model receives, normalised where the app
            normalises: a ``DataLoader``, or a ``Dataset`` of (image, label) pairs.
        bound: ``labels`` checks the accuracy; ``agreement`` needs no labels and checks the bound
            agreement with w + estimated error of w.
        evaluate: The app's own evaluation, from weights to (right, total), in place of the
            accuracy on ``images``; these then only show the model's input.
        compared: Whether the strategy holds its calibration against the accuracy that the app's
            ``evaluate_fn`` tells of the same weights. False only where both see the same pixels.

    Raises:
        FedveilError: The accuracy is no fraction, or the images are none.
    """

    accuracy: float
    images: object
    bound: Literal["labels", "agreement"] = "labels"
    evaluate: Callable[[Mapping[str, Tensor]], tuple[int, int]] | None = None
    compared: bool = True
    shown: Images = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        accuracy = self.accuracy
        if isinstance(accuracy, bool) or not isinstance(accuracy, int | float):
            raise FedveilError(f"Cap(accuracy={accuracy!r}) is no number: give one such as 0.6")
        if not 0 < accuracy < 1:
            raise FedveilError(
                f"Cap(accuracy={accuracy!r}) is out of range: give a fraction between 0 and 1, "
                "0.6 for 60 %"
            )
        if self.evaluate is not None and self.bound != "labels":
            raise FedveilError("Cap(evaluate=…) measures accuracy: leave bound out")
        object.__setattr__(self, "shown", _shown(self.images))

    def own_evaluation(self, weights: Mapping[str, Tensor]) -> Blocks:
        """Evaluate a copy as the app does; yields one (right, total).

        Raises:
            FedveilError: The evaluation returned something else.
        """
        assert self.evaluate is not None
        told = self.evaluate(weights)
        try:
            right, total = (int(number) for number in told)
        except (TypeError, ValueError):
            right, total = -1, 0
        if not 0 <= right <= total or not total:
            raise FedveilError(f"Cap(evaluate=…) returned {told!r}: return (right, total)")
        yield right, total

    def check_model(self, model: nn.Module) -> None:
        """Refuse images that the model cannot take.

        Raises:
            FedveilError: It fails on one, or has fewer classes than the labels.
        """
        image = self.shown.pixels[:1]
        training = model.training
        try:
            with torch.inference_mode():
                logits = model.eval()(image)
        except RuntimeError as error:
            raise FedveilError(
                f"the model does not take Cap's images of shape {tuple(image.shape[1:])}: {error}"
            ) from None
        finally:
            model.train(training)
        most = int(self.shown.labels.max())
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] <= most:
            raise FedveilError(
                "the model must answer Cap's images with logits [N, classes], more classes than "
                f"the largest label, {most}"
            )


def _shown(images: object) -> Images:
    if isinstance(images, Images):
        raw = images.raw
        if raw.is_floating_point() and len(images):
            least, most = float(raw.min()), float(raw.max())
            if not (least >= _LEAST and most <= _MOST):
                raise FedveilError(
                    f"Cap's images lie in [{least:.3g}, {most:.3g}]: Images hold uint8, or floats "
                    "in [0, 1]. If the model takes normalised ones, give Cap a Dataset of them"
                )
        return _checked(images)
    if isinstance(images, tuple | list | Tensor) or not hasattr(images, "__getitem__"):
        if not isinstance(images, DataLoader):
            raise FedveilError(
                f"Cap's images are a {type(images).__name__}: give fedveil.data.Images, a "
                "DataLoader, or a Dataset of (image, label) pairs such as TensorDataset"
            )
        batches: Iterable[Any] = images
    else:
        batches = DataLoader(images, batch_size=_BATCH)  # type: ignore[arg-type]
    pairs = [_pair(batch) for batch in batches]
    if not pairs:
        raise FedveilError("Cap's images are none at all: give at least a hundred")
    pixels, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
    # As the model receives them: bytes would be divided by 255 once more.
    return _checked(Images(pixels.to(torch.float32), labels.to(torch.int64)))


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        found = [x for x in batch.values() if isinstance(x, Tensor) and x.ndim == 4]
        parts = [*found, *(batch[name] for name in _LABELS if name in batch)]
    else:
        parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    images, labels = parts if len(parts) == 2 else (None, None)
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise FedveilError(
            "Cap's batches must hold images [N, C, H, W] and labels [N], as a pair or by name"
        )
    return images, labels


def _checked(images: Images) -> Images:
    raw, labels = images.raw, images.labels
    if raw.ndim != 4 or labels.shape != raw.shape[:1] or not len(labels):
        raise FedveilError(
            f"Cap's images have shape {tuple(raw.shape)} and its labels {tuple(labels.shape)}: "
            "give [N, C, H, W] and [N]"
        )
    if raw.shape[1] not in _CHANNELS and raw.shape[3] in _CHANNELS:
        raise FedveilError(
            f"Cap's images have shape {tuple(raw.shape)}, channels last: give [N, C, H, W], by "
            "images.permute(0, 3, 1, 2)"
        )
    if raw.is_floating_point() and not bool(raw.isfinite().all()):
        raise FedveilError("Cap's images hold NaN or infinity")
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise FedveilError("Cap's labels must be whole numbers from 0")
    return images


def claimed_accuracy(told: MetricRecord | None) -> float | None:
    """Return the accuracy in an app's metrics, as a fraction; None where there is none."""
    for name, value in (told or {}).items():
        if "acc" in name.lower() and isinstance(value, int | float) and 0 <= value <= 100:
            return value / 100 if value > 1 else float(value)
    return None


def disagreement(right: int, total: int, claimed: float) -> str | None:
    """Return what is wrong where a calibration and an app's evaluation differ beyond chance.

    Args:
        right: Calibration images that were classified rightly.
        total: Calibration images.
        claimed: Accuracy by the app's own evaluation, a fraction.
    """
    found = right / total
    spread = math.sqrt(max(found * (1 - found), claimed * (1 - claimed), 1 / total) / total)
    if abs(found - claimed) <= _SLACK + _DEVIATIONS * spread:
        return None
    return (
        f"the same weights have an accuracy of {found:.1%} on Cap's {total} images and of "
        f"{claimed:.1%} by the app's own evaluation, so the cap would not hold: give Cap a Dataset "
        "or DataLoader of what the app's model receives (normalised as in the app), or evaluate="
    )
