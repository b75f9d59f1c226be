"""Who may pass the gate: nodes of the deployment, each in its own name alone."""

import binascii
import json
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.constant import (
    SUPERLINK_NODE_ID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, verify_signature
from google.protobuf.message import DecodeError, Message

from fedveil.deployment.policy import PolicyError
from fedveil.files import write_atomically

# An answer is about as long as the model that it answers; twice that in a secure sum's words, and
# what got lost is sent again. What is not a model's (statistics, a first answer) has the least.
_PER_BYTE = 4
_LEAST = 256 * 1024 * 1024

_LONGEST = 300

Clock = Callable[[], datetime]

_QUESTIONS: Mapping[str, type[Message]] = {
    "activate-node": ActivateNodeRequest,
    "deactivate-node": DeactivateNodeRequest,
    "send-node-heartbeat": SendNodeHeartbeatRequest,
    "pull-messages": PullMessagesRequest,
    "push-messages": PushMessagesRequest,
    "get-run": GetRunRequest,
    "get-fab": GetFabRequest,
    "pull-object": PullObjectRequest,
    "confirm-message-received": ConfirmMessageReceivedRequest,
}


@dataclass(frozen=True)
class Node:
    """A node of the deployment.

    Attributes:
        number: Flower's node id.
        public_key: As Flower sends it, PEM.
        key: The same.
    """

    number: int
    public_key: bytes
    key: ec.EllipticCurvePublicKey


class Allowance:
    """How many bytes a node may push: for its last two messages, by what it was handed with them.

    A node may be handed a message while it still answers the one before.
    """

    def __init__(self) -> None:
        self._of_this = self._left = _LEAST
        self._pulled: set[str] = set()

    def asked(self) -> None:
        """Count a message that the node is handed."""
        self._left = min(self._left, self._of_this) + _LEAST
        self._of_this = _LEAST
        self._pulled.clear()

    def handed(self, name: str, count: int) -> None:
        """Count the bytes of an object that it pulled; again and again is once."""
        if name in self._pulled:
            return
        self._pulled.add(name)
        self._of_this += _PER_BYTE * count
        self._left += _PER_BYTE * count

    def spend(self, count: int) -> bool:
        """Count bytes that it pushes; False where they are more than it has left."""
        if count > self._left:
            return False
        self._left -= count
        return True


class Register:
    """The nodes that ``fedveil deploy register`` made known, read anew when it did.

    Args:
        directory: Of the deployment.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read_at: int | None = None
        self._nodes: dict[bytes, Node] = {}

    def node(self, public_key: bytes) -> Node | None:
        """Return the node of a public key in PEM; None for a stranger's."""
        file = self._directory / "registered.json"
        try:
            changed = file.stat().st_mtime_ns
        except OSError:
            return None
        if changed != self._read_at:
            self._nodes, self._read_at = _read_nodes(self._directory, file), changed
        return self._nodes.get(public_key)


def _read_nodes(directory: Path, file: Path) -> dict[bytes, Node]:
    numbers: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
    nodes = {}
    for name, number in numbers.items():
        key = load_ssh_public_key((directory / "nodes" / name / "node.pub").read_bytes())
        assert isinstance(key, ec.EllipticCurvePublicKey)
        public = public_key_to_bytes(key)
        nodes[public] = Node(int(number), public, key)
    return nodes


def authenticated(
    headers: Mapping[str, str], register: Register, *, now: Clock = lambda: datetime.now(UTC)
) -> Node | None:
    """Return the node that signed a request's headers; None for anybody else.

    Flower signs the time of a request, nothing of its body or path: who reads a request inside its
    TLS could repeat the signature for five minutes.

    Args:
        headers: By name in lower case.
        register: The nodes.
        now: The time.
    """
    try:
        public_key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        timestamp = headers[TIMESTAMP_HEADER]
        age = (now() - datetime.fromisoformat(timestamp)).total_seconds()
    except (KeyError, ValueError, TypeError, binascii.Error):
        return None
    # First who it is, so that a stranger costs no arithmetic on curves.
    node = register.node(public_key)
    if node is None or not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE:
        return None
    return node if verify_signature(node.key, timestamp.encode(), signature) else None


def objection(question: str, body: bytes, node: Node) -> str | None:
    """Return what is wrong with a node's question; None where nothing is.

    Args:
        question: Last part of the path.
        body: What was sent.
        node: Who signed it.
    """
    kind = _QUESTIONS[question]
    try:
        asked = kind.FromString(body)
    except DecodeError:
        return "the body is no message of Flower's"
    if isinstance(asked, ActivateNodeRequest):
        return None if asked.public_key == node.public_key else "that is another node's key"
    number = asked.node.node_id if hasattr(asked, "node") else asked.node_id
    if number != node.number:
        return f"node {node.number} speaks as node {number}"
    return _forged(asked, node) if isinstance(asked, PushMessagesRequest) else None


def object_asked_for(body: bytes) -> str:
    """Return the name of the object that a node pulls, of a question without objection."""
    return str(PullObjectRequest.FromString(body).object_id)


def policy_refusals(body: bytes) -> list[str]:
    """Return what a node's policy said to the messages whose answers it pushes.

    Flower sends an exception of a ClientApp as its class and its words; the class tells which.
    """
    reasons = [told.error.reason for told in PushMessagesRequest.FromString(body).messages_list]
    return [
        # Whatever a node writes is read by a person at a terminal.
        "".join(letter for letter in words.rstrip(">'\"") if letter.isprintable())[:_LONGEST]
        for kind, _, words in (reason.partition(":<") for reason in reasons)
        if kind == str(PolicyError)
    ]


class Refusals:
    """What each node's policy refused last, kept in a file that ``fedveil deploy status`` reads.

    Args:
        directory: Of the deployment.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "state" / "refused.json"

    def note(self, node: Node, reason: str) -> None:
        """Keep a refusal in the place of the node's last one."""
        entry = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason}
        content = json.dumps({**self.read(), str(node.number): entry})
        write_atomically(self._file, content.encode(), mode=0o600)

    def read(self) -> dict[str, dict[str, str]]:
        """Return date and reason of the last refusal by Flower's node id."""
        try:
            kept: dict[str, dict[str, str]] = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return kept


def _forged(pushed: PushMessagesRequest, node: Node) -> str | None:
    """Say so where a message is no answer of the node's own to the SuperLink.

    A node that could address another would have its code run there as if the SuperLink had sent it.
    """
    for message in pushed.messages_list:
        told = message.metadata
        if told.src_node_id != node.number:
            return f"node {node.number} pushes a message of node {told.src_node_id}"
        if told.dst_node_id != SUPERLINK_NODE_ID:
            return f"node {node.number} pushes a message to node {told.dst_node_id}"
        if not told.reply_to_message_id:
            return f"node {node.number} pushes a message that answers none"
    return None
