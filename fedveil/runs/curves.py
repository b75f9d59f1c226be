"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedveil.files import write_atomically
from fedveil.pictures import BLUE, GREY, ORANGE, png
from fedveil.runs.directory import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curves(rounds: Sequence[RoundRecord], path: Path, *, cap: float | None) -> None:
    """Draw accuracy of w and of the distributed copies over the rounds.

    Args:
        rounds: At least one round.
        path: PNG to write.
        cap: Drawn as a line where there is one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    draw_curves_on(figure.subplots(), rounds, cap=cap)
    write_atomically(path, png(figure))


def draw_curves_on(axes: "Axes", rounds: Sequence[RoundRecord], *, cap: float | None) -> None:
    """Draw the same on given axes."""
    number = [record.round for record in rounds]
    axes.plot(number, [r.accuracy for r in rounds], color=BLUE, label="w, kept by the server")
    if cap is not None:
        high = [max(r.copies) for r in rounds]
        low = [min(r.copies) for r in rounds]
        axes.fill_between(number, low, high, color=ORANGE, alpha=0.3, linewidth=0)
        axes.plot(number, high, color=ORANGE, linestyle="--", label="best copy a client received")
        axes.axhline(cap, color=GREY, linestyle=":", label=f"cap {cap:.0%}")
    axes.set(xlabel="round", ylabel="accuracy on report images", ylim=(0, 1))
    axes.grid(alpha=0.2)
    axes.legend(loc="lower right", fontsize=8)
