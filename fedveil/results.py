"""What a figure about attacked images is called: in JSON, on the console, in report and docs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXACTLY = 40.0
"""PSNR in dB beyond which an image is rebuilt exactly: what is left is rounding."""

_NO_BETTER = 0.02


@dataclass(frozen=True)
class Term:
    """A figure about attacked images.

    Attributes:
        key: In JSON; ``KEY_low`` and ``KEY_high`` are its 95 % interval, ``KEY_floor`` is what
            images without content get from the same scorer.
        heading: Over its column, everywhere.
        meaning: What it says, in a sentence.
        share: Whether it is a share of images.
        earlier: Keys that earlier versions wrote it under.
    """

    key: str
    heading: str
    meaning: str
    share: bool = True
    earlier: tuple[str, ...] = ()


EXACT = Term(
    "exact",
    "exact",
    "Rebuilt up to rounding, over 40 dB; where an image is transformed, T(x) is, and it says so.",
)
IDENTIFIED = Term(
    "identified",
    "identified",
    "The original is nearer to what was rebuilt from its update than 99 other images are.",
)
PICKED_OUT = Term(
    "picked_out",
    "picked out",
    "The image scores above 99 others by the update alone; nothing is rebuilt.",
    earlier=("recognised",),
)
LABELS = Term("label_accuracy", "labels", "Its label is read off the update.")
TO_ORIGINAL = Term(
    "psnr_original",
    "dB to original",
    "PSNR of what was rebuilt to the image as its owner has it, median.",
    share=False,
)
TO_TRAINED = Term(
    "psnr_trained",
    "dB to T(x)",
    "PSNR to T(x), what the client trained on: the image, or what a transformation left of it.",
    share=False,
)
SECONDS = Term(
    "seconds_per_image", "s/image", "Seconds an image that the attack took.", share=False
)
CERTAIN = Term("certain", "certain", "The attack calls the image used beyond doubt.")
AUC = Term(
    "auc",
    "AUC",
    "Area under the curve of images that were used against others; 0.5 is guessing.",
    share=False,
)
FOUND = Term("tpr_at_1", "found at FPR 1 %", "Used images called used where 1 % of others are.")
FOUND_SURELY = Term("tpr_at_01", "found at FPR 0.1 %", "The same where 0.1 % of others are.")

SCORES = (
    *(EXACT, IDENTIFIED, PICKED_OUT, LABELS, TO_ORIGINAL, TO_TRAINED, SECONDS),
    *(CERTAIN, AUC, FOUND, FOUND_SURELY),
)
"""All of them, in the order of their columns."""

SHARES = frozenset(score.key for score in SCORES if score.share)

_TODAY = {
    f"{old}{end}": f"{score.key}{end}"
    for score in SCORES
    for old in score.earlier
    for end in ("", "_low", "_high", "_floor")
}


def renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of any version under the keys of this one."""
    return {_TODAY.get(key, key): value for key, value in row.items()}


def exact_of(row: Mapping[str, Any]) -> str:
    """Return what is exact where an image of a row is: nothing to say, or ``" of T(x)"``.

    Args:
        row: Of ``leakage.json``: ``psnr_ceiling`` is how near T(x) is to the image itself.
    """
    ceiling = row.get("psnr_ceiling")
    return " of T(x)" if ceiling is not None and ceiling < EXACTLY else ""


def learnt_nothing(accuracy: float, chance: float, images: int) -> bool:
    """Say whether a model is no better than naming the commonest class.

    Args:
        accuracy: Of the model, on ``images`` images.
        chance: Of naming the commonest class, on the same.
        images: How many they are.
    """
    slack = 3 * math.sqrt(chance * (1 - chance) / max(images, 1))
    return accuracy <= chance + max(slack, _NO_BETTER)
