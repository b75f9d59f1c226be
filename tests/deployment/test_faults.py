"""kill -9 of the parts of a deployment in the middle of a run, with real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedveil.deployment.control import status
from tests.deployment.conftest import deployed, train_command

APP = "--app=@fedveil/fedveil-run==1.0.0"
NODES = 3


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """One node more, so that a round without one is of two."""
    with deployed(tmp_path_factory.mktemp("deployment"), nodes=NODES) as federation:
        yield federation


def start(federation, out, *options):
    return subprocess.Popen(
        train_command(federation, out, APP, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def rounds(out):
    path = out / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_a_round_goes_on_without_a_node_that_was_killed_while_it_trained(federation, tmp_path):
    out = tmp_path / "run"
    before = len(federation.log("node-2"))
    # So many epochs that a kill in the middle is in the middle.
    run = start(federation, out, "--rounds=1", "--epochs=20", "--timeout=45")
    try:
        federation.until(lambda: "Receiving: train message" in federation.log("node-2")[before:])
        federation.kill("node-2")
        _, told = run.communicate(timeout=600)
    finally:
        run.kill()
        federation.start_node(2)
    assert run.returncode == 0, told
    (record,) = rounds(out)
    assert record["clients"] == [0, 1]
    assert len(record["refused"]) == 1
    assert max(record["copies"]) < 0.6
    numbers = json.loads((federation.home / "registered.json").read_text())
    assert str(numbers["node-2"]) in record["refused"][0]
    # Started again, as systemd does, it is there again under its own number.
    federation.until(lambda: {node.status for node in status(federation.home).nodes} == {"online"})


@pytest.mark.slow
def test_a_run_goes_on_after_the_superlink_was_killed(federation, tmp_path):
    out = tmp_path / "run"
    run = start(federation, out, "--rounds=3")
    try:
        federation.until(lambda: len(rounds(out)) >= 1)
        before = rounds(out)
        federation.kill("superlink")
        _, told = run.communicate(timeout=600)
    finally:
        run.kill()
        federation.start_part("superlink")
    assert run.returncode == 2
    assert "has not answered" in told
    assert f"--resume {out}" in told
    # The database kept the nodes' keys: they come back without being registered again.
    federation.until(lambda: {node.status for node in status(federation.home).nodes} == {"online"})
    resume = [Path(sys.executable).with_name("fedveil"), "train", "--resume", out]
    for _ in range(2):
        done = subprocess.run(
            list(map(str, resume)), capture_output=True, text=True, check=False, timeout=600
        )
        # Until Flower has missed the killed run's heartbeats, it calls it running.
        if "ended as finished:failed" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    after = rounds(out)
    assert after[: len(before)] == before
    assert [record["round"] for record in after] == [1, 2, 3]
    assert all(record["clients"] == list(range(NODES)) for record in after)
    assert max(max(record["copies"]) for record in after) < 0.6
