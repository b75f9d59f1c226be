"""The theft audit on real, small runs."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fedveil.audit.settings import TheftSettings
from fedveil.audit.theft import OWNER, THIEF, Attempt, Theft, TheftReport, run_theft_audit
from fedveil.audit.thieves import AuditedRun, Thief
from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.federation.training_run import run_to_completion
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from fedveil.studies.comparison import Arm, Comparison
from fedveil.studies.settings import TheftOptions
from fedveil.studies.study import measure
from fedveil.studies.theft import THEFT, TheftStudy, select
from tests.commands import forked, started

SMALL = {
    "dataset": "digits",
    "model": "tests.audit.small_models:two_layers",
    "clients": 6,
    "fraction": 0.5,
    "rounds": 8,
    "epochs": 5,
    "learning_rate": 0.1,
    "strategy": "noise-delta",
    "workers": 1,
}


KEY = NoiseKey(b"the same noise in every test run")


def train(path, **changes):
    torch.set_num_threads(1)
    config = TrainConfig.check({**SMALL, **changes})
    directory = RunDirectory.create(path, config, noise_key=KEY)
    run_to_completion(directory)
    return path


@pytest.fixture(scope="module")
def noised(tmp_path_factory):
    return train(tmp_path_factory.mktemp("noised") / "run")


@pytest.fixture(scope="module")
def audited(noised, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit")
    settings = TheftSettings(run=noised, labels=(0, 20), colluders=(1, 2), thieves=1)
    return out, settings, run_theft_audit(settings, out=out, workers=2)


def test_the_rows_are_what_the_issue_asks_for(audited):
    out, _, report = audited
    content = json.loads((out / "theft.json").read_text())
    assert content["settings"]["labels"] == [0, 20]
    names = {row["attack"] for row in content["rows"] if row["colluders"] == 2}
    assert {"direct", "retrain-noised", "colluding + direct", THIEF, OWNER} <= names
    for row in content["rows"]:
        for column in ("accuracy", "alone", "advantage"):
            assert row[f"{column}_low"] <= row[column] <= row[f"{column}_high"]
        assert row["advantage"] == pytest.approx(row["accuracy"] - row["alone"])
    assert Image.open(out / "theft.png").width > 500
    assert "owner fears" in report.table()
    # The interval is over thieves, and of one there is none to be told.
    assert "(one thief)" in report.table()
    assert "[" not in report.table()


def test_a_thief_without_labels_passes_a_cap_that_held(audited):
    """The cap bounds what a copy does; names for its clusters need nobody's labels."""
    *_, report = audited
    rows = [
        report.row(name, 0, 2) for name in ("colluding + cluster", "every + cluster", THIEF, OWNER)
    ]
    for row in rows:
        assert row["labels_held"] == [0]
        assert row["alone"] < 0.4
    assert report.row("direct", 0, 2)["accuracy"] <= 0.7
    assert max(row["accuracy"] for row in rows) > 0.7
    assert rows[2]["chosen"][0].endswith("cluster")
    with pytest.raises(StopIteration):
        report.row("fine-tune", 0, 2)


def test_one_label_is_neither_none_nor_enough(noised):
    with pytest.raises(FedveilError, match="--labels 1 is out of range: give 0"):
        TheftSettings(run=noised, labels=(1,))


def test_two_colluders_with_both_signs_hold_the_owners_model(audited):
    """Whatever σ: the mean of the two copies answers as their base does."""
    out, settings, _ = audited
    run = AuditedRun(settings.run, 0)
    thief = Thief(20, 2, 0)
    last = max(
        entry.round for entry in run.rounds if set(run.clients(thief)) <= set(entry.assignment)
    )
    accuracy = json.loads((settings.run / "rounds.jsonl").read_text().splitlines()[last - 2])
    row = TheftReport(settings, 0.0, tuple(_thefts(out))).row("colluding + direct", 20, 2)
    direct = TheftReport(settings, 0.0, tuple(_thefts(out))).row("direct", 20, 2)
    assert row["accuracy"] > direct["accuracy"] + 0.2
    assert row["accuracy"] == pytest.approx(accuracy["accuracy"], abs=0.1)


