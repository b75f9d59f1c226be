"""The report: its verdict follows from the numbers, and its page gives nothing away."""

import io
import json
import re
import sys
import zipfile
from base64 import b64decode
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import html5lib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from fedveil.errors import FedveilError
from fedveil.report import build_page, read_artifacts, verdict, write_report
from fedveil.report.artifacts import (
    Artifacts,
    LeakageAudit,
    LeakageRow,
    RoundLine,
    Run,
    RunSummary,
    TheftAudit,
    TheftRow,
)
from fedveil.report.controls import controls
from fedveil.report.finding import percent
from fedveil.report.sums import of_sums
from fedveil.report.svg import Chart, Series, counts, draw, shares
from fedveil.report.verdict import _above_floor, of_egress, of_members, ranked
from tests.report.report_material import (
    CANARY,
    NASTY,
    configuration,
    egress_row,
    frontier_row,
    leakage_row,
    make_egress,
    make_frontier,
    make_leakage,
    make_run,
    make_sums,
    make_theft,
    membership_row,
    sums_row,
    theft_row,
)

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def plain(text):
    return text.replace("\N{NO-BREAK SPACE}", " ")


def sentences(*directories):
    return [plain(f.sentence) for f in verdict(read_artifacts(directories))]


def marks(*directories):
    return [(f.kind, plain(f.mark)) for f in verdict(read_artifacts(directories))]


@pytest.fixture
def everything(tmp_path):
    """One of each kind, under names that are not fit for HTML."""
    root = tmp_path / NASTY.replace("/", "∕")
    make_run(root / "run", dataset=NASTY, noise_key=CANARY)
    make_run(root / "plain", strategy="fedavg", copies=(0.5,) * 60, accuracy=0.95)
    make_leakage(root / "leakage", dataset=NASTY)
    make_theft(root / "theft", [theft_row(NASTY), theft_row("direct use", labels=50)])
    make_frontier(root / "frontier")
    return root


@pytest.fixture
def page(everything):
    return build_page(read_artifacts([everything]), title=NASTY, now=NOW)


# The verdict


def test_a_cap_that_held(tmp_path):
    found = sentences(make_run(tmp_path / "run"))
    assert found[0] == (
        "In all 3 rounds of the run every copy stayed at or below the accuracy cap (at most 55 %, "
        "the cap being 60 %, on 500 images a round that the noise was not set on), while the "
        "owner's model reached 90.0 %; such a cap bounds direct use of a copy and does not bound "
        "theft."
    )
    assert "was not measured" in found[1]
    assert "does not show that theft fails" in found[1]
    assert "was not measured" in found[2]


def test_one_copy_over_the_cap_is_said(tmp_path):
    held = make_run(tmp_path / "held")
    broken = make_run(tmp_path / "broken", copies=(0.3, 0.601, 0.5), report_images=50)
    assert marks(held, broken)[0] == ("bad", "Cap passed")
    assert (
        "In 1 of 6 rounds of the 2 runs that have a cap a copy passed" in sentences(held, broken)[0]
    )


def test_the_cap_itself_is_not_over_the_cap(tmp_path):
    assert marks(make_run(tmp_path / "run", copies=(0.6, 0.6)))[0] == ("good", "Cap held")


def test_training_without_a_cap_is_no_success(tmp_path):
    run = make_run(tmp_path / "run", strategy="fedavg", copies=(0.5, 0.97))
    assert marks(run)[0] == ("bad", "No cap")
    assert "copies of up to 97.0 % accuracy" in sentences(run)[0]


def test_the_strongest_theft_is_named_by_its_gain_not_its_accuracy(tmp_path):
    found = sentences(make_theft(tmp_path / "theft"))
    assert "gains up to 20.0 points (95 % interval 18.0 to 22.0)" in found[1]
    assert "“retrain the first layer” with 10 labelled images and one client" in found[1]
    assert "80 % where training alone gives 60 %" in found[1]
    assert "may gain more" in found[1]


def test_no_gain_is_not_called_a_defence(tmp_path):
    rows = [theft_row(accuracy=0.5), theft_row("direct use", accuracy=0.4)]
    directory = make_theft(tmp_path / "theft", rows)
    assert marks(directory)[1] == ("good", "No gain found")
    assert "Of 2 thefts tried on the copies of a run that" in sentences(directory)[1]
    assert "may do better" in sentences(directory)[1]


@pytest.mark.parametrize(
    ("low", "high", "kind", "told"),
    [
        (-0.04, 0.03, "good", "may do better."),
        (-0.2, 0.18, "unknown", "a gain of 18.0 points is within the interval"),
        (-0.01, -0.01, "unknown", "was not measured"),  # one thief
        (None, None, "unknown", "was not measured"),
    ],
)
def test_no_gain_found_clears_nothing_where_a_gain_may_be_missed(tmp_path, low, high, kind, told):
    rows = [theft_row(accuracy=0.59, advantage_low=low, advantage_high=high)]
    directory = make_theft(tmp_path / "theft", rows)
    assert marks(directory)[1] == (kind, "No gain found")
    assert told in sentences(directory)[1]


def test_an_earlier_versions_attack_clears_no_defence(tmp_path):
    """It was one alone, and what it missed was withdrawn."""
    counted = {"images": 100, "picked_out": 0.02}
    rows = [
        {**frontier_row("none", None, identified=0.98, adaptive=False), **counted},
        {**frontier_row(identified=0.0), **counted},
    ]
    place = make_frontier(tmp_path / "frontier", rows)
    found = verdict(read_artifacts([place]))[2]
    assert found.kind == "unknown"
    assert f"{place} is of an earlier version" in found.sentence
    content = json.loads((place / "frontier.json").read_text())
    (place / "frontier.json").write_text(json.dumps(content | {"membership": [{"attack": "span"}]}))
    assert verdict(read_artifacts([place]))[2].kind == "good"


def test_few_images_of_a_frontier_clear_no_defence(tmp_path):
    rows = [frontier_row("none", None, identified=0.98, adaptive=False), frontier_row(identified=0)]
    for images, kind in ((16, "unknown"), (60, "good")):
        counted = [{**row, "images": images} for row in rows]
        place = make_frontier(tmp_path / f"{images}", counted)
        assert verdict(read_artifacts([place]))[2].kind == kind


def test_a_class_without_report_images_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"untested": ["cat", "<i>"]}))
    page = build_page(read_artifacts([run]), title="a", now=NOW)
    assert f"No report image of {run} is of cat, &lt;i&gt;, which it trains on" in page


def test_a_theft_is_of_the_labels_that_were_held(tmp_path):
    row = theft_row(accuracy=0.6, alone=0.6, labels=600, labels_held=[9, 12, 700])
    assert "with 9 to 600 labelled images" in sentences(make_theft(tmp_path / "few", [row]))[1]
    none = theft_row(accuracy=0.6, alone=0.6, labels=0, labels_held=[0])
    assert "with no label" in sentences(make_theft(tmp_path / "none", [none]))[1]


