"""Speaks to a gate as a node does, signed by the node's key."""

import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from datetime import UTC, datetime

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message


def headers(key_file, *, at=None):
    """Return what Flower's SuperNode puts on a request."""
    key = load_ssh_private_key(key_file.read_bytes(), password=None)
    timestamp = (at or datetime.now(UTC)).isoformat()
    public = public_key_to_bytes(key.public_key())
    return {
        "Content-Type": "application/protobuf",
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public).decode(),
        TIMESTAMP_HEADER: timestamp,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, timestamp.encode())).decode(),
    }


def ask(port, name, body, authority, head, *, timeout=30):
    """Return status and content of the answer to a question to the nodes' interface."""
    request = urllib.request.Request(
        f"https://127.0.0.1:{port}/v1/fleet/{name}", data=body, headers=head, method="POST"
    )
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=authority)),
    )
    try:
        with opener.open(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def heartbeat(number, *, interval=30):
    """Return a heartbeat of a node, which promises the next in so many seconds."""
    node = Node(node_id=number)
    return SendNodeHeartbeatRequest(node=node, heartbeat_interval=interval).SerializeToString()
