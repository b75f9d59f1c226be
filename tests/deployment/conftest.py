"""A whole deployment on loopback: gate, SuperLink, shelf and SuperNodes, each a process."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from fedveil.data import load_dataset, parse_partition
from fedveil.data.partition import partition
from fedveil.deployment.control import register, status
from fedveil.deployment.layout import Deployment, create
from fedveil.sealing import KEY_FILE, OperatorKey
from tests.programs import warm_programs

NODES = 2
_MOST_NODES = 3
PROGRAMS = Path(sys.executable).parent


def write_sites(folder, *, nodes):
    """Share the training images of digits out over folders of PNG files, one a node."""
    data = load_dataset("digits")
    shares = partition(data.train.labels, clients=nodes, scheme=parse_partition("iid"), seed=0)
    for number, share in enumerate(shares):
        for index in share.tolist():
            name = data.classes[int(data.train.labels[index])]
            file = folder / f"node-{number}" / name / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.train.raw[index, 0].numpy()).save(file)
    return [len(share) for share in shares]


def free_block():
    """Return a port after which all those a deployment uses are free."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            base = probe.getsockname()[1]
        if base < 60_000 and all(_free(base + i) for i in (0, 1, 2, *range(10, 10 + _MOST_NODES))):
            return base
    raise AssertionError("no block of free ports")


def _free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class Federation:
    """Runs the scripts ``fedveil deploy init`` wrote, as they are."""

    def __init__(self, home):
        self.home = home
        self.processes = {}
        self.logs = home.parent / "logs"
        self.logs.mkdir()
        self.key = OperatorKey.make(home.parent / "key").path

    def start(self, name, *command, **settings):
        with (self.logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env={**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}", **settings},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_part(self, part):
        # The ServerApp's process, which writes the runs, is the SuperLink's.
        secrets = {KEY_FILE: str(self.key)} if part == "superlink" else {}
        self.start(part, self.home / f"start-{part}", **secrets)

    def start_node(self, number):
        """Start a node, and after a failure again, as its unit does.

        One that was killed fails so long as Flower has not missed its heartbeats.
        """
        images = str(self.home.parent / "sites" / f"node-{number}")
        script = self.home / "nodes" / f"node-{number}" / "start"
        again = 'until "$0"; do sleep 5; done'
        self.start(f"node-{number}", "sh", "-c", again, script, FEDVEIL_NODE_IMAGES=images)

    def kill(self, name, number=signal.SIGKILL):
        process = self.processes.pop(name)
        for sign in (number, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(timeout=5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    @property
    def ports(self):
        """Those of the SuperLink, the gate and the shelf."""
        deployment = Deployment.open(self.home)
        superlink = int(deployment.superlink.rpartition(":")[2])
        return superlink, deployment.port, deployment.shelf_port

    def greeted(self, number):
        """Return how often a node was told its number, which it is when it is let in."""
        return self.log(f"node-{number}").count("SuperNode ID:")

    def log(self, name):
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def until(self, condition, *, seconds=600):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return
            ended = {n: p.returncode for n, p in self.processes.items() if p.poll() is not None}
            assert not ended, {name: self.log(name)[-2000:] for name in ended}
            time.sleep(0.3)
        raise AssertionError({name: self.log(name)[-1000:] for name in self.processes})


def train_command(federation, out, *options):
    """Return a protected training run on the deployment, as its README prints it."""
    deployment = Deployment.open(federation.home)
    command = [
        "env",
        f"{KEY_FILE}={federation.key}",
        PROGRAMS / "fedveil",
        "train",
        "--engine=deployed",
        f"--superlink={deployment.superlink}",
        f"--root-certificates={federation.home / 'ca.crt'}",
        f"--clients={len(federation.examples)}",
        "--fraction=1",
        "--dataset=digits",
        "--strategy=noise-delta",
        "--cap=0.6",
        f"--out={out}",
        *options,
    ]
    return list(map(str, command))


@contextmanager
def deployed(root, *, nodes, policy=None):
    """Start a deployment in a folder, and wait until every node is online."""
    with warm_programs():
        yield from _deployed(root, nodes=nodes, policy=policy)


def _deployed(root, *, nodes, policy):
    home = root / "deployment"
    create(home, Deployment("127.0.0.1", free_block(), nodes), policy=policy)
    federation = Federation(home)
    federation.examples = write_sites(root / "sites", nodes=nodes)
    try:
        for part in ("shelf", "superlink", "gate"):
            federation.start_part(part)
        federation.until(lambda: not any(map(_free, federation.ports)))
        register(home)
        for number in range(nodes):
            federation.start_node(number)
        # To ask for all states takes two processes each time, and the cores that the nodes need.
        federation.until(lambda: all(federation.greeted(number) for number in range(nodes)))
        found = status(home)
        assert all(found.parts.values())
        assert {node.status for node in found.nodes} == {"online"}
        yield federation
    finally:
        for name in list(federation.processes):
            federation.kill(name, signal.SIGTERM)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    with deployed(tmp_path_factory.mktemp("deployment"), nodes=NODES) as federation:
        yield federation
