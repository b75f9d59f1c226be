"""Registering a deployment's nodes, and saying what runs."""

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedveil.deployment.admission import Refusals
from fedveil.deployment.layout import CONNECTION, Deployment
from fedveil.errors import FedveilError
from fedveil.federation.engines.deployed import SuperLink, environment
from fedveil.files import json_bytes, write_atomically

_REGISTERED = "registered.json"


@dataclass(frozen=True)
class NodeStatus:
    """One node.

    Attributes:
        name: Its folder's name, or that it is no node of this deployment.
        number: Flower's node id; ``None`` before it is registered.
        status: ``online``, ``offline``, ``registered`` (never seen yet), or ``not registered``.
        refused: When its policy last refused a message, and why.
    """

    name: str
    number: int | None
    status: str
    refused: str | None = None


@dataclass(frozen=True)
class RunStatus:
    """One run: its number, app, status, and why it ended so."""

    number: int
    app: str
    status: str
    details: str


@dataclass(frozen=True)
class Status:
    """What ``fedveil deploy status`` prints.

    Attributes:
        parts: Each part of the server and whether something listens there.
        nodes: The nodes, those of the folder first.
        runs: The runs of the SuperLink's database, the newest first.
    """

    parts: dict[str, bool]
    nodes: tuple[NodeStatus, ...]
    runs: tuple[RunStatus, ...]


def register(path: Path) -> dict[str, int]:
    """Make every node's public key known to the running SuperLink; those known already stay.

    Args:
        path: Folder of the deployment.

    Returns:
        Flower's node id of each node, also kept in ``registered.json``.

    Raises:
        FedveilError: The SuperLink does not answer or refuses a key.
    """
    deployment, link = Deployment.open(path), _link(path)
    known = _registered(path)
    for name in deployment.node_names():
        if name in known:
            continue
        key = path / "nodes" / name / "node.pub"
        done = link.flwr("supernode", "register", str(key), CONNECTION, "--name", name)
        answer = link.answer(done)
        if not answer.get("success"):
            raise FedveilError(
                f"{name} could not be registered: {link.reason(done)}; is start-superlink running?"
            )
        known[name] = int(answer["node-id"])
        write_atomically(path / _REGISTERED, json_bytes(known))
    return known


def status(path: Path) -> Status:
    """Ask every part of a deployment's server.

    Raises:
        FedveilError: The folder is no deployment.
    """
    deployment, link = Deployment.open(path), _link(path)
    superlink = int(deployment.superlink.rpartition(":")[2])
    parts = {
        f"superlink {deployment.superlink}": _listens("127.0.0.1", superlink),
        f"gate {deployment.gate}": _listens(_reachable(deployment), deployment.port),
        f"shelf 127.0.0.1:{deployment.shelf_port}": _listens("127.0.0.1", deployment.shelf_port),
    }
    nodes = link.answer(link.flwr("supernode", "list", CONNECTION)).get("nodes", [])
    runs = link.answer(link.flwr("list", CONNECTION)).get("runs", [])
    seen = {int(node["node-id"]): str(node["status"]) for node in nodes}
    known, refusals = _registered(path), Refusals(path).read()
    ours = [
        NodeStatus(
            name,
            known.get(name),
            seen.pop(known.get(name, 0), "not registered"),
            _told(refusals.get(str(known.get(name)))),
        )
        for name in deployment.node_names()
    ]
    others = [NodeStatus("not of this folder", number, text) for number, text in seen.items()]
    return Status(
        parts,
        (*ours, *others),
        tuple(
            RunStatus(
                int(run["run-id"]),
                f"@{run['fab-id']}=={run['fab-version']}",
                run["status"],
                run["status-details"].removeprefix("N/A"),
            )
            for run in runs
        ),
    )


def _told(refusal: Mapping[str, str] | None) -> str | None:
    return None if refusal is None else f"{refusal['date']}: {refusal['reason']}"


def _link(path: Path) -> SuperLink:
    home = path.resolve() / "flwr"
    return SuperLink(home, environment(home), check=lambda: None)


def _registered(path: Path) -> dict[str, int]:
    file = path / _REGISTERED
    if not file.exists():
        return {}
    known: dict[str, int] = json.loads(file.read_text())
    return known


def _reachable(deployment: Deployment) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(deployment.listen, deployment.listen)


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False