def test_where_nothing_could_be_gained_nothing_is_cleared(tmp_path):
    rows = [theft_row(accuracy=0.6, alone=0.6), theft_row(accuracy=0.7, alone=0.9, labels=600)]
    path = make_theft(tmp_path / "theft", rows)
    content = json.loads((path / "theft.json").read_text())
    for reference, kind in ((0.6, "unknown"), (0.61, "good")):
        (path / "theft.json").write_text(json.dumps(content | {"reference": reference}))
        found = verdict(read_artifacts([path]))[1]
        assert found.kind == kind
    (path / "theft.json").write_text(json.dumps(content | {"reference": 0.5}))
    assert "keeps is right on 50 %, no more than" in sentences(path)[1]


def test_an_accuracy_on_training_images_is_told_to_be_one(tmp_path):
    run = make_run(tmp_path / "run", copies=(0.5, 0.6), accuracy=0.95)
    summary = json.loads((run / "summary.json").read_text())
    for doubles, told in ((25, False), (26, True)):
        (run / "summary.json").write_text(json.dumps(summary | {"report_doubles": doubles}))
        marks = [found.mark for found in leads(run)]
        assert ("Measured on training images" in marks) == told
    assert "26 are doubles of images it was trained on" in str(leads(run))


def test_a_theft_names_its_run_and_clears_no_other(tmp_path):
    none = [theft_row(accuracy=0.5, labels=0)]
    one, other = (make_run(tmp_path / name) for name in ("one", "other"))
    audit = make_theft(tmp_path / "theft", none, run="elsewhere/" + one.name)
    assert marks(audit)[1] == ("good", "No gain found")
    told = make_theft(tmp_path / "told", none, run=str(one))
    assert marks(one, told)[1] == ("good", "No gain found")
    assert f"Of 1 theft tried on the copies of {one} none" in sentences(one, told)[1]
    assert "with no label" in sentences(one, told)[1]
    assert marks(one, other, told)[1] == ("unknown", "No gain found")
    assert f"on the copies of {other} none was tried" in sentences(one, other, told)[1]
    gains = make_theft(tmp_path / "gains", run=str(other))
    assert f"from the copies of {other}:" in sentences(one, other, gains)[1]
    assert f"from the copies of {other} (" in controls(read_artifacts([gains]))[1].evidence


def test_what_thieves_gain_where_nothing_learnt_was_sent_is_no_theft(tmp_path):
    kept = make_run(tmp_path / "kept", strategy="protected", copies=(0.1,), chance=0.1)
    audit = make_theft(tmp_path / "theft", run=str(kept))
    assert marks(kept, audit)[1] == ("unknown", "Nothing learnt to steal")
    assert marks(audit)[1][0] == "bad"  # nothing here says what was sent
    copies = make_run(tmp_path / "copies")
    worse = make_theft(tmp_path / "worse", [theft_row(accuracy=0.7)], run=str(copies))
    assert marks(kept, copies, audit, worse)[1] == ("bad", "Gains 10.0 points")
    learnt = make_run(tmp_path / "learnt", strategy="protected", copies=(0.6,), chance=0.1)
    assert marks(learnt, make_theft(tmp_path / "of", run=str(learnt)))[1][0] == "bad"


def test_numbers_agree_with_their_nouns(tmp_path):
    run = make_run(tmp_path / "run", copies=(0.5,), images=1)
    page = plain(build_page(read_artifacts([run]), title="t", now=NOW))
    assert "In the one round of the run every copy" in page
    assert not re.search(r"\b1 (rounds|images|copies|thefts|clients|settings)\b", page)


def test_a_naive_attack_that_fails_is_no_defence_that_works(tmp_path):
    rows = [leakage_row(), leakage_row(defense="dct:keep=1", identified=0.0)]
    found = sentences(make_leakage(tmp_path / "a", rows))
    assert "without a defence the strongest attack tried (lm) rebuilt 100 % of 4" in found[2]
    assert "dct:keep=1 was attacked only by those who do not know it" in found[2]
    assert "shows nothing about what it withstands" in found[2]
    assert marks(make_leakage(tmp_path / "b", rows[1:]))[2] == ("unknown", "Not tested")


def test_a_defence_is_judged_by_its_strongest_attack(tmp_path):
    found = sentences(make_leakage(tmp_path / "leakage"))
    assert "under dct:keep=3 the strongest attack tried (lm) let 75 %" in found[2]
    assert "(95 % interval 65 % to 80 %), knowing it" in found[2]
    assert "25 %" not in found[2]


def test_what_hides_a_reconstruction_is_no_defence_where_candidates_are_picked_out(tmp_path):
    rows = [
        leakage_row(images=100, recognised=1.0),
        leakage_row(defense="a", adaptive=True, identified=0.0, images=100, picked_out=0.4),
    ]
    directory = make_leakage(tmp_path / "leakage", rows, arrays=False)
    assert marks(directory)[2] == ("bad", "40 % picked out")
    assert "and 40 % be picked out" in sentences(directory)[2]


def test_the_best_of_several_defences_is_the_one_whose_strongest_attack_gets_least(tmp_path):
    rows = [
        leakage_row(defense="a", adaptive=True, identified=0.9),
        leakage_row(defense="b", identified=0.5),
        leakage_row(defense="b", adaptive=True, identified=0.3),
        leakage_row(defense="c", identified=0.0),
    ]
    found = sentences(make_leakage(tmp_path / "leakage", rows))
    assert "under b, of the defences tried the one that leaks least," in found[2]
    assert "let 50 %" in found[2]
    assert "not even knowing it" in found[2]


@pytest.mark.parametrize(
    ("plain_rate", "images", "kind", "words"),
    [
        (1.0, 100, "good", "stronger attacks may exist"),
        (1.0, 8, "unknown", "of 8 images nothing can be called rare"),
        (0.02, 100, "unknown", "show nothing about one"),
        (None, 100, "unknown", "whether these attacks succeed at all"),
    ],
)
def test_an_attack_must_work_before_its_failure_counts(tmp_path, plain_rate, images, kind, words):
    rows = [leakage_row(defense="a", adaptive=True, identified=0.0, images=images)]
    if plain_rate is not None:
        rows.append(leakage_row(identified=plain_rate, images=images))
    directory = make_leakage(tmp_path / "leakage", rows, arrays=False)
    assert marks(directory)[2][0] == kind
    assert words in sentences(directory)[2]


def floored(identified, floor, **changes):
    return leakage_row(identified=identified, identified_floor=floor, **changes)


@pytest.mark.parametrize(
    ("share", "floor", "images", "kind"),
    [
        (0.19, 0.19, 64, "unknown"),  # as 64 other photographs in one batch once scored
        (0.08, 0.07, 16, "unknown"),
        (0.25, 0.01, 4, "unknown"),  # one of four happens in 4 of 100 audits by chance
        (0.25, 0.01, 16, "bad"),
        (1.0, 0.01, 1, "bad"),
        (0.06, 0.01, 200_000, "bad"),
        (0.06, 0.06, 200_000, "unknown"),
    ],
)
def test_what_lies_under_the_floor_is_called_neither_leaking_nor_safe(
    tmp_path, share, floor, images, kind
):
    rows = [floored(1.0, floor, images=images)]
    rows.append(floored(share, floor, defense="a", adaptive=True, images=images))
    directory = make_leakage(tmp_path / "leakage", rows, arrays=False)
    found, mark = marks(directory)[2]
    assert found == kind
    assert (mark == "At the floor") == (kind == "unknown")
    assert "where images without content reach" in sentences(directory)[2]


