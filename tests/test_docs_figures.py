"""Every figure of the pages stands, rounded, in the results that its section links.

A row is bound to one record, an object or list of a result's JSON that holds all of its figures. As
a record holds more numbers than a row, some wrong figures would pass; how many is measured. A
measured figure of a sentence is bound to all numbers of those results, which lets more pass; what
was not measured is listed.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (
    *("defenses.md", "gradient-leakage.md", "inversion-suite.md", "model-theft.md", "tracing.md"),
)
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
SEVERAL = (
    "| a guarantee in writing",
    "|  | `dct:keep=10` |",
    "| sum of ten clients | `none` |",
    "|  | `noise:ratio=3` |",
)
FIGURE = re.compile(r"(?<![\w.:=/-])[-+−]?\d[\d,]*\.\d+(?![\w.])")
LARGEST_RECORD = 120
# What nobody measured: error rates, intervals, caps, the version of Flower.
GIVEN = frozenset({"1", "0.1", "5", "95", "60", "1.41"})
OF_A_ROW = {
    "deployment.md": frozenset({"0.1", "2.5", "0.25", "0.5"}),  # waits that are set, not measured
    "report.md": frozenset({"2.5"}),  # a rule of what it says
    "security.md": frozenset({"0.2", "1.0000000", "0.5", "0.85"}),  # what a test asserts
}
OF_A_PAGE = {
    "defenses.md": frozenset({"40"}),  # a threshold: 60 % must stay
    "report.md": frozenset({"0", "10", "100"}),  # rules of what it says
    "tracing.md": frozenset({"0.05"}),  # a default
}
# Tables that a command writes are compared with what it writes, in tests/test_readme.py.
GENERATED = re.compile(r"(?s)<!-- table: .*?<!-- end -->")
# What is no sentence: code, rows, headings, where links and pictures lead.
NO_PROSE = re.compile(
    r"(?ms)^```.*?^```|^\|[^\n]*|^#+ [^\n]*|`[^`]*`|!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)"
)
MEASURED = re.compile(
    r"(?<![\w.,:=/^-])[-+−]?\d[\d,]*(?:\.\d+)?(?=\s?(?:%|dB\b|points?\b|seconds?\b|ms\b|MB\b|GB\b))"
    r"|(?<![\w.,:=/^-])[-+−]?\d[\d,]*\.\d+(?![\w.])"
)


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
    text = GENERATED.sub("", (DOCS / page).read_text(encoding="utf-8"))
    left = ELSEWHERE.get(page, ())
    for section in re.split(r"(?m)^(?=## )", text):
        linked = results_of(section)
        known = [record for name in linked for record in records(name)]
        for line in section.splitlines() if known else ():
            if line.startswith("|") and not line.startswith(left or "\0"):
                bare = re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
                if figures := FIGURE.findall(bare):
                    several = [set().union(*known)] if line.startswith(SEVERAL) else []
                    yield line, figures, [*known, *several]


def results_of(section):
    """Return the results that a section links."""
    return sorted(set(re.findall(r"results/([\w.-]+\.json)", section)))


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
    assert len(found) >= 4
    assert [line for line, figures, known in found if not stands(figures, known)] == []


OTHERS = sorted(page for page in DOCS.glob("*.md") if page.name not in PAGES)


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_every_figure_of_the_other_pages_rows_stands_in_these_results(page):
    """A row of these is of several records: each figure stands in one of them."""
    given = OF_A_ROW.get(page.name, frozenset())
    loose = []
    for section in re.split(r"(?m)^(?=## )", GENERATED.sub("", page.read_text(encoding="utf-8"))):
        known = [everything(name) for name in results_of(section)]
        for line in section.splitlines():
            if line.startswith("|"):
                figures = set(FIGURE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", "", line))) - given
                loose += [(one, line) for one in figures if not stands([one], known)]
    assert loose == []


def test_about_half_of_wrong_last_digits_would_be_noticed():
    """One figure of each row is changed by one in its last digit."""
    noticed = []
    for page in PAGES:
        for place, (_, figures, known) in enumerate(rows(page)):
            at = place % len(figures)
            wrong = f"{number(figures[at]) + 10 ** -digits(figures[at]):.{digits(figures[at])}f}"
            noticed.append(not stands([*figures[:at], wrong, *figures[at + 1 :]], known))
    assert sum(noticed) >= 0.45 * len(noticed)


def sentences(page):
    """Yield each measured figure of a page's sentences, its words and the section's results."""
    for section in re.split(r"(?m)^(?=## )", GENERATED.sub("", page.read_text(encoding="utf-8"))):
        linked = results_of(section)
        prose = re.sub(r"\s+", " ", NO_PROSE.sub(" ", section))
        for found in MEASURED.finditer(prose):
            yield found[0], prose[max(0, found.start() - 60) : found.end() + 30], linked


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_figure_of_a_sentence_stands_in_the_results_that_its_section_links(page):
    given = GIVEN | OF_A_PAGE.get(page.name, frozenset())
    loose = [
        f"{figure}: …{words}…"
        for figure, words, linked in sentences(page)
        if figure.lstrip("+-−") not in given
        and not stands([figure], [everything(name) for name in linked])
    ]
    assert loose == []


def test_many_wrong_figures_of_sentences_would_be_noticed():
    noticed = []
    for page in DOCS.glob("*.md"):
        given = GIVEN | OF_A_PAGE.get(page.name, frozenset())
        for figure, _, linked in sentences(page):
            if figure.lstrip("+-−") not in given:
                off = number(figure) + 10 ** -digits(figure)
                known = [everything(name) for name in linked]
                noticed.append(not stands([f"{off:.{digits(figure)}f}"], known))
    assert sum(noticed) >= 0.4 * len(noticed)


@cache
def everything(name):
    """Return every number of a result, as a sentence may print it."""
    content = json.loads((DOCS / "results" / name).read_text(encoding="utf-8"))
    return frozenset(printed for n in leaves(content) for printed in forms(abs(n)))