def _thefts(out):
    for path in (out / "thieves").iterdir():
        yield Theft.from_json(json.loads(path.read_text())["theft"])


def test_thieves_hold_their_own_images_and_their_own_copies(noised):
    run = AuditedRun(noised, 0)
    report = {image.numpy().tobytes() for image in run.job.evaluation.report.raw}
    for colluders in (1, 2, 3):
        thief = Thief(30, colluders, 1)
        clients, seen = run.clients(thief), run.observation(thief)
        assert len(set(clients)) == colluders
        fewer = run.clients(replace(thief, colluders=max(1, colluders - 1)))
        assert clients[: len(fewer)] == fewer
        own = {i for client in clients for i in run.shares[client].tolist()}
        raw = run.job.dataset.train.raw
        held = {raw[i].numpy().tobytes() for i in own}
        labelled = {image.numpy().tobytes() for image in seen.labelled.raw}
        unlabelled = (seen.unlabelled * 255).round().to(torch.uint8)
        assert labelled <= held
        assert {image.numpy().tobytes() for image in unlabelled} <= held
        assert len(seen.labelled) == 30
        assert len(seen.labelled) + len(seen.unlabelled) == len(own)
        assert not held & report
        for copy in seen.copies:
            entry = run.archive.read(copy.round)
            sent = entry.received(copy.client).weights
            assert all(torch.equal(copy.weights[name], value) for name, value in sent.items())
        delivered = run.delivered()
        for copy in seen.copies:
            assert not torch.equal(copy.weights["output.weight"], delivered["output.weight"])