def test_a_low_share_is_no_success_where_the_scorer_cannot_tell(tmp_path):
    rows = [floored(1.0, 0.2, images=100)]
    rows.append(floored(0.01, 0.2, defense="a", adaptive=True, images=100))
    directory = make_leakage(tmp_path / "leakage", rows, arrays=False)
    assert marks(directory)[2] == ("unknown", "1.0 % identified")
    assert "images without content reach 20 %" in sentences(directory)[2]


def test_a_search_that_ended_without_an_answer_clears_nothing(tmp_path):
    rows = [floored(1.0, 0.01, images=100)]
    rows.append(floored(0.0, 0.01, defense="a", adaptive=True, images=100))
    told = make_leakage(tmp_path / "told", rows, arrays=False)
    rows[-1] = rows[-1] | {"untold": 3}
    untold = make_leakage(tmp_path / "untold", rows, arrays=False)
    kinds = [marks(directory)[2][0] for directory in (told, untold)]
    assert kinds == ["good", "unknown"]


def test_an_attack_that_works_clears_nothing_for_one_that_was_run_instead(tmp_path):
    """One that is refused under a defence, or another file's, vouched for a weaker one."""
    plain = floored(1.0, 0.01, images=100)
    weak = floored(0.0, 0.01, attack="dlg:steps=1", images=100)
    under = floored(0.0, 0.01, attack="dlg:steps=1", defense="a", adaptive=True, images=100)
    same = floored(0.0, 0.01, defense="a", adaptive=True, images=100)
    undone = floored(0.0, 0.01, attack="lm+inverse", defense="a", adaptive=True, images=100)

    def kind(name, *rows):
        return marks(make_leakage(tmp_path / name, [*rows], arrays=False))[2]

    assert kind("same", plain, weak, under, same)[0] == "good"
    assert kind("inverse", plain, undone)[0] == "good"
    assert kind("other", plain, weak, under) == ("unknown", "Attacks too weak")
    assert kind("alone", plain, under)[0] == "unknown"


def test_an_attack_that_could_not_tell_is_not_vouched_for_by_a_weaker_one(tmp_path):
    """``peel`` works without a defence and cannot tell under it; ``ig`` never works, and tells."""
    rows = [
        floored(1.0, 0.01, attack="peel", images=100),
        floored(0.02, 0.01, attack="ig", images=100),
        floored(0.0, 0.01, attack="peel", defense="a", adaptive=True, images=100, untold=4),
        floored(0.02, 0.01, attack="ig", defense="a", adaptive=True, images=100),
    ]
    directory = make_leakage(tmp_path / "leakage", rows, arrays=False)
    assert marks(directory)[2] == ("unknown", "2.0 % identified")
    assert "ended at its limit or without an answer" in sentences(directory)[2]
    recognised = [row | {"picked_out": 1.0, "picked_out_floor": 0.01} for row in rows[:2]]
    recognised += [row | {"picked_out": 0.01, "picked_out_floor": 0.01} for row in rows[2:]]
    seen = make_leakage(tmp_path / "recognised", recognised, arrays=False)
    assert marks(seen)[2][0] == "unknown"
    grid = [row | {"accuracy": 0.6, "strength": 1.0, "scenario": "worst"} for row in rows]
    assert marks(make_frontier(tmp_path / "grid", grid))[2][0] == "unknown"
    rows[2]["untold"] = grid[2]["untold"] = 0
    assert marks(make_frontier(tmp_path / "grid told", grid))[2][0] == "good"
    assert marks(make_leakage(tmp_path / "told", rows, arrays=False))[2][0] == "good"


def test_audits_under_other_rates_clear_nothing_of_one_another(tmp_path):
    plain = floored(1.0, 0.01, images=100)
    under = floored(0.0, 0.01, defense="a", adaptive=True, images=100)
    found = [
        make_leakage(tmp_path / name, [row], arrays=False, learning_rate=rate)
        for name, row, rate in (("a", plain, 1.0), ("b", under, 0.01), ("c", under, 1.0))
    ]
    assert marks(found[0], found[2])[2][0] == "good"
    assert marks(found[0], found[1])[2][0] != "good"


def test_an_undefended_attack_at_the_floor_shows_nothing_of_a_defence(tmp_path):
    rows = [floored(0.6, 0.6, images=100)]
    rows.append(floored(0.0, 0.01, defense="a", adaptive=True, images=100))
    directory = make_leakage(tmp_path / "leakage", rows, arrays=False)
    assert marks(directory)[2] == ("unknown", "Attacks too weak")


@given(st.integers(1, 400), st.floats(0.001, 0.999), st.data())
@settings(max_examples=60, deadline=None)
def test_the_floor_is_beaten_where_scipys_binomial_test_says_so(images, floor, data):
    found = data.draw(st.integers(0, images))
    oracle = binomtest(found, images, floor, alternative="greater").pvalue
    row = LeakageRow.model_validate(floored(found / images, floor, images=images))
    if abs(oracle - 0.025) > 1e-6:
        assert _above_floor(row) == (oracle < 0.025 and found / images > floor)


def test_shares_without_a_floor_are_named(tmp_path):
    old = make_leakage(tmp_path / "old")
    new = make_leakage(tmp_path / "new", [floored(1.0, 0.01)], arrays=False)
    page = build_page(read_artifacts([old, new]), title="a", now=NOW)
    assert f"No floor stands beside the identified shares of {old}:" in page
    assert "floor 1.0\N{NO-BREAK SPACE}%" in page


def told_of_members(path, *rows):
    directory = make_leakage(path / "leakage", membership=rows, arrays=False)
    (found,) = of_members(read_artifacts([directory]).leakages)
    return found.kind, plain(found.mark), plain(found.sentence)


def test_what_updates_tell_of_members_is_told_of_the_defence_that_tells_least(tmp_path):
    kind, mark, sentence = told_of_members(
        tmp_path,
        membership_row(found=0.9, auc=0.95),
        membership_row("a", found=0.4),
        membership_row("a", found=0.9, adaptive=False),
        membership_row("b", found=0.2),
        membership_row("b", found=0.3, attack="loss", certain=0.25),
    )
    assert (kind, mark) == ("bad", "30 % found")
    assert "under b, the strongest attack tried (loss) tells images that were used" in sentence
    assert "an area under the curve of 0.90 (0.88 to 0.92)" in sentence
    assert "30 % of them are found where 1 % of others are called used" in sentence
    assert "(95 % interval 28 % to 32 %), at 0.1 % cannot be told; 25 % beyond doubt" in sentence


def test_what_few_images_could_not_tell_is_no_share_of_nothing(tmp_path):
    """Of two audits of one defence, many images find nothing and few cannot tell."""
    plain_rows = [membership_row(auc=0.9, found=0.4)]
    quiet = membership_row("dct:keep=3", auc=0.5, found=0.012)
    for auc, kind in ((0.51, "unknown"), (0.9, "bad")):
        few = membership_row("dct:keep=3", auc=auc, found=None)
        audits = [
            make_leakage(tmp_path / f"{auc}{name}", membership=rows, arrays=False)
            for name, rows in (("many", [*plain_rows, quiet]), ("few", [few]))
        ]
        (found,) = of_members(read_artifacts(audits).leakages)
        assert found.kind == kind
    (found,) = of_members(read_artifacts(audits[:1]).leakages)
    assert found.kind == "good"


