"""Every row of figures in the pages' tables stands, rounded, in the results that the section links.

A row is bound to one record, an object or list of a result's JSON that holds all of its figures. As
a record holds more numbers than a row, some wrong figures would pass; how many is measured.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("defenses.md", "gradient-leakage.md", "inversion-suite.md", "model-theft.md", "tracing.md")
# Rows of what others published, beside ours; and times, which are no result's own.
ELSEWHERE = {
    "gradient-leakage.md": ("| lm | 100 | 100%", "| rgap | 100 | 100%"),
    "inversion-suite.md": (
        *("| LeNet, L-BFGS on", "| | | `idlg` 36.2", "| | | `rgap` and `lm` 91.6"),
        *("| DLG, ConvNet", "| | | `dlg` on cnn", "| ResNet, trained", "| ResNet, fresh"),
        "| batch of 100, CIFAR-100",
    ),
}
# A row over several batches, each a record of its own.
SEVERAL = ("|  | `dct:keep=10` |", "| sum of ten clients | `none` |", "|  | `noise:ratio=3` |")
FIGURE = re.compile(r"(?<![\w.:=/-])[-+−]?\d[\d,]*\.\d+(?![\w.])")
LARGEST_RECORD = 120


def leaves(content):
    """Yield every number of some JSON."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from leaves(value)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield float(content)


def parts(content):
    """Yield every object and list of some JSON, and each object without what it nests."""
    if isinstance(content, dict | list):
        yield content
        if isinstance(content, dict):
            yield {
                key: value for key, value in content.items() if not isinstance(value, dict | list)
            }
        for value in content.values() if isinstance(content, dict) else content:
            yield from parts(value)


@cache
def records(name):
    """Return the numbers of each record of a result, as a table may print them."""
    content = json.loads((DOCS / "results" / name).read_text(encoding="utf-8"))
    numbers = (set(leaves(part)) for part in parts(content))
    kept = {frozenset(some) for some in numbers if 0 < len(some) <= LARGEST_RECORD}
    return [{printed for n in some for printed in forms(abs(n))} for some in kept]


def forms(value):
    """Return a number as a table may print it: itself, a share in per cent, millions as such."""
    if value <= 1:
        return (value, 100 * value)
    return (value, value / 1e3, value / 1e6) if value >= 1_000 else (value,)


def rows(page):
    """Yield each row with figures, and the records it may be of."""
    text = (DOCS / page).read_text(encoding="utf-8")
    left = ELSEWHERE.get(page, ())
    for section in re.split(r"(?m)^(?=## )", text):
        linked = sorted(set(re.findall(r"results/([\w.-]+\.json)", section)))
        known = [record for name in linked for record in records(name)]
        for line in section.splitlines() if known else ():
            if line.startswith("|") and not line.startswith(left or "\0"):
                bare = re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
                if figures := FIGURE.findall(bare):
                    several = [set().union(*known)] if line.startswith(SEVERAL) else []
                    yield line, figures, [*known, *several]


def stands(figures, known):
    """Say whether one record has all figures, each to its last digit."""
    asked = [(abs(number(figure)), 0.5 * 10 ** -digits(figure) + 1e-9) for figure in figures]
    return any(
        all(any(abs(value - figure) <= slack for value in record) for figure, slack in asked)
        for record in known
    )


def number(figure):
    return float(figure.replace(",", "").replace("−", "-"))


def digits(figure):
    return len(figure.partition(".")[2])


@pytest.mark.parametrize("page", PAGES)
def test_every_row_stands_in_the_results_that_its_section_links(page):
    found = list(rows(page))
    assert len(found) >= 5
    assert [line for line, figures, known in found if not stands(figures, known)] == []


def test_about_half_of_wrong_last_digits_would_be_noticed():
    """One figure of each row is changed by one in its last digit."""
    noticed = []
    for page in PAGES:
        for place, (_, figures, known) in enumerate(rows(page)):
            at = place % len(figures)
            wrong = f"{number(figures[at]) + 10 ** -digits(figures[at]):.{digits(figures[at])}f}"
            noticed.append(not stands([*figures[:at], wrong, *figures[at + 1 :]], known))
    assert sum(noticed) >= 0.45 * len(noticed)


def test_means_over_seeds_of_both_ways():
    content = json.loads((DOCS / "results/analytic-membership.json").read_text(encoding="utf-8"))
    text = (DOCS / "both-ways.md").read_text(encoding="utf-8")
    table = text[text.index("| images a feature | AUC |") :].split("\n\n")[0].splitlines()[2:]

    def mean(ratio, epsilon, name):
        found = [
            row[name]
            for row in content["rows"]
            if (row["ratio"], row["epsilon"]) == (ratio, epsilon)
        ]
        assert len(found) == 3
        return sum(found) / 3

    assert len(table) >= 5
    for line in table:
        ratio, *told = (float(cell.strip(" %")) for cell in line.strip("|").split("|"))
        wide, narrow, first, second, third = (
            mean(ratio, None, "auc"),
            100 * mean(ratio, None, "tpr_at_1"),
            100 * mean(ratio, None, "tpr_at_01"),
            mean(ratio, 8.0, "auc"),
            100 * mean(ratio, 8.0, "tpr_at_1"),
        )
        for shown, true in zip(told, (wide, narrow, first, second, third), strict=True):
            assert shown == pytest.approx(true, rel=0.05, abs=0.06), (line, true)
