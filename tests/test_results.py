"""One word for one thing: in JSON, on the console, in the report, in studies and docs."""

import json
import re
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fedveil.audit.leakage import LeakageReport, Row
from fedveil.audit.metrics import ROC_HEAD
from fedveil.audit.settings import LeakageSettings
from fedveil.report import build_page, read_artifacts
from fedveil.report.artifacts import FrontierRow, LeakageRow
from fedveil.results import EXACT, IDENTIFIED, PICKED_OUT, SCORES, exact_of, renamed
from fedveil.studies.dct import DctStudy
from fedveil.studies.frontier import FrontierStudy
from tests.report.report_material import (
    frontier_row,
    leakage_row,
    make_egress,
    make_frontier,
    make_leakage,
    make_sums,
)

ROOT = Path(__file__).parents[1]
HEADINGS = tuple(score.heading for score in SCORES)
# What such a figure might be called.
SAID = re.compile(
    r"exact|identif|pick|match|recogn|rebuilt|\bfound\b|\bmember\b|tpr|auc|area under", re.I
)
# Keys of other things: a scorer that was withdrawn, what sums rebuild, and the AUC of another kind.
OTHERS = {"matched", "rebuilt", "auc_unseen"}


def keys(content):
    """Yield every key of some JSON, without the end that says which value of a figure it is."""
    for value in content.values() if isinstance(content, dict) else content:
        if isinstance(value, dict | list):
            yield from keys(value)
    if isinstance(content, dict):
        yield from (re.sub(r"^expected_|_(low|high|floor)$", "", key) for key in content)


def test_stored_results_have_no_other_key_for_the_same_thing():
    known = {score.key for score in SCORES} | OTHERS
    earlier = {old for score in SCORES for old in score.earlier}
    for path in (ROOT / "docs/results").glob("*.json"):
        found = {key for key in keys(json.loads(path.read_text())) if SAID.search(key)}
        assert found <= known | earlier, path.name


def heads(page):
    """Return the table heads of a page in Markdown, cell by cell."""
    return [
        cell.strip()
        for above, below in pairwise(page.splitlines())
        if above.startswith("|") and re.fullmatch(r"\|[-|: ]+", below)
        for cell in above.strip("|").split("|")
    ]


def of_other_words(cells):
    return [c for c in cells if SAID.search(c) and not any(word in c for word in HEADINGS)]


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"])
def test_tables_of_the_docs_have_no_other_word_for_the_same_thing(page):
    if not page.name.endswith(".ko.md"):
        assert of_other_words(heads(page.read_text(encoding="utf-8"))) == []


def test_tables_of_studies_have_no_other_word_for_the_same_thing():
    for study in (DctStudy(), FrontierStudy()):
        shown = heads(study.table({"rows": [], "membership": []}))
        assert {IDENTIFIED.heading, "dB to original"} <= set(shown)
        assert of_other_words(shown) == []


def test_the_report_has_no_other_word_for_the_same_thing(tmp_path):
    made = [
        make_leakage(tmp_path / "leakage", [leakage_row(psnr_ceiling=17.5), leakage_row()]),
        make_frontier(tmp_path / "frontier"),
        make_egress(tmp_path / "egress"),
        make_sums(tmp_path / "sums"),
    ]
    page = build_page(read_artifacts(made), title="words", now=datetime(2026, 1, 1, tzinfo=UTC))
    shown = re.findall(r'<th(?: class="text")? scope="col">\s*([^<]*?)\s*</th>', page)
    assert {EXACT.heading, IDENTIFIED.heading, PICKED_OUT.heading, "AUC"} <= set(shown)
    assert of_other_words(shown) == []
    assert set(re.findall(r'data-name="([^"]*)"', page)) <= set(shown)
    # Said of the transformed row alone.
    assert len(re.findall(r"100\s%\s*of T\(x\)", page)) == 1


def table(ceiling):
    scores = {score.key: torch.ones(1).double() for score in SCORES[:7]}
    scores["psnr_ceiling"] = torch.tensor([ceiling]).double()
    image = torch.zeros(1, 1, 2, 2)
    row = Row("lm", "dct:keep=3", True, image, torch.zeros(1), scores, {})
    report = LeakageReport("mine", "lenet", LeakageSettings(), image, {}, (row,), {})
    return report.table().splitlines()


def test_the_console_has_the_same_words_and_says_what_is_exact():
    head, hidden, *_ = table(ceiling=17.5)
    columns = re.split(r"\s{2,}", head)
    assert columns == ["attack", "defence", "attacker", *HEADINGS[:7]]
    assert re.search(r"100% of T\(x\) +100% +100%", hidden)
    assert "T(x)" not in table(ceiling=200.0)[1]
    assert re.split(r"\s{2,}", ROC_HEAD) == list(HEADINGS[-3:])


def test_rows_of_earlier_versions_are_read():
    old = {"recognised": 0.4, "recognised_low": 0.3, "recognised_high": 0.5, "exact": 1}
    assert renamed(old) == {
        "picked_out": 0.4, "picked_out_low": 0.3, "picked_out_high": 0.5, "exact": 1
    }  # fmt: skip
    assert LeakageRow.model_validate(leakage_row(recognised=0.4)).picked_out == 0.4
    assert FrontierRow.model_validate(frontier_row(recognised=0.4)).picked_out == 0.4
    assert exact_of({}) == ""