def test_attacks_that_work_on_one_model_show_nothing_of_another(tmp_path):
    works = make_leakage(
        tmp_path / "a",
        [leakage_row(identified=0.9, images=100)],
        membership=[membership_row(auc=0.9, found=0.4)],
        arrays=False,
        model="cnn",
    )
    hidden = make_leakage(
        tmp_path / "b",
        [leakage_row(defense="dct:keep=3", adaptive=True, identified=0.0, images=100)],
        membership=[membership_row("dct:keep=3", auc=0.5, found=0.012)],
        arrays=False,
        model="resnet",
    )
    both = read_artifacts([hidden, works])
    assert of_members(both.leakages)[0].kind == "bad"
    assert verdict(both)[2].kind == "bad"
    quiet = read_artifacts([hidden])
    assert of_members(quiet.leakages)[0].kind == verdict(quiet)[2].kind == "unknown"
    same = json.loads((works / "leakage.json").read_text())
    same["settings"]["model"] = "resnet"
    (works / "leakage.json").write_text(json.dumps(same))
    both = read_artifacts([hidden, works])
    assert of_members(both.leakages)[0].kind == verdict(both)[2].kind == "good"


@pytest.mark.parametrize(
    ("rows", "kind", "mark"),
    [
        ([{"found": 0.4}], "bad", "40 % found"),
        ([{"found": None, "auc": 0.9}], "bad", "AUC 0.90"),
        ([{"found": None, "auc": 0.5}], "unknown", "Cannot tell"),
        ([{"found": 0.01, "auc": 0.5}], "unknown", "Attacks too weak"),
        ([{"found": 0.4}, {"found": 0.01, "auc": 0.5}], "good", "No better than chance"),
        ([{"found": 0.4}, {"found": 0.01, "auc": 0.5, "spread": 0.1}], "unknown", "Cannot tell"),
        ([{"found": 0.4}, {"found": None, "auc": 0.5}], "unknown", "Cannot tell"),
        ([{"found": 0.4}, {"found": 0.01, "auc": 0.5, "certain": 0.1}], "bad", "1.0 % found"),
    ],
)
def test_a_defence_hides_members_only_from_attacks_that_work_without_it(tmp_path, rows, kind, mark):
    named = [membership_row(name, **row) for name, row in zip(("none", "a"), rows, strict=False)]
    assert told_of_members(tmp_path, *named)[:2] == (kind, mark)


def test_a_membership_attack_vouches_for_itself_alone(tmp_path):
    rows = [membership_row("none", found=0.4), membership_row("none", found=0.01, auc=0.5)]
    rows.append(membership_row("a", found=0.01, auc=0.5))
    rows[1]["attack"] = rows[2]["attack"] = "gradient"
    assert told_of_members(tmp_path, *rows)[:2] == ("unknown", "Attacks too weak")


def test_the_page_has_the_membership_table_and_reads_what_earlier_versions_wrote(tmp_path):
    few = membership_row("<b>", found=None)
    old = membership_row(strangers={"auc": 0.7, "tpr_at_1": 0.1, "tpr_at_01": 0.0, "strangers": 9})
    leakage = make_leakage(tmp_path / "leakage", membership=[few, old], arrays=False)
    page = build_page(read_artifacts([leakage]), title="a", now=NOW)
    assert "Which images were used, told from the update alone" in page
    assert "cannot tell" in page
    assert "&lt;b&gt;" in page
    assert "Which images were used" not in build_page(
        read_artifacts([make_leakage(tmp_path / "none")]), title="a", now=NOW
    )


def told_of_egress(directory):
    (found,) = of_egress(read_artifacts([directory]).egresses)
    return found.kind, plain(found.mark), plain(found.sentence)


def test_what_a_delivered_model_tells_is_told_by_its_strongest_attack(tmp_path):
    kind, mark, sentence = told_of_egress(make_egress(tmp_path / "egress"))
    assert (kind, mark) == ("bad", "10 % found")
    assert "attack tried (lira) tells members of runs/a from others" in sentence
    assert "10 % of members are found where 1 % of others are called members" in sentence
    assert "(95 % interval 8.0 % to 12 %), at 0.1 % cannot be told" in sentence


@pytest.mark.parametrize(
    ("rows", "kind", "mark"),
    [
        ([egress_row("loss", auc=0.51, found=0.01)], "unknown", "Only the loss was tried"),
        ([egress_row("lira", auc=0.51, found=0.01)], "good", "No better than chance"),
        ([egress_row(auc=0.51, found=0.0, tpr_at_1_high=0.16)], "unknown", "Cannot tell"),
        ([egress_row("lira", auc=0.51, found=0.04)], "bad", "4.0 % found"),
        ([egress_row("lira", auc=0.6, found=0.01)], "bad", "1.0 % found"),
        ([egress_row("lira", auc=0.51, found=None)], "unknown", "Cannot tell"),
        ([egress_row("lira", auc=0.9, found=None)], "bad", "AUC 0.90"),
    ],
)
def test_too_few_images_or_attacks_clear_no_model(tmp_path, rows, kind, mark):
    assert told_of_egress(make_egress(tmp_path / "egress", rows))[:2] == (kind, mark)


def test_what_could_not_be_told_of_a_model_clears_it_not(tmp_path):
    quiet = egress_row("lira", auc=0.51, found=0.01)
    weak = make_egress(tmp_path / "weak", [quiet], told=False, untold=["It learnt nothing."])
    assert told_of_egress(weak)[:2] == ("unknown", "Cannot tell")
    assert told_of_egress(weak)[2].endswith("It learnt nothing.")
    below = make_egress(tmp_path / "below", [quiet, egress_row("loss", auc=0.2, found=0.0)])
    assert told_of_egress(below)[:2] == ("unknown", "Cannot tell")
    assert "by loss members score below others" in told_of_egress(below)[2]


def test_one_model_clears_no_other(tmp_path):
    clear = make_egress(tmp_path / "clear", [egress_row("lira", auc=0.51, found=0.012)])
    few = make_egress(tmp_path / "few", [egress_row("lira", auc=0.4, found=None)], subject="b")
    (found,) = of_egress(read_artifacts([clear, few]).egresses)
    assert (found.kind, found.mark) == ("unknown", "Cannot tell")
    run, other = make_run(tmp_path / "runs" / "a"), make_run(tmp_path / "other")
    own = read_artifacts([run, clear])
    (found,) = of_egress(own.egresses, own.runs)
    assert found.kind == "good"
    both = read_artifacts([run, other, clear])
    (found,) = of_egress(both.egresses, both.runs)
    assert found.kind == "unknown"
    assert f"what the model of {other} tells was not audited" in found.sentence
    weights = make_egress(
        tmp_path / "file",
        [egress_row("lira", auc=0.51, found=0.012)],
        subject=f"{other}/model.safetensors",
    )
    named = read_artifacts([other, weights])
    assert of_egress(named.egresses, named.runs)[0].kind == "good"


