"""A real node holds an app to its site's policy, and a kill forgets nothing that was spent."""

import json
import subprocess

import pytest

from fedveil.deployment.clientapp import LEDGER
from fedveil.deployment.control import register, status
from fedveil.deployment.layout import Deployment
from fedveil.deployment.ledger import Ledger
from tests.deployment import signed
from tests.deployment.conftest import deployed, train_command

APP = "@fedveil/fedveil-run==1.0.0"
# Of the node's 1,438 images, one epoch in steps of 100: 1.27 for one round, 1.60 for two.
POLICY = f"""apps = ["{APP}"]
messages = ["query", "train"]
models = ["cnn"]
transform = "dct:keep=10"
epsilon = 1.4
"""
PRIVATE = ("--defense=dp-sgd:noise=1.5", "--batch-size=100", "--strategy=fedavg")


@pytest.fixture
def federation(tmp_path):
    (tmp_path / "policy.toml").write_text(POLICY)
    with deployed(tmp_path, nodes=1, policy=tmp_path / "policy.toml") as federation:
        yield federation


def _train(federation, out, *options):
    command = train_command(federation, out, f"--app={APP}", *PRIVATE, *options)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def _give_up(federation, node):
    """Let Flower miss the node's heartbeats after 20 seconds, its least, instead of a minute."""
    (number,) = register(federation.home).values()
    beat = signed.heartbeat(number, interval=10)
    port, authority = Deployment.open(federation.home).port, federation.home / "ca.crt"
    head = signed.headers(node / "node.key")
    assert signed.ask(port, "send-node-heartbeat", beat, authority, head)[0] == 200


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

    greeted = federation.greeted(0)
    federation.kill("node-0")
    _give_up(federation, node)
    federation.start_node(0)
    federation.until(lambda: federation.greeted(0) > greeted)
    done = _train(federation, tmp_path / "again", "--rounds=1")
    assert done.returncode == 2
    assert told in done.stderr
    assert Ledger(node / LEDGER).releases() == spent
