"""``fedveil train`` as a user runs it: real processes, kill -9, Ctrl-C, wrong options."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedveil.data import load_dataset
from fedveil.federation.server_app import prepare_job, split_test
from fedveil.runs.archive import Archive
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from tests.commands import forked, started
from tests.programs import warm_programs

FAST = [
    "--dataset",
    "digits",
    "--clients",
    "6",
    "--fraction",
    "0.5",
    "--epochs",
    "2",
    "--clip",
    "5",
]

# Each worker of Ray's is a new interpreter that imports everything: one where one will do.
RAY = ["--engine", "ray", "--workers", 1]

# Enough rounds that a kill after the third is in the middle.
ROUNDS = 6
LONG = [*FAST, "--rounds", ROUNDS, "--learning-rate", 0.1, "--distillation-steps", 20]
LONG += ["--noise", "output.*", "--sigma-step", 2, "--sigma-limit", 1e6]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing interrupted, by their strategy: others are to end as they do."""
    runs = {}

    def run(strategy):
        if strategy not in runs:
            runs[strategy] = tmp_path_factory.mktemp(strategy) / "run"
            fedveil("--out", runs[strategy], *LONG, "--strategy", strategy)
        return runs[strategy]

    return run


def fedveil(*options, check=True):
    done = forked("train", *options)
    assert not check or done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


def start(*options):
    return started("train", *options)


def wait_for_round(path, number):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= number:
            return
        time.sleep(0.01)
    raise AssertionError(f"round {number} never came")