def test_sums_of_one_audit_clear_those_of_no_other(tmp_path):
    alone = sums_row(seen=False, holder="one client")
    clear = make_sums(tmp_path / "clear", [sums_row(auc=0.51, found=0.012), alone])
    few = make_sums(
        tmp_path / "few",
        [sums_row(auc=0.4, found=None), alone],
        subject="b",
        rebuilt=(2, 1.0, 0.1, 0.9),
    )
    both = read_artifacts([clear, few])
    (found,) = of_sums(both.sums)
    assert (found.kind, found.mark) == ("unknown", "Cannot tell")
    assert verdict(both)[2].mark == "Too few to tell"
    none = read_artifacts([clear, make_sums(tmp_path / "none", rebuilt=None, subject="c")])
    assert verdict(none)[2].kind == "unknown"
    assert "of c no image was searched for" in verdict(none)[2].sentence


def test_the_page_says_what_egress_could_not_tell(tmp_path):
    run, nothing = make_run(tmp_path / "run"), ("0.1 % cannot be told <b>",)
    page = build_page(read_artifacts([run]), title="a", now=NOW)
    assert "of who was in its training was not measured" in page
    egress = make_egress(tmp_path / "egress", untold=nothing)
    page = build_page(read_artifacts([run, egress]), title="a", now=NOW)
    assert "of who was in its training was not measured" not in page
    assert "0.1 % cannot be told &lt;b&gt;" in page
    assert "cannot tell" in page
    assert "The most exposed training images" in page


@pytest.mark.parametrize(
    ("row", "kind", "mark"),
    [
        (sums_row(auc=0.51, found=0.01), "good", "No better than chance"),
        (sums_row(auc=0.51, found=0.0) | {"tpr_at_1_high": 0.16}, "unknown", "Cannot tell"),
        (sums_row(auc=0.6, found=0.01), "unknown", "Nobody named, a little told of all"),
        (sums_row(auc=0.6, found=0.2), "bad", "20 % found"),
        (sums_row(auc=0.51, found=None), "unknown", "Cannot tell"),
        (sums_row(auc=0.9, found=None), "unknown", "Nobody named, a little told of all"),
    ],
)
def test_what_sums_tell_is_judged_by_those_the_server_held(tmp_path, row, kind, mark):
    alone = sums_row(seen=False, auc=0.99, found=0.8, holder="one client")
    (found,) = of_sums(read_artifacts([make_sums(tmp_path / "sums", [row, alone])]).sums)
    assert (found.kind, plain(found.mark)) == (kind, mark)
    assert "which that server did not hold, it would be 80 % found" in plain(found.sentence)


def test_few_public_images_clear_no_sum_that_more_would_trace(tmp_path):
    row = sums_row(auc=0.51, found=0.01)
    for forecast, kind in ((0.5, "bad"), (0.012, "good"), (None, "unknown")):
        place = make_sums(tmp_path / f"{forecast}", [row], forecast=forecast)
        (found,) = of_sums(read_artifacts([place]).sums)
        assert found.kind == kind
        said = f"{percent(forecast)} are to be expected" if forecast else "had 500"
        assert (said in found.sentence) == bool(forecast)


def test_noise_that_would_let_a_better_attack_find_many_clears_no_sum(tmp_path):
    row = sums_row(auc=0.51, found=0.01)
    for allowed, kind in ((0.3, "unknown"), (0.03, "good")):
        place = make_sums(tmp_path / f"{allowed}", [row], forecast=None, allowed=allowed)
        (found,) = of_sums(read_artifacts([place]).sums)
        assert found.kind == kind
        assert f"let the best of all attacks find {percent(allowed)}" in found.sentence


@pytest.mark.parametrize(
    ("rebuilt", "seen", "kind", "mark"),
    [
        ((4, 1.0, 0.6, 0.9), False, "unknown", "Too few to tell"),
        ((8, 1.0, 0.6, 0.9), False, "good", "Not rebuilt"),
        ((8, 1.0, 0.6, 0.9), True, "bad", "Rebuilt"),
        ((8, 0.5, 0.3, 0.4), True, "bad", "Partly rebuilt"),
        ((8, 0.3, 0.2, 0.4), False, "unknown", "Cannot tell"),
        (None, False, "unknown", "Not measured"),
    ],
)
def test_a_search_that_rebuilds_nothing_anywhere_clears_no_sum(tmp_path, rebuilt, seen, kind, mark):
    rows = [sums_row(), sums_row(seen=seen, holder="one client")]
    found = verdict(read_artifacts([make_sums(tmp_path / "sums", rows, rebuilt=rebuilt)]))[2]
    assert (found.kind, found.mark) == (kind, mark)


def test_sums_of_one_run_clear_no_other(tmp_path):
    run = make_run(tmp_path / "run", strategy="analytic")
    says_what_came_back(run, "analytic")
    own = make_sums(tmp_path / "own", subject=str(run))
    other = make_sums(tmp_path / "other", subject="elsewhere/b")
    assert verdict(read_artifacts([run, own]))[2].kind == "good"
    found = verdict(read_artifacts([run, other]))[2]
    assert found.kind == "unknown"
    assert f"what clients of {run} returned was not attacked" in found.sentence
    page = build_page(read_artifacts([run, own]), title="a", now=NOW)
    assert "What sums tell" in page
    assert "another map may &lt;b&gt;" in page


def test_a_frontier_speaks_only_where_there_is_no_audit_and_gives_the_accuracy(tmp_path):
    frontier = make_frontier(tmp_path / "frontier")
    assert "under dct at 3" in sentences(frontier)[2]
    assert "let 20 %" in sentences(frontier)[2]
    assert "the model being 60 % accurate" in sentences(frontier)[2]
    assert "dct at 3" not in sentences(frontier, make_leakage(tmp_path / "leakage"))[2]


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.9999, "over 99.9 %"), (0.0, "0 %"), (0.0001, "under 0.1 %")],
)
def test_a_share_is_never_rounded_to_all_or_nothing(share, text):
    assert plain(percent(share)) == text


share = st.floats(0, 1, allow_nan=False)
gain = st.floats(-1, 1, allow_nan=False)
runs = st.builds(
    lambda cap, strategy, copies, accuracy: Run(
        "run",
        RunSummary(
            accuracy=accuracy,
            report_images=100,
            configuration=configuration(cap=cap, strategy=strategy, rounds=len(copies)),
        ),
        tuple(
            RoundLine(round=n, accuracy=accuracy, copies=(c,), sigma=0, seconds=1)
            for n, c in enumerate(copies, start=1)
        ),
    ),
    st.floats(0.1, 0.9),
    st.sampled_from(["fedavg", "noise-delta"]),
    st.lists(share, min_size=1, max_size=4),
    share,
)
thefts = st.builds(
    lambda settings, rows: TheftAudit(name="theft", settings=settings, rows=rows),
    st.sampled_from([{}, {"run": "run"}, {"run": "/elsewhere/run"}]),
    st.lists(
        st.builds(
            lambda a, g: TheftRow(
                attack="x",
                labels=10,
                colluders=1,
                accuracy=a,
                alone=a,
                advantage=g,
                advantage_low=max(-1, g - 0.02),
                advantage_high=min(1, g + 0.02),
            ),
            share,
            gain,
        ),
        min_size=1,
        max_size=4,
    ),
)
leakages = st.builds(
    lambda rows: LeakageAudit(name="leakage", rows=rows),
    st.lists(
        st.builds(
            lambda defense, adaptive, identified, psnr: LeakageRow(
                attack="lm",
                defense=defense,
                adaptive=adaptive,
                images=60,
                exact=identified,
                identified=identified,
                psnr_original=psnr,
            ),
            st.sampled_from(["none", "dct:keep=3", "jpeg:5"]),
            st.booleans(),
            share,
            st.floats(allow_nan=False),
        ),
        min_size=1,
        max_size=6,
    ),
)


