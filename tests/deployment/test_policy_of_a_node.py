"""A real node holds an app to its site's policy, and a kill forgets nothing that was spent."""

import json
import subprocess

import pytest

from fedveil.deployment.clientapp import LEDGER
from fedveil.deployment.control import register, status
from fedveil.deployment.layout import Deployment, create
from fedveil.deployment.ledger import Ledger
from tests.deployment.conftest import Federation, free_block, train_command, write_sites

APP = "@fedveil/fedveil-run==1.0.0"
# Of the node's 1,438 images, one epoch in steps of 100: 1.27 for one round, 1.60 for two.
POLICY = f"""apps = ["{APP}"]
messages = ["query", "train"]
models = ["cnn"]
transform = "dct:keep=10"
epsilon = 1.4
"""
PRIVATE = ("--defense=dp-sgd:noise=1.5", "--batch-size=100", "--strategy=fedavg", "--clients=1")


@pytest.fixture
def federation(tmp_path):
    (tmp_path / "policy.toml").write_text(POLICY)
    home = tmp_path / "deployment"
    create(home, Deployment("127.0.0.1", free_block(), 1), policy=tmp_path / "policy.toml")
    federation = Federation(home)
    write_sites(tmp_path / "sites", nodes=1)
    try:
        for part in ("shelf", "superlink", "gate"):
            federation.start_part(part)
        federation.until(lambda: all(status(home).parts.values()))
        register(home)
        federation.start_node(0)
        federation.until(lambda: _online(federation))
        yield federation
    finally:
        for name in list(federation.processes):
            federation.kill(name)


def _online(federation):
    return all(node.status == "online" for node in status(federation.home).nodes)


def _train(federation, out, *options):
    command = train_command(federation, out, f"--app={APP}", *PRIVATE, *options)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def test_a_node_refuses_what_exceeds_its_policy_and_remembers_what_it_spent(federation, tmp_path):
    node = federation.home / "nodes" / "node-0"
    out = tmp_path / "run"
    done = _train(federation, out, "--rounds=2")
    told = "the site's policy allows epsilon 1.4 over all runs"
    assert done.returncode == 2
    assert told in done.stderr
    (record,) = map(json.loads, (out / "rounds.jsonl").read_text().splitlines())
    assert record["clients"] == [0]
    assert told in (status(federation.home).nodes[0].refused or "")
    spent = Ledger(node / LEDGER).releases()
    assert [(r.noise, r.steps) for r in spent] == [(1.5, 15)]
    assert len(list((node / "state/images").rglob("*.png"))) == 1438

    federation.kill("node-0")
    federation.start_node(0)
    federation.until(lambda: federation.log("node-0").count("SuperNode ID:") > 1)
    done = _train(federation, tmp_path / "again", "--rounds=1")
    assert done.returncode == 2
    assert told in done.stderr
    assert Ledger(node / LEDGER).releases() == spent