def same_bits(a, b):
    a, b = (load_file(path / "model.safetensors") for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def outcomes(path):
    timed = ("seconds", "calibration_seconds")
    lines = (path / "rounds.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def archived(path):
    return list(Archive.open(path, RunDirectory.open(path).noise_key()))


def sent_the_same(a, b):
    return (
        (a.round, a.assignment, len(a.copies)) == (b.round, b.assignment, len(b.copies))
        and all(one.keys() == other.keys() for one, other in zip(a.copies, b.copies, strict=True))
        and all(
            torch.equal(one[name], other[name])
            for one, other in zip(a.copies, b.copies, strict=True)
            for name in one
        )
    )


def read_summary(path):
    return json.loads((path / "summary.json").read_text())


def test_a_run_leaves_what_the_readme_says(tmp_path):
    fedveil("--out", tmp_path / "run", *FAST, "--rounds", 4, "--strategy", "noise-delta")
    rounds = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds] == [1, 2, 3, 4]
    assert {"accuracy", "copies", "sigma", "calibration_evaluations", "seconds"} <= set(rounds[0])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["copies_max"] == max(max(line["copies"]) for line in rounds)
    assert summary["rounds_over_cap"] == 0
    assert summary["configuration"]["learning_rate"] == 0.05
    assert summary["versions"]["flwr"] == "1.41.0"
    assert (tmp_path / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    model = prepare_job(TrainConfig(strategy="protected")).model
    model.load_state_dict(load_file(tmp_path / "run/model.safetensors"))
    job = prepare_job(TrainConfig(strategy="protected"))
    assert job.accuracy(model.state_dict()) == summary["accuracy"]


def test_the_best_round_is_kept_by_images_that_are_not_reported_and_a_kill_changes_no_bit(tmp_path):
    # Two clients of two classes each a round: what one round learns the next forgets.
    options = ["--dataset", "digits", "--clients", 6, "--fraction", 0.34, "--partition", "shards:2"]
    options += ["--epochs", 2, "--clip", 5, "--learning-rate", 0.1, "--strategy", "fedavg"]
    killed = start("--out", tmp_path / "killed", *options, "--rounds", 8)
    wait_for_round(tmp_path / "killed/rounds.jsonl", 6)
    killed.kill()
    fedveil("--resume", tmp_path / "killed")
    done = fedveil("--out", tmp_path / "whole", *options, "--rounds", 8)
    assert same_bits(tmp_path / "killed", tmp_path / "whole")
    lines, summary = outcomes(tmp_path / "whole"), read_summary(tmp_path / "whole")
    best = max(lines, key=lambda line: (line["calibration"], line["round"]))
    assert summary["round"] == best["round"] < 8, "the last was best, so it proves nothing"
    assert (summary["accuracy"], summary["last_accuracy"]) == (
        best["accuracy"],
        lines[-1]["accuracy"],
    )
    assert f"w of round {best['round']} of 8, the best on 179 calibration images" in done.stdout
    highest = max(lines, key=lambda line: line["accuracy"])
    told = f"Training collapsed: round 8 ends at {lines[-1]['accuracy']:.1%}, after "
    assert told + f"{highest['accuracy']:.1%} in round {highest['round']}; w is kept" in done.stderr
    weights = load_file(tmp_path / "whole/model.safetensors")
    job = prepare_job(RunDirectory.open(tmp_path / "whole").config)
    assert job.calibration_accuracy(weights) == best["calibration"]
    fedveil("--out", tmp_path / "last", *options, "--rounds", 3, "--deliver", "last")
    last = read_summary(tmp_path / "last")
    assert lines[2]["calibration"] < lines[1]["calibration"], "the last is best, too"
    assert (last["round"], last["accuracy"]) == (3, lines[2]["accuracy"])
    assert {line["calibration"] for line in outcomes(tmp_path / "last")} == {None}


@pytest.mark.parametrize("strategy", ["noise-delta", "noise-pair", "protected"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, whole, strategy):
    ended = whole(strategy)
    options = [*LONG, "--strategy", strategy, "--noise-key", ended / "noise.key"]
    killed = start("--out", tmp_path / "killed", *options)
    wait_for_round(tmp_path / "killed/rounds.jsonl", 3)
    killed.kill()
    assert not (tmp_path / "killed/summary.json").exists()
    before = archived(tmp_path / "killed")
    assert len(before) >= 3
    # A kill between the two writes of a round leaves a line without a checkpoint.
    with (tmp_path / "killed/rounds.jsonl").open("a") as stream:
        stream.write((tmp_path / "killed/rounds.jsonl").read_text().splitlines()[-1] + "\n")
    fedveil("--resume", tmp_path / "killed")
    assert same_bits(tmp_path / "killed", ended)
    assert outcomes(tmp_path / "killed") == outcomes(ended)
    noisy = any(line["sigma"] > 0 for line in outcomes(ended))
    assert noisy == (strategy != "protected")
    # Nor does the archive hold anything else, before or after.
    entries = archived(ended)
    assert [entry.round for entry in entries] == list(range(1, ROUNDS + 1))
    assert all(map(sent_the_same, before, entries))
    again = archived(tmp_path / "killed")
    assert len(again) == ROUNDS
    assert all(map(sent_the_same, again, entries))


@pytest.mark.parametrize("strategy", ["noise-delta", "protected"])
def test_a_run_that_goes_on_to_more_rounds_ends_as_one_of_so_many(tmp_path, whole, strategy):
    ended = whole(strategy)
    options = [*LONG, "--strategy", strategy, "--noise-key", ended / "noise.key"]
    fedveil("--out", tmp_path / "longer", *options, "--rounds", 2)
    refused = fedveil("--resume", tmp_path / "longer", "--rounds", 2, check=False)
    assert refused.returncode == 2
    assert "has trained 2; give more" in " ".join(refused.stderr.split())
    refused = fedveil("--resume", tmp_path / "longer", "--epochs", 2, check=False)
    assert "but --rounds from the run itself; leave out --epochs" in " ".join(
        refused.stderr.replace("│", " ").split()
    )
    done = fedveil("--resume", tmp_path / "longer", "--rounds", ROUNDS)
    summary = json.loads((tmp_path / "longer/summary.json").read_text())
    # protected sends what it sends whatever the setting: no cap of it is printed or drawn.
    capped = strategy == "noise-delta"
    over = sum(max(line["copies"]) > 0.6 for line in outcomes(ended))
    assert (f"(cap 60%, passed in {over} of {ROUNDS} rounds)" in done.stdout) == capped
    assert (summary["cap"], summary["rounds_over_cap"]) == ((0.6, over) if capped else (None, None))
    assert summary["sends"] == ("capped" if capped else "untrained")
    assert same_bits(tmp_path / "longer", ended)
    assert outcomes(tmp_path / "longer") == outcomes(ended)
    assert summary["configuration"] == read_summary(ended)["configuration"]


def test_ctrl_c_leaves_a_resumable_run_and_says_so(tmp_path):
    process = start("--out", tmp_path / "run", *FAST, "--rounds", 400)
    wait_for_round(tmp_path / "run/rounds.jsonl", 2)
    process.signal(signal.SIGINT)
    done = process.ended(30)
    told = done.stderr
    assert done.returncode == 130
    assert "Traceback" not in told
    assert f"fedveil train --resume {tmp_path / 'run'}" in told.replace("\n", " ")
    checkpoint = RunDirectory.open(tmp_path / "run").checkpoint()
    assert checkpoint is not None
    assert checkpoint.round >= 1
    assert f"Interrupted after round {checkpoint.round};" in told


def test_a_complete_run_is_left_as_it_is(tmp_path):
    fedveil("--out", tmp_path / "run", *FAST, "--rounds", 2)
    files = [
        p
        for p in (tmp_path / "run").rglob("*")
        if p.is_file() and p.suffix not in (".png", ".lock")
    ]
    before = {path: path.read_bytes() for path in files}
    fedveil("--resume", tmp_path / "run")
    assert before == {path: path.read_bytes() for path in before}


def test_the_same_seed_and_key_give_the_same_bits_and_another_key_does_not(tmp_path):
    options = [*FAST, "--strategy", "noise-delta", "--rounds", 2, "--learning-rate", 0.1]
    fedveil("--out", tmp_path / "a", *options)
    fedveil("--out", tmp_path / "b", *options, "--noise-key", tmp_path / "a/noise.key")
    fedveil("--out", tmp_path / "c", *options)
    assert same_bits(tmp_path / "a", tmp_path / "b")
    assert not same_bits(tmp_path / "a", tmp_path / "c")


def test_a_toml_file_holds_any_option_and_an_option_wins(tmp_path):
    (tmp_path / "run.toml").write_text(
        'dataset = "digits"\nclients = 6\nfraction = 0.5\nrounds = 9\nlearning-rate = 0.2\n'
    )
    fedveil("--out", tmp_path / "run", "--config", tmp_path / "run.toml", "--rounds", 1)
    used = json.loads((tmp_path / "run/config.json").read_text())["configuration"]
    assert (used["rounds"], used["learning_rate"], used["clients"]) == (1, 0.2, 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cap", "1.5"], ["cap", "1.5", "below 1"]),
        (["--rounds", "0"], ["rounds", "at least 1"]),
        (["--fraction", "0"], ["fraction", "above 0"]),
        (["--config", "bad.toml"], ["epoch", "unknown", "epochs"]),
        (["--config", "missing.toml"], ["missing.toml"]),
        (["--config", "broken.toml"], ["broken.toml"]),
        (["--noise-key", "missing.key"], ["missing.key"]),
    ],
)
def test_a_wrong_setting_names_itself_and_nothing_is_written(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("epoch = 3\n")
    Path("broken.toml").write_text("epochs = = 3\n")
    done = fedveil("--out", tmp_path / "run", *options, check=False)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--dataset", "mnits"], "mnist"),
        (["--dataset", "digits", "--model", "lenett"], "lenet"),
        (["--dataset", "digits", "--partition", "shard:2"], "shards"),
        (["--dataset", "digits", "--clients", "100000"], "100000"),
        (["--strategy", "noise-delta", "--dataset", "digits", "--noise", "conv9*"], "conv9*"),
    ],
)
def test_a_setting_that_does_not_fit_the_data_is_explained(tmp_path, options, word):
    done = fedveil("--out", tmp_path / "run", *options, check=False)
    assert done.returncode == 2
    assert word in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_occupied_directory_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = fedveil("--out", tmp_path, *FAST, check=False)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_resume_refuses_what_is_no_run_and_a_damaged_checkpoint(tmp_path):
    assert "no run directory" in fedveil("--resume", tmp_path, check=False).stderr
    fedveil("--out", tmp_path / "run", *FAST, "--rounds", 1)
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/checkpoint.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    done = fedveil("--resume", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert "checkpoint.safetensors is damaged" in done.stderr


def test_calibration_and_report_images_are_disjoint_and_together_the_test_split():
    test = load_dataset("digits", seed=0).test
    tagged = type(test)(test.raw, torch.arange(len(test)))
    split = split_test(tagged, 2_000, seed=0)
    calibration, report = set(split.calibration.labels.tolist()), set(split.report.labels.tolist())
    assert not calibration & report
    assert len(calibration | report) == len(test)
    assert len(calibration) == len(test) // 2


def test_local_and_ray_agree(tmp_path):
    options = [*FAST, "--strategy", "noise-delta", "--rounds", 3, "--learning-rate", 0.1]
    fedveil("--out", tmp_path / "local", *options)
    key = tmp_path / "local/noise.key"
    fedveil("--out", tmp_path / "ray", *options, *RAY, "--noise-key", key)
    local, ray = (load_file(tmp_path / e / "model.safetensors") for e in ("local", "ray"))
    for name in local:
        assert torch.allclose(local[name], ray[name], rtol=1e-5, atol=1e-6)
    assert any(line["sigma"] > 0 for line in outcomes(tmp_path / "ray"))


def test_a_deployed_run_of_sums_starts_ends_and_gives_the_bits_of_a_local_one(tmp_path):
    options = ["--dataset", "digits", "--clients", 2, "--strategy", "analytic", "--filters", 4]
    fedveil("--out", tmp_path / "local", *options)
    with warm_programs():
        fedveil("--out", tmp_path / "run", *options, "--engine", "deployed")
    assert same_bits(tmp_path / "run", tmp_path / "local")
    assert read_summary(tmp_path / "run")["copies_max"] < 0.6