@settings(max_examples=300, deadline=None)
@given(
    st.builds(
        Artifacts,
        runs=st.lists(runs, max_size=3).map(tuple),
        leakages=st.lists(leakages, max_size=2).map(tuple),
        thefts=st.lists(thefts, max_size=2).map(tuple),
    )
)
def test_a_verdict_never_says_more_than_was_measured(artifacts):
    copies, theft, images = verdict(artifacts)
    for finding in (copies, theft, images):
        assert finding.sentence.endswith(".")
        assert not re.search(r"\b(secure|safe|protected|guarantee|impossible|prevents?)\b",
                             finding.sentence)  # fmt: skip
    capped = [run for run in artifacts.runs if run.cap is not None]
    over = any(max(r.copies) > run.cap for run in capped for r in run.rounds)
    every = bool(capped) and len(capped) == len(artifacts.runs)
    assert (copies.kind == "good") == (every and not over)
    if capped:
        assert "not bound theft" in copies.sentence
    gains = [row.advantage for audit in artifacts.thefts for row in audit.rows]
    attacked = any("run" in audit.settings for audit in artifacts.thefts)
    known = attacked or not artifacts.runs
    assert (theft.kind == "good") == (bool(gains) and max(gains) <= 0 and known)
    rows = [row for audit in artifacts.leakages for row in audit.rows]
    if (
        images.kind == "good"
    ):  # then some strongest attack, on a tested defence or on none, got <5 %
        assert max(row.identified for row in rows if row.defense == "none") > 0.5
        informed = {row.defense for row in rows if row.adaptive} - {"none"}
        strongest = [max(r.identified for r in rows if r.defense == name) for name in informed]
        assert min(strongest) <= 0.05


# What leads the page


def leads(*directories):
    return ranked(read_artifacts(directories))


def test_a_model_of_no_use_leads_the_page_and_nothing_beside_it_is_good(tmp_path):
    run = make_run(tmp_path / "run", accuracy=0.11, copies=(0.1, 0.1), chance=0.102)
    no_gain = make_theft(tmp_path / "theft", [theft_row(accuracy=0.5)])
    first, *others = leads(run, no_gain)
    assert plain(first.sentence).startswith(
        "The model that was trained is of no use: it is right on 11 % of images, where always "
        "naming the commonest class is right on 10 %"
    )
    assert (first.kind, first.mark) == ("bad", "Of no use")
    assert others
    assert all(finding.kind != "good" for finding in others)
    page = build_page(read_artifacts([run, no_gain]), title="t", now=NOW)
    assert "✓" not in page
    assert page.index("of no use: it is right") < page.index("Table of controls")


def beside(path, **alone):
    content = json.loads((path / "summary.json").read_text())
    told = {"images": 179, "accuracy": 0.7, "gain": 0.2, "gain_low": 0.15, "gain_high": 0.25}
    (path / "summary.json").write_text(json.dumps(content | {"server_alone": told | alone}))
    return path


def test_what_clients_add_to_the_servers_own_images_is_said(tmp_path):
    adds = beside(make_run(tmp_path / "adds", strategy="analytic"))
    (found,) = (one for one in leads(adds) if one.topic == "What clients add")
    assert (found.kind, found.mark) == ("good", "Adds 20.0 points")
    assert plain(found.sentence) == (
        "The server's own 179 labelled images alone give a model right on 70 % of images; with "
        f"them the one that is delivered is right on 90.0 %: of {adds} clients add 20.0 points "
        "(95 % interval 15.0 to 25.0)."
    )
    nothing = beside(make_run(tmp_path / "not", strategy="analytic"), gain=0.01, gain_low=-0.02)
    (found,) = (one for one in leads(nothing) if one.topic == "What clients add")
    assert (found.kind, found.mark) == ("bad", "Nothing that can be told")
    assert f"what clients of {nothing} add cannot be told from chance" in found.sentence
    assert "What clients add" not in {one.topic for one in leads(make_run(tmp_path / "without"))}


def test_a_model_far_behind_the_same_training_unprotected_leads(tmp_path):
    own = make_run(tmp_path / "own", accuracy=0.7, copies=(0.5,), chance=0.1)
    plain_fedavg = {"strategy": "fedavg", "copies": (0.9,), "chance": 0.1}
    other = make_run(tmp_path / "other", accuracy=0.95, **plain_fedavg)
    elsewhere = make_run(tmp_path / "else", accuracy=0.99, dataset="x", **plain_fedavg)
    first = leads(own, other, elsewhere)[0]
    assert plain(first.sentence).startswith("The protection costs 25.0 points")
    assert first.kind == "bad"
    # It is behind, not of no use: its cap held all the same.
    assert "of no use" not in " ".join(finding.mark for finding in leads(own, other))
    assert leads(own, elsewhere)[0].topic != "The owner's model"
    longer = make_run(tmp_path / "longer", accuracy=0.99, **plain_fedavg | {"copies": (0.9,) * 9})
    assert leads(own, longer)[0].topic != "The owner's model"


def test_a_run_without_a_cap_is_named_beside_one_whose_cap_held(tmp_path):
    held = make_run(tmp_path / "held")
    bare = make_run(tmp_path / "bare", strategy="fedavg", copies=(0.97,))
    told = sentences(held, bare)[0]
    assert told.endswith(f"and {bare} had no cap at all and sent clients the model itself, up to "
                         "97.0 %.")  # fmt: skip
    assert "no cap" not in sentences(held)[0]
    assert marks(held, bare)[0] == ("unknown", "Cap held in 1 of 2 runs")


def test_a_collapse_leads(tmp_path):
    run = make_run(tmp_path / "run", accuracy=0.9, copies=(0.5, 0.5), chance=0.1)
    lines = (run / "rounds.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"accuracy": 0.4}
    (run / "rounds.jsonl").write_text(lines[0] + "\n" + json.dumps(last) + "\n")
    summary = json.loads((run / "summary.json").read_text()) | {"accuracy": 0.4}
    (run / "summary.json").write_text(json.dumps(summary))
    assert leads(run)[0].mark == "Collapsed"


def test_a_collapse_that_an_earlier_round_was_kept_from_is_said_and_does_not_lead(tmp_path):
    run = make_run(tmp_path / "run", accuracy=0.9, copies=(0.5, 0.5), chance=0.1)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"round": 1, "last_accuracy": 0.85}))
    assert all(finding.topic != "The owner's model" for finding in leads(run))
    (run / "summary.json").write_text(json.dumps(summary | {"round": 1, "last_accuracy": 0.4}))
    [told] = [finding for finding in leads(run) if finding.topic == "The owner's model"]
    assert (told.mark, told.kind) == ("Of round 1 of 2", "unknown")
    assert "right on 90.0 % of others" in plain(told.sentence)
    bare = make_run(tmp_path / "bare", strategy="fedavg", copies=(0.9,), chance=0.1)
    assert leads(bare, run, make_theft(tmp_path / "theft"))[0].kind == "bad"


