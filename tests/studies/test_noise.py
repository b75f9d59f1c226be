import json

import pytest

from fedveil.errors import FedveilError
from fedveil.studies.comparison import Arm
from fedveil.studies.noise import NOISE, SEARCH, NoiseSearch, NoiseStudy
from fedveil.studies.study import measure

STUDY = NoiseStudy(
    common={
        "dataset": "digits",
        "model": "tests.audit.small_models:two_layers",
        "clients": 6,
        "fraction": 0.5,
        "rounds": 4,
        "cap": 0.6,
        "clip": 5,
    },
    arms=(
        Arm("fedavg", "iid", {"strategy": "fedavg"}),
        Arm("noise-delta", "iid", {"strategy": "noise-delta", "epochs": 4}),
        Arm("fedavg", "shards:2", {"strategy": "fedavg"}),
        Arm("noise-delta", "shards:2", {"strategy": "noise-delta"}),
    ),
    seeds=(0, 1),
)


def test_a_study_reports_what_its_runs_say_and_does_not_run_them_twice(tmp_path):
    result = measure(STUDY, tmp_path)
    for name in ("noise.png", "noise-frontier.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    row = result["rows"][1]
    runs = [tmp_path / "runs" / f"noise-delta-iid-{seed}" for seed in (0, 1)]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    assert row["final"] == [summary["accuracy"] for summary in summaries]
    assert row["copies_max"] == max(summary["copies_max"] for summary in summaries)
    assert row["rounds_over_cap"] == sum(summary["rounds_over_cap"] for summary in summaries)
    assert f"{row['final_mean']:.2%}" in (tmp_path / "noise.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/rounds.jsonl")}
    assert len(before) == 8
    again = measure(STUDY, tmp_path)
    assert again["rows"] == result["rows"]
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_run_whose_noise_cannot_reach_the_cap_is_a_result(tmp_path):
    # A σ this small changes nothing, so the run ends in the first round that needs noise.
    settings = {"strategy": "noise-delta", "epochs": 6, "sigma_limit": 1e-6, "sigma_start": 1e-6}
    study = NoiseSearch({**STUDY.common, "rounds": 12}, (Arm("weak", "iid", settings),), seeds=(0,))
    row = measure(study, tmp_path)["rows"][0]
    assert 0 < row["rounds"][0] < 12
    assert "no noise up to sigma" in (tmp_path / "runs/weak-iid-0/ended.txt").read_text()


def test_a_directory_of_other_settings_is_refused(tmp_path):
    one = NoiseSearch({**STUDY.common, "rounds": 1}, STUDY.arms[:1], seeds=(0,))
    measure(one, tmp_path)
    other = NoiseSearch({**STUDY.common, "rounds": 2}, STUDY.arms[:1], seeds=(0,))
    with pytest.raises(FedveilError, match="other settings"):
        measure(other, tmp_path)


def test_the_committed_studies_are_of_valid_settings():
    for study in (NOISE, SEARCH):
        configs = [study.config(arm, seed) for arm in study.arms for seed in study.seeds]
        assert len(set(configs)) == len(configs)


def test_a_part_of_a_study_keeps_its_baselines():
    part = NOISE.of(["noise-delta"])
    assert {(arm.name, arm.partition) for arm in part.arms} == {
        (name, partition) for name in ("fedavg", "noise-delta") for partition in ("iid", "shards:2")
    }
    assert NOISE.of(()) == NOISE
    with pytest.raises(FedveilError, match="'noise-gamma' is not in the study; allowed: fedavg"):
        NOISE.of(["noise-gamma"])