def test_the_second_colluder_received_another_copy(noised):
    run = AuditedRun(noised, 0)
    for number in range(6):
        one, two = run.clients(Thief(20, 2, number))
        late = run.rounds[-max(1, len(run.rounds) // 5) :]
        assert any(
            entry.assignment[one] != entry.assignment[two]
            for entry in late
            if {one, two} <= set(entry.assignment)
        )


def test_what_is_noised_is_seen_in_the_copies(noised):
    assert AuditedRun(noised, 0).noised == ("output.weight", "output.bias")


def test_an_audit_goes_on_where_it_stopped(audited):
    out, settings, report = audited
    stored = {path: path.read_bytes() for path in (out / "thieves").iterdir()}
    gone = out / "thieves" / f"{Thief(0, 1, 0)}.json"
    gone.unlink()
    again = run_theft_audit(settings, out=out, workers=1)
    assert {path: path.read_bytes() for path in stored} == stored  # the same figures again
    assert again.rows() == report.rows()


def test_results_from_before_an_option_came_are_kept(audited):
    out, settings, report = audited
    paths = sorted((out / "thieves").iterdir())
    stored = [json.loads(path.read_text()) for path in paths]
    for path, content in zip(paths, stored, strict=True):
        del content["audited"]["configuration"]["secure_aggregation"]
        path.write_text(json.dumps(content))
    older = [path.read_bytes() for path in paths]
    assert run_theft_audit(settings, out=out, workers=1).rows() == report.rows()
    assert [path.read_bytes() for path in paths] == older
    for wrong in ({"learning_rate": 0.5}, {"unheard_of": 1}):
        content = json.loads(older[0])
        content["audited"]["configuration"].update(wrong)
        paths[0].write_text(json.dumps(content))
        with pytest.raises(FedveilError, match="another run or seed"):
            run_theft_audit(settings, out=out, workers=1)
    paths[0].write_bytes(older[0])


def test_results_of_another_audit_are_refused(audited):
    out, settings, _ = audited
    with pytest.raises(FedveilError, match="another run or seed"):
        run_theft_audit(replace(settings, seed=1), out=out)
    damaged = out / "thieves" / f"{Thief(20, 1, 0)}.json"
    content = damaged.read_bytes()
    damaged.write_text("{")
    try:
        with pytest.raises(FedveilError, match="is damaged"):
            run_theft_audit(settings, out=out)
    finally:
        damaged.write_bytes(content)


def test_without_noise_the_last_copy_is_worth_what_it_is(tmp_path):
    path = train(tmp_path / "run", strategy="fedavg")
    settings = TheftSettings(run=path, labels=(10,), colluders=(1,), thieves=1)
    report = run_theft_audit(settings, out=tmp_path / "audit", workers=1)
    run = AuditedRun(path, 0)
    copy = run.observation(Thief(10, 1, 0)).copies[-1]
    recorded = run.directory.rounds()[copy.round - 1].copies
    assert report.row("direct", 10, 1)["accuracy"] == pytest.approx(recorded[0])
    assert report.row("direct", 10, 1)["advantage"] > 0.2
    assert report.row(OWNER, 10, 1)["accuracy"] >= report.row(THIEF, 10, 1)["accuracy"]


def test_the_two_bests_choose_by_what_they_may_see():
    """The thief by its holdout, theft by theft; the owner by the mean, one attack for all."""

    def theft(number, *attempts, alone):
        tried = tuple(Attempt(name, acc, (held, 0.0)) for name, acc, held in attempts)
        by = tuple(Attempt(name, acc, (held, 0.0)) for name, acc, held in alone)
        return Theft(Thief(10, 1, number), (number,), 10, tried, by)

    settings = TheftSettings(run=Path("run"), labels=(10,), colluders=(1,), thieves=2)
    report = TheftReport(
        settings,
        1.0,
        (
            theft(0, ("a", 0.9, 0.1), ("b", 0.5, 0.8), alone=[("p", 0.4, 0.5), ("q", 0.2, 0.9)]),
            theft(1, ("a", 0.7, 0.9), ("b", 0.8, 0.3), alone=[("p", 0.5, 0.5), ("q", 0.6, 0.1)]),
        ),
    )
    thief, owner = report.row(THIEF, 10, 1), report.row(OWNER, 10, 1)
    assert thief["chosen"] == ["b", "a"]
    assert thief["chosen_alone"] == ["q", "p"]
    assert thief["accuracy"] == pytest.approx(0.6)
    assert thief["advantage"] == pytest.approx(0.6 - 0.35)
    assert owner["chosen"] == ["a", "a"]
    assert owner["accuracy"] == pytest.approx(0.8)
    assert owner["advantage"] == pytest.approx(0.8 - 0.45)


def test_labels_that_thieves_had_not_are_not_told_of():
    def theft(number, held):
        tried = (Attempt("direct", 0.5, (0.5, 0.0)),)
        return Theft(Thief(600, 1, number), (number,), held, tried, tried)

    settings = TheftSettings(run=Path("run"), labels=(600,), colluders=(1,), thieves=2)
    report = TheftReport(settings, 0.9, (theft(0, 12), theft(1, 9)))
    told = "Thieves who were to hold 600 labelled images held 9 to 12"
    assert told in report.table()
    assert told in report.as_json()["untold"][0]
    whole = TheftReport(settings, 0.9, (theft(0, 600), theft(1, 600)))
    assert not list(whole.untold())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": (1,)}, "--labels 1 is out of range"),
        ({"labels": (10, 10)}, "none twice"),
        ({"colluders": (0,)}, "--colluders 0"),
        ({"thieves": 0}, "--thieves 0"),
        ({"colluders": (4,)}, "--colluders 4 is too many"),
    ],
)
def test_settings_that_cannot_be(noised, tmp_path, changes, message):
    with pytest.raises(FedveilError, match=message):
        run_theft_audit(TheftSettings(**{"run": noised, **changes}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_audited(tmp_path):
    for arguments in (["--run", "nowhere"], ["--run", "nowhere", "--labels", "ten"]):
        done = forked("audit", "theft", *arguments, "--out", "out", cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert ("no run directory" if len(arguments) == 2 else "no list of whole") in done.stderr
        assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_the_workers_and_keeps_what_was_done(noised, tmp_path):
    options = ["--labels", "0", "--colluders", "1", "--thieves", "12", "--workers", "2"]
    process = started("audit", "theft", "--run", noised, "--out", tmp_path, *options)
    while not list(tmp_path.glob("thieves/*.json")):
        assert process.running
        time.sleep(0.05)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    workers = [int(number) for number in listed.split()]
    os.kill(process.pid, signal.SIGINT)  # it alone, and it is to tell them
    done = process.ended(60)
    assert done.returncode == 130
    assert "the same command goes on where it stopped" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "theft.json").exists()
    assert len(workers) >= 2
    assert not any(Path(f"/proc/{number}").exists() for number in workers)


def test_a_study_pools_its_audits_and_does_nothing_twice(tmp_path):
    common = {key: value for key, value in SMALL.items() if key != "strategy"}
    study = TheftStudy(
        trainings=(
            Comparison(
                common={**common, "rounds": 4},
                arms=(Arm("noise-delta", "iid", {"strategy": "noise-delta"}),),
                seeds=(0, 1),
                prefix="digits ",
            ),
        ),
        labels=(0,),
        colluders=(1,),
        workers=2,
    )
    result = measure(study, tmp_path)
    row = result["rows"][0]
    audits = sorted(tmp_path.glob("audits/*/theft.json"))
    single = [json.loads(path.read_text())["rows"] for path in audits]
    direct = [next(r for r in rows if r["attack"] == "direct")["accuracy"] for rows in single]
    pooled = next(r for r in row["theft"] if r["attack"] == "direct")
    assert pooled["accuracy"] == pytest.approx(sum(direct) / 2)
    assert pooled["thieves"] == 2
    assert (tmp_path / "theft-study.png").read_bytes().startswith(b"\x89PNG")
    assert "| digits | iid | noise-delta |" in (tmp_path / "theft-study.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("audits/*/thieves/*")}
    assert len(before) == 2
    again = measure(study, tmp_path)
    assert again["rows"] == result["rows"]
    assert before == {p: p.stat().st_mtime_ns for p in before}


def part(**chosen):
    return select(THEFT, TheftOptions(**{"seeds": 1, **chosen}))


def test_the_committed_study_is_of_valid_settings():
    configs = [training.config(arm, seed) for training, arm, seed in THEFT.runs]
    assert len(set(configs)) == len(configs)
    study = part(datasets=["cifar10"], partitions=["shards:2"], rounds=3)
    chosen = [training.config(arm, seed) for training, arm, seed in study.runs]
    settings = {(config.dataset, config.partition, config.rounds) for config in chosen}
    assert settings == {("cifar10", "shards:2", 3)}


def test_a_part_of_the_study_says_by_which_command_it_is_made():
    study = part(partitions=["iid"], arms=["fedavg, trained alike"], seeds=2, colluders=(1, 2))
    assert study.colluders == (1, 2)
    assert study.command == (
        "fedveil reproduce theft --out DIR --partition iid --arm 'fedavg, trained alike' "
        "--seeds 2 --thieves 1 --colluders 1 --colluders 2"
    )


def test_a_study_has_the_labels_that_are_asked_for_and_refuses_wrong_ones_first(tmp_path):
    study = part(labels=(0, 10))
    assert study.labels == (0, 10)
    assert study.command.endswith("--labels 0 --labels 10")
    with pytest.raises(FedveilError, match="--labels 1 is out of range"):
        measure(part(labels=(1,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "chosen", [{"datasets": ["imagenet"]}, {"partitions": ["shards:7"]}, {"arms": ["prayer"]}]
)
def test_a_part_that_is_not_there(chosen):
    with pytest.raises(FedveilError, match="not in the study"):
        part(**chosen)