def test_a_run_that_sent_nothing_learnt_asks_for_no_cap(tmp_path):
    held, bare = make_run(tmp_path / "held"), make_run(tmp_path / "bare", strategy="fedavg")
    sums = make_run(tmp_path / "sums", strategy="protected", copies=(0.1,))
    assert marks(held, bare, sums)[0][1] == "Cap held in 1 of 2 runs"
    assert sentences(held, sums)[0].endswith(
        f"Clients of {sums} were sent nothing that was learnt there."
    )
    assert marks(sums)[1] == ("unknown", "Nothing learnt to steal")
    assert marks(held, sums)[1] == ("unknown", "Not measured")


def test_one_thief_tells_no_interval(tmp_path):
    one = theft_row(advantage_low=0.2, advantage_high=0.2)
    assert "interval" not in sentences(make_theft(tmp_path / "theft", (one,)))[1]


def test_who_knows_that_nothing_was_done_stands_in_no_row_of_their_own(tmp_path):
    rows = [
        membership_row("none", attack="gradient", adaptive=False),
        membership_row("none", attack="gradient", adaptive=True),
        membership_row("none", attack="span", adaptive=True),
    ]
    audit = make_leakage(tmp_path / "leakage", membership=rows, arrays=False)
    page = build_page(read_artifacts([audit]), title="x", now=NOW)
    table = page[page.index("Membership in the updates of") :].partition("</table>")[0]
    assert table.count("<tr>") == 3


def test_the_worst_comes_first(tmp_path):
    run = make_run(tmp_path / "run", chance=0.1)
    kinds = [finding.kind for finding in leads(run, make_theft(tmp_path / "theft"))]
    assert kinds == ["bad", "unknown", "good"]


@pytest.mark.parametrize(
    ("run", "audit", "words"),
    [
        ({"model": "cnn"}, {"model": "lenet"}, "which shows nothing about that run"),
        ({"model": "lenet", "defense": "prune:share=0.9"}, {"model": "lenet"}, "was not attacked"),
        ({"strategy": "analytic", "model": "cnn"}, {"model": "cnn"}, "returned sums over"),
        ({"strategy": "protected", "model": "cnn"}, {"model": "cnn"}, "returned answers to"),
    ],
)
def test_what_was_attacked_elsewhere_clears_no_run(tmp_path, run, audit, words):
    rows = [
        leakage_row(images=100),
        leakage_row(defense="a", adaptive=True, identified=0.0, images=100),
    ]
    leaked = make_leakage(tmp_path / "leak", rows, arrays=False, dataset="digits", **audit)
    assert marks(leaked)[2][0] == "good"
    both = (make_run(tmp_path / "run", **run), leaked)
    says_what_came_back(tmp_path / "run", run.get("strategy"))
    assert marks(*both)[2][0] == "unknown"
    assert words in sentences(*both)[2]


def says_what_came_back(path, strategy):
    key = {"analytic": "analytic", "protected": "answers"}.get(strategy)
    if key is None:
        return
    summary = json.loads((path / "summary.json").read_text())
    told = {"server_sees": "sums of a round's clients"}
    (path / "summary.json").write_text(json.dumps(summary | {key: told}))


def test_the_table_of_controls_names_control_evidence_and_limit(tmp_path):
    run = make_run(tmp_path / "run", secure_aggregation=True, defense="dct:keep=6")
    rows = controls(read_artifacts([run]))
    assert "SATRE 3.3.07" in rows[0].question
    assert plain(rows[0].control) == "copies under a cap of 60 % (noise-delta)"
    assert rows[2].control.startswith("defence dct:keep=6, the server learns")
    assert "not measured: run fedveil audit leakage" in rows[2].limit
    assert rows[3].evidence.startswith("no bound holds")
    shared = make_run(tmp_path / "shared", strategy="protected", shared_rounds=5)
    told = controls(read_artifacts([shared]))[0].control
    assert told == "what 5 rounds of plain averaging gave is sent (protected)"
    plain_run = make_run(tmp_path / "plain", strategy="fedavg")
    assert controls(read_artifacts([plain_run]))[0].control.startswith("none: clients receive")


def test_a_strategy_that_keeps_no_cap_is_not_said_to_have_kept_one(tmp_path):
    """Runs that say what they sent, and runs of before, which only name their strategy."""
    told = {"strategy": "protected", "copies": (0.1, 0.1), "chance": 0.1, "accuracy": 0.9}
    now = make_run(tmp_path / "now", **told)
    summary = json.loads((now / "summary.json").read_text())
    (now / "summary.json").write_text(json.dumps({**summary, "sends": "untrained"}))
    before = make_run(tmp_path / "before", **told)
    for run in (now, before):
        finding = " ".join(sentences(run))
        assert "Clients received the model as it was before training" in finding
        assert "at or below the accuracy cap" not in finding
        (own,) = read_artifacts([run]).runs
        assert own.cap is None
        assert controls(read_artifacts([run]))[0].control == (
            "nothing that was learnt is sent (protected)"
        )
    (now / "summary.json").write_text(json.dumps({**summary, "sends": "model"}))
    assert "Training ran without a cap" in " ".join(sentences(now))


def test_a_cap_that_has_no_number_is_none(tmp_path):
    run = make_run(tmp_path / "run", cap=None, copies=(0.9, 0.9))
    assert "Training ran without a cap" in " ".join(sentences(run))


# The page


