"""The frontier, small enough to run, with processes of its own."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from fedveil.errors import FedveilError
from fedveil.federation.server_app import prepare_job
from fedveil.studies import frontier
from fedveil.studies.frontier import FrontierStudy
from fedveil.studies.settings import SCENARIOS
from fedveil.studies.study import Piece, measure, run_pieces

SMALL = FrontierStudy(
    dataset="digits",
    images=4,
    seeds=2,
    rounds=1,
    defenses=("none", "prune:share=0.9"),
    worst_attacks=("lm",),
    round_attacks=("ig:steps=5", "rgap"),
    inverse=False,
    model="lenet",
    clients=4,
    batch=4,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, measure(SMALL, out, workers=2)


def test_rows_are_those_of_the_audits_and_the_best_is_marked(study):
    out, result = study
    assert json.loads((out / "frontier.json").read_text()) == result
    for defense in SMALL.defenses:
        for scenario in SCENARIOS:
            rows = [
                r for r in result["rows"] if (r["defense"], r["scenario"]) == (defense, scenario)
            ]
            best = [row for row in rows if row["best"]]
            assert len(best) == 1
            found = max((row["identified"], row["psnr_original"]) for row in rows)
            assert (best[0]["identified"], best[0]["psnr_original"]) == found
            for row in rows:
                assert row["identified_low"] <= row["identified"] <= row["identified_high"]
                assert row["images"] == (16 if scenario == "sum" else 4)
    exact = next(row for row in result["rows"] if row["defense"] == "none" and row["best"])
    assert exact["scenario"] == "worst"
    assert exact["identified"] == 1
    assert exact["psnr_original"] > 60
    strengths = {row["defense"]: row["strength"] for row in result["rows"]}
    assert strengths == {"none": 0, "prune:share=0.9": 0.9}


def test_every_membership_attack_stands_beside_and_what_picks_out_most_is_marked(study):
    """Those of the audit, under whatever names: a new attack of the suite needs no edit here."""
    out, result = study
    for defense in SMALL.defenses:
        for scenario in SCENARIOS:
            rows = [
                r
                for r in result["membership"]
                if (r["defense"], r["scenario"]) == (defense, scenario)
            ]
            path = f"leakage/{scenario}-*-{defense.replace(':', '-').replace('=', '-')}"
            (audit,) = (p for p in out.glob(f"{path}/leakage.json"))
            told = json.loads(audit.read_text())["membership"]
            assert [row["attack"] for row in rows] == [row["attack"] for row in told]
            assert {"gradient", "span"} <= {row["attack"] for row in rows}
            (best,) = (row for row in rows if row["best"])
            assert best["picked_out"] == max(row["picked_out"] for row in told)
            built = [
                r for r in result["rows"] if (r["defense"], r["scenario"]) == (defense, scenario)
            ]
            assert {row["accuracy"] for row in rows} == {built[0]["accuracy"]}
    lines = (out / "frontier.md").read_text().splitlines()
    assert all(", floor " in line for line in lines[2:])
    assert "cannot tell" in lines[-1]  # sixteen images prove no rate


def test_an_attack_that_does_not_apply_is_noted_and_not_scored(study):
    _, result = study
    assert "rgap handles batches of at most 1" in result["refused"]["round-rgap-none"]
    assert not any(r["attack"] == "rgap" for r in result["rows"] if r["scenario"] == "round")


def test_an_attack_that_is_not_for_the_model_is_noted_whatever_it_says(tmp_path):
    part = dataclasses.replace(SMALL, scenarios=("worst",), worst_attacks=("fc",))
    found = frontier._attack(part, "worst", "none", "fc", tmp_path)
    assert found == {"rows": [], "membership": []}
    (note,) = tmp_path.rglob("refused.json")
    assert "its first layer" in json.loads(note.read_text())["reason"]


def test_another_refusal_is_none_of_the_attack_whatever_it_says(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise FedveilError("--attack lm handles nothing: the disk is full")

    monkeypatch.setattr(frontier, "report_of", refuse)
    with pytest.raises(FedveilError, match="disk is full"):
        frontier._attack(SMALL, "worst", "none", "lm", tmp_path)


def test_accuracy_is_that_of_the_delivered_models(study):
    out, result = study
    row = next(row for row in result["rows"] if row["defense"] == "prune:share=0.9")
    correct = []
    for seed in (0, 1):
        job = prepare_job(SMALL.training("prune:share=0.9", seed))
        weights = load_file(out / "runs" / f"prune-share-0.9-{seed}" / "model.safetensors")
        correct.append(job.accuracy(weights))
    assert row["accuracy"] == pytest.approx(np.mean(correct))
    assert row["accuracy_sd"] == pytest.approx(np.std(correct, ddof=1))


def test_the_realistic_round_attacks_the_trained_model(study):
    out, _ = study
    content = json.loads((out / "leakage" / "round-ig-steps-5-none" / "leakage.json").read_text())
    assert content["settings"]["update"] == "fedavg"
    assert content["settings"]["batch"] == 4
    assert content["settings"]["model"] == SMALL.model
    content = json.loads((out / "leakage" / "sum-ig-steps-5-none" / "leakage.json").read_text())
    assert content["settings"]["aggregate"] == SMALL.clients
    assert content["settings"]["batch"] == 4


def test_picture_and_table(study):
    out, _ = study
    assert Image.open(out / "frontier.png").width > 1500
    table = (out / "frontier.md").read_text()
    assert table.count("\n") == 2 + len(SMALL.defenses) * len(SCENARIOS)


def test_a_finished_study_is_not_measured_again(study):
    out, result = study
    files = [p for p in out.rglob("*") if p.is_file() and p.parent != out]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = measure(SMALL, out, workers=2)
    assert again["rows"] == result["rows"]
    assert {path: path.stat().st_mtime_ns for path in files} == before


def _fail(after: Path):
    while not after.exists():
        time.sleep(0.05)
    time.sleep(0.2)
    raise FedveilError("on purpose")


def _wait(path: Path):
    path.touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        path.with_suffix(".cleaned").touch()
        raise


def test_a_piece_that_fails_ends_the_study_in_a_sentence_and_the_others_clean_up(tmp_path):
    long = tmp_path / "long"
    pieces = [Piece("long", _wait, (long,)), Piece("broken", _fail, (long,))]
    with pytest.raises(FedveilError, match="broken: on purpose"):
        run_pieces(pieces, workers=2)
    assert (tmp_path / "long.cleaned").exists()


def test_an_interrupt_reaches_the_pieces(tmp_path):
    def interrupt(name, done, total):
        if name == "second":
            while not (tmp_path / "first").exists():
                time.sleep(0.05)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_pieces(
                [Piece(n, _wait, (tmp_path / n,)) for n in ("first", "second")],
                workers=2,
                on_piece=interrupt,
            )
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (tmp_path / "first.cleaned").exists()
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"images": 6}, "no multiple of the 4 images"),
        ({"sum_images": 50}, "--sum-images 50 is no multiple of the 40 images of a sum: give 80"),
        ({"scenarios": ("round", "best")}, "--scenario round, best cannot be; allowed: worst, rou"),
        ({"scenarios": ()}, "--scenario nothing"),
        ({"defenses": ("none", "none")}, "none twice"),
        ({"defenses": ("blur:sigma=0",)}, "sigma=0"),
        ({"worst_attacks": ("lmm",)}, "unknown; did you mean 'lm'"),
    ],
)
def test_studies_that_cannot_be(changes, message):
    with pytest.raises(FedveilError, match=message):
        FrontierStudy(**{"images": 4, "batch": 4, **changes})


def test_a_part_of_the_scenarios_and_two_defences_joined(study, tmp_path):
    """The trained models of the whole study serve the part."""
    part = dataclasses.replace(
        SMALL, scenarios=("sum",), sum_images=32, defenses=("none", "dct:keep=3+noise:ratio=1")
    )
    shutil.copytree(study[0], tmp_path / "part", ignore=shutil.ignore_patterns("leakage"))
    begun = []
    result = measure(part, tmp_path / "part", on_piece=lambda name, done, total: begun.append(name))
    assert {row["scenario"] for row in result["rows"]} == {"sum"}
    assert {row["images"] for row in result["rows"]} == {32}
    joined = [row for row in result["rows"] if row["family"] == "dct+noise"]
    assert {row["adaptive"] for row in joined} == {False, True}
    assert joined[0]["strength"] == pytest.approx(1 + 61 / 64)
    assert "--scenario sum" in result["command"]
    assert "--sum-images 32" in result["command"]
    assert not any(name.startswith(("worst", "round")) for name in begun)
    assert (tmp_path / "part" / "frontier.png").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    study = FrontierStudy(dataset="digits", images=4, batch=4, defenses=("blur:sigma=5",))
    with pytest.raises(FedveilError, match="sigma=5"):
        measure(study, tmp_path / "new")
    assert not (tmp_path / "new").exists()
