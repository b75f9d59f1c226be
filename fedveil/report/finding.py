"""A sentence of the verdict, and how its numbers are written."""

from collections.abc import Sequence
from dataclasses import dataclass

WORST_FIRST = ("bad", "unknown", "good")
"""Kinds of findings, in the order in which a page shows them."""


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict.

    Attributes:
        topic: What it is about.
        mark: The outcome in two or three words.
        kind: ``good``, ``bad`` or ``unknown``, for its colour and sign.
        sentence: One sentence.
    """

    topic: str
    mark: str
    kind: str
    sentence: str


def worst_of(findings: Sequence[tuple[Finding, tuple[float, ...]]]) -> Finding:
    """Return the worst of several findings, of one kind the one with the greatest numbers.

    Args:
        findings: At least one, each with numbers that are the greater the worse.
    """

    def badness(one: tuple[Finding, tuple[float, ...]]) -> tuple[float, ...]:
        finding, numbers = one
        return (-WORST_FIRST.index(finding.kind), *numbers)

    return max(findings, key=badness)[0]


def percent(share: float) -> str:
    """Return a share as text that never rounds up to all or down to nothing."""
    text = f"{share:.0%}" if share in (0, 1) or 0.1 <= share < 0.9 else f"{share:.1%}"
    if text == "100.0%" and share < 1:
        text = "over 99.9%"
    if text == "0.0%" and share > 0:
        text = "under 0.1%"
    return text.replace("%", "\N{NO-BREAK SPACE}%")


def points(gain: float) -> str:
    """Return a difference of accuracies in percentage points."""
    return f"{100 * gain:.1f} points"


def interval(low: float | None, high: float | None) -> str:
    """Return a 95 % interval of a share in brackets, or nothing where there is none.

    Resampling shows no spread where all or none were hit; such an interval would look like
    certainty.
    """
    if low is None or high is None or low == high:
        return ""
    return f" (95\N{NO-BREAK SPACE}% interval {percent(low)} to {percent(high)})"
