"""What a figure about attacked images is called: in JSON, on the console, in report and docs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXACTLY = 40.0
"""PSNR in dB beyond which an image is rebuilt exactly: what is left is rounding."""


@dataclass(frozen=True, kw_only=True)
class Score:
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
    share: bool = False
    earlier: tuple[str, ...] = ()


EXACT = Score(
    key="exact",
    heading="exact",
    meaning="Rebuilt up to rounding, over 40 dB; of a transformed image it is T(x), and says so.",
    share=True,
)
IDENTIFIED = Score(
    key="identified",
    heading="identified",
    meaning="The original is nearer to what was rebuilt from its update than 99 others are.",
    share=True,
)
PICKED_OUT = Score(
    key="picked_out",
    heading="picked out",
    meaning="It scores above 99 others by the update alone; nothing is rebuilt.",
    share=True,
    earlier=("recognised",),
)
LABELS = Score(
    key="label_accuracy",
    heading="labels",
    meaning="Its label is read off the update.",
    share=True,
)
TO_ORIGINAL = Score(
    key="psnr_original",
    heading="dB to original",
    meaning="PSNR of what was rebuilt to the image as its owner has it, median.",
)
TO_TRAINED = Score(
    key="psnr_trained",
    heading="dB to T(x)",
    meaning="The same to what the client trained on: the image, or what a transformation left.",
)
SECONDS = Score(
    key="seconds_per_image",
    heading="s/image",
    meaning="Seconds an image that the attack took.",
)
CERTAIN = Score(
    key="certain",
    heading="certain",
    meaning="The attack calls the image used beyond doubt.",
    share=True,
)
AUC = Score(
    key="auc",
    heading="AUC",
    meaning="Area under the curve of images that were used against others; 0.5 is guessing.",
)
FOUND = Score(
    key="tpr_at_1",
    heading="found at FPR 1 %",
    meaning="Used images called used where 1 % of others are.",
    share=True,
)
FOUND_SURELY = Score(
    key="tpr_at_01",
    heading="found at FPR 0.1 %",
    meaning="The same where 0.1 % of others are.",
    share=True,
)

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