class Tags(HTMLParser):
    """A second, independent reader of the page: every start tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def tags(text, *names):
    return [attrs for tag, attrs in Tags(text).found if tag in names]


def test_the_page_is_valid_html(page):
    parser = html5lib.HTMLParser(strict=True)
    parser.parse(page)
    assert parser.errors == []


def test_nothing_from_a_file_becomes_markup(page):
    document = html5lib.parse(page, namespaceHTMLElements=False)
    scripts = list(document.iter("script"))
    assert len(scripts) == 1
    assert "alert" not in (scripts[0].text or "")
    assert not [name for _, attrs in Tags(page).found for name in attrs if name.startswith("on")]
    assert document.find(".//h1").text == NASTY
    assert "49" not in document.find(".//h1").text  # {{7*7}} is text, not a template
    text = "".join(document.itertext())
    assert text.count("<script>alert('x')<") >= 5


def test_the_page_loads_nothing(page):
    links = [attrs["href"] for attrs in tags(page, "a", "link", "use") if "href" in attrs]
    assert links
    assert all(link.startswith("#") for link in links)
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in tags(page, "img"))
    assert not tags(page, "link", "iframe", "object", "embed", "base", "form")
    style = html5lib.parse(page, namespaceHTMLElements=False).find(".//style").text
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for a in tags(page, "meta") if "content-security" in
                  a.get("http-equiv", "").lower())  # fmt: skip
    assert policy.startswith("default-src 'none'")


def test_the_page_can_be_used_without_seeing_it(page):
    ids = [attrs["id"] for _, attrs in Tags(page).found if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in Tags(page).found:
        assert set(attrs.get("aria-labelledby", "").split()) <= set(ids)
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids
    assert tags(page, "html")[0]["lang"] == "en"
    assert [len(tags(page, name)) for name in ("main", "header", "footer", "h1")] == [1, 1, 1, 1]
    assert all(attrs.get("alt") for attrs in tags(page, "img"))
    assert all(attrs.get("aria-label") for attrs in tags(page, "input", "nav"))
    assert all("scope" in attrs for attrs in tags(page, "th"))
    charts = [attrs for attrs in tags(page, "svg") if attrs.get("class") == "chart"]
    assert len(charts) == 5
    assert all(attrs["role"] == "img" for attrs in charts)
    assert all(a.get("tabindex") == "0" for a in tags(page, "div") if a.get("class") == "scroll")
    levels = [int(tag[1]) for tag, _ in Tags(page).found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one, other):
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_in_light_and_dark(page):
    style = html5lib.parse(page, namespaceHTMLElements=False).find(".//style").text
    themes = [
        dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    ]
    for theme in themes:
        for text in ("ink", "soft", "link", "good", "bad", "unknown"):
            for ground in ("page", "panel"):  # WCAG 2.2, 1.4.3: 4.5
                assert _contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        for series in range(6):  # 1.4.11: 3
            assert _contrast(theme[f"s{series}"], theme["page"]) >= 3, series
    assert themes[0]["page"] != themes[1]["page"]


def test_keys_checkpoints_and_archives_stay_shut(everything, tmp_path):
    opened = []
    watching = True

    def note(event, arguments):
        if watching and event == "open" and str(arguments[0]).startswith(str(everything)):
            opened.append(Path(str(arguments[0])).name)

    sys.addaudithook(note)
    write_report([everything], tmp_path / "report.html")
    watching = False
    allowed = {"summary.json", "rounds.jsonl", "reconstructions.npz"}
    allowed |= {f"{kind}.json" for kind in ("leakage", "theft", "frontier")}
    assert set(opened) == allowed
    page = (tmp_path / "report.html").read_text()
    assert CANARY not in page
    assert "withheld" in page


def test_pictures_are_bounded_in_number_and_size(tmp_path):
    rows = [leakage_row(f"attack{n}") for n in range(10)]
    audit = make_leakage(tmp_path / "leakage", rows, side=260)
    page = build_page(read_artifacts([audit]), title="t", now=NOW)
    assert len(tags(page, "img")) == 8 * 4 * 2
    assert len(page) < 30e6
    assert "only 4 images" in page


def test_a_slider_shows_what_the_attack_made_of_that_very_image(tmp_path):
    audit = make_leakage(tmp_path / "leakage")
    page = build_page(read_artifacts([audit]), title="t", now=NOW)
    pictures = np.load(audit / "reconstructions.npz")
    made = pictures["images/lm/dct:keep=3/adaptive"][3].clip(0, 1)
    shown = tags(page, "img")
    wanted = [a for a in shown if a["alt"].startswith("Image 4 as lm rebuilt it under dct")][1]
    content = b64decode(wanted["src"].partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(pixels, np.rint(made * 255).astype(np.uint8).transpose(1, 2, 0))
    error = np.mean((made.astype(float) - pictures["originals"][3]) ** 2)
    assert f"{-10 * np.log10(error):.0f} dB" in wanted["alt"]


def test_a_curve_stands_where_its_numbers_are():
    chart = Chart("t", "d", counts("round", 3), shares("accuracy"),
                  (Series("one", ((1.0, 0.0), (2.0, 0.5), (3.0, 1.0))),))  # fmt: skip
    svg = str(draw(chart, "c"))
    path = re.search(r'class="line" d="M([^"]*)"', svg).group(1)
    points = [tuple(map(float, part.split())) for part in path.split("L")]
    ticks = {
        text: float(y) for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d]+ %)<', svg)
    }
    assert points[0][1] + 4.5 == pytest.approx(ticks["0 %"])
    assert points[2][1] + 4.5 == pytest.approx(ticks["100 %"])
    assert points[1] == pytest.approx(np.mean([points[0], points[2]], axis=0), abs=0.1)


def test_a_folder_of_runs_stands_for_the_runs_in_it(tmp_path):
    make_run(tmp_path / "all/training")
    make_leakage(tmp_path / "all/leakage")
    (tmp_path / "all/summary.json").write_text("{}")
    found = read_artifacts([tmp_path / "all", tmp_path / "all/training"])
    assert len(found.runs) == 1
    assert len(found.leakages) == 1


# What is refused


def _cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _write(path, text):
    path.write_text(text)


DAMAGE = {
    "half a summary": (make_run, "summary.json", _cut, "damaged or half-written"),
    "half a round": (make_run, "rounds.jsonl", lambda p: _cut(p, 0.8), "line 3 is damaged"),
    "no rounds": (make_run, "rounds.jsonl", lambda p: _write(p, ""), "is empty"),
    "a round less": (
        make_run,
        "rounds.jsonl",
        lambda p: _write(p, "".join(p.read_text().splitlines(keepends=True)[:2])),
        "holds 2 rounds and summary.json speaks of 3",
    ),
    "rounds in disorder": (
        make_run,
        "rounds.jsonl",
        lambda p: _write(p, "".join(reversed(p.read_text().splitlines(keepends=True)))),
        "does not hold rounds 1 to 3 in order",
    ),
    "no summary": (make_run, "summary.json", Path.unlink, "has not ended"),
    "bytes": (make_run, "summary.json", lambda p: p.write_bytes(b"\xff\xfe"), "cannot be read"),
    "half an audit": (make_leakage, "leakage.json", _cut, "damaged or half-written"),
    "half its pictures": (make_leakage, "reconstructions.npz", _cut, "is damaged or of another"),
    "no rows": (make_theft, "theft.json", lambda p: _write(p, '{"rows": []}'), "not what fedveil"),
    "a list": (make_frontier, "frontier.json", lambda p: _write(p, "[1]"), "not what fedveil"),
    "depth": (make_theft, "theft.json", lambda p: _write(p, "[" * 100_000), "damaged"),
    "a share of 2": (
        make_theft,
        "theft.json",
        lambda p: _write(p, json.dumps({"rows": [theft_row(accuracy=2.0, alone=1.5)]})),
        "rows.0.accuracy",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_directory_is_named_and_nothing_is_written(tmp_path, case):
    make, name, harm, words = DAMAGE[case]
    directory = make(tmp_path / "it")
    harm(directory / name)
    with pytest.raises(FedveilError, match=words) as refused:
        write_report([directory], tmp_path / "report.html")
    assert str(directory) in str(refused.value)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("foreign", ["missing", "a file", "empty"])
def test_a_directory_of_something_else_is_refused(tmp_path, foreign):
    path = tmp_path / "it"
    if foreign == "a file":
        path.write_text("x")
    if foreign == "empty":
        path.mkdir()
    with pytest.raises(FedveilError, match="name the --out directory"):
        read_artifacts([path])


def _bomb(path, header):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("originals", "images/lm/none/naive"):
            archive.writestr(f"{name}.npy", header + bytes(1000))


@pytest.mark.parametrize("shape", [(10**6, 3, 1000, 1000), (4, 3, 8, 8), (0, 3, 8, 8)])
def test_a_header_that_promises_more_than_there_is(tmp_path, shape):
    audit = make_leakage(tmp_path / "leakage", [leakage_row()])
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    _bomb(audit / "reconstructions.npz", buffer.getvalue())
    with pytest.raises(FedveilError, match=r"larger than|cut short|is empty"):
        build_page(read_artifacts([audit]), title="t", now=NOW)
