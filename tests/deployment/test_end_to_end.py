"""A deployment trains protected rounds over TLS with node authentication; strangers stay out.

Real processes on loopback, started by the scripts that ``fedveil deploy init`` wrote.
"""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
from safetensors.torch import load_file, save_file

from fedveil.deployment.control import register, status
from fedveil.deployment.keys import node_key
from fedveil.deployment.layout import Deployment
from fedveil.federation.engines.deployed import environment
from fedveil.federation.server_app import prepare_job
from fedveil.runs.archive import Archive
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from fedveil.sealing import KEY_FILE, OperatorKey
from tests.commands import forked
from tests.deployment import signed
from tests.deployment.conftest import NODES, PROGRAMS, train_command

APP = "@fedveil/fedveil-run==1.0.0"


def train(federation, out, *options):
    command = train_command(federation, out, *options)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def post(port, path, authority):
    request = urllib.request.Request(
        f"https://127.0.0.1:{port}{path}",
        data=b"",
        headers={"Content-Type": "application/protobuf"},
        method="POST",
    )
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=authority)),
    )
    try:
        with opener.open(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def fedveil(federation, *options):
    done = forked(*options, env={**os.environ, KEY_FILE: str(federation.key)}, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def given_up(federation):
    """How the gate answers who keeps it waiting: asked at once, as it waits long for each."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            "headers": pool.submit(_said, federation, _ASK, pauses=30),
            "body": pool.submit(_short_body, federation),
        }


@pytest.fixture(scope="module")
def trained(federation, given_up, tmp_path_factory):
    """Two protected rounds, the second with noise, whose secrets are encrypted."""
    out = tmp_path_factory.mktemp("trained") / "run"
    done = train(federation, out, f"--app={APP}", "--rounds=2", "--epochs=5")
    assert done.returncode == 0, done.stderr + federation.log("superlink")[-3000:]
    return out


def test_protected_rounds_on_the_nodes_own_images(federation, trained, tmp_path):
    rounds = [json.loads(line) for line in (trained / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds] == [1, 2]
    # Every node took part, and none of its images was left out or counted twice.
    assert all(line["clients"] == list(range(NODES)) and not line["refused"] for line in rounds)
    assert sum(federation.examples) == len(prepare_job(TrainConfig()).dataset.train)
    assert max(max(line["copies"]) for line in rounds) < 0.6
    assert any(line["sigma"] > 0 for line in rounds)
    assert not {path.name for path in trained.iterdir()} & {"noise.key", "model.safetensors"}
    fedveil(federation, "deliver", trained, "--out", tmp_path / "w.safetensors")
    job = prepare_job(TrainConfig(strategy="noise-delta"))
    assert job.accuracy(load_file(tmp_path / "w.safetensors")) > 0.6
    found = status(federation.home)
    assert [(run.app, run.status) for run in found.runs] == [(APP, "finished:completed")]


def test_what_the_nodes_were_sent_is_audited(federation, trained, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_FILE, str(federation.key))
    archive = Archive.open(trained, RunDirectory.open(trained).noise_key())
    save_file(dict(archive.read(2).received(1).weights), tmp_path / "leaked.safetensors")
    trace = ("audit", "trace", tmp_path / "leaked.safetensors", "--run", trained)
    told = fedveil(federation, *trace, "--out", tmp_path / "trace.json")
    assert f"1 of {NODES} clients named" in told
    assert json.loads((tmp_path / "trace.json").read_text())["named"] == [1]

    theft = ("audit", "theft", "--run", trained, "--out", tmp_path / "theft")
    fedveil(federation, *theft, "--labels=0", "--colluders=1", "--thieves=1")
    rows = json.loads((tmp_path / "theft/theft.json").read_text())["rows"]
    assert {"direct", "cluster"} <= {row["attack"] for row in rows}

    fedveil(
        federation,
        *("audit", "leakage", "--dataset=digits", "--model=cnn", "--images=1"),
        *("--checkpoint", trained / "model.safetensors.enc", "--attack=ig:steps=20,restarts=1"),
        *("--out", tmp_path / "leakage"),
    )
    (row,) = json.loads((tmp_path / "leakage/leakage.json").read_text())["rows"]
    assert (row["attack"], row["images"]) == ("ig:steps=20,restarts=1", 1)

    page = tmp_path / "report.html"
    results = (trained, tmp_path / "theft", tmp_path / "leakage")
    fedveil(federation, "report", *results, "--out", page)
    assert page.read_text().count("<section") > 3


def test_a_superlink_under_another_key_says_so(federation, tmp_path):
    command = train_command(federation, tmp_path / "run", f"--app={APP}", "--rounds=1")
    command[1] = f"{KEY_FILE}={OperatorKey.make(tmp_path / 'own.key').path}"
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 2
    # The ServerApp has the SuperLink's environment, and says which file and whose key.
    assert "is encrypted under another key" in done.stderr, done.stderr
    assert str(federation.key) in done.stderr
    assert not (tmp_path / "run/rounds.jsonl").exists()


def test_the_example_app_runs_once_it_is_signed(federation, tmp_path):
    example = Path(__file__).parents[2] / "examples/your-flower-app"
    signed = subprocess.run(
        [PROGRAMS / "fedveil", "deploy", "sign", str(federation.home), str(example)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert signed.stdout == "@you/your-app==1.0.0\n", signed.stderr
    result = tmp_path / "result.json"
    done = subprocess.run(
        [
            *(PROGRAMS / "flwr", "run", "@you/your-app==1.0.0", "fedveil"),
            *("--run-config", f'result="{result}" rounds=2'),
        ],
        env=environment(federation.home / "flwr"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Successfully started run" in done.stdout, done.stdout
    federation.until(lambda: result.exists() and result.read_text().endswith("}"))
    outcome = json.loads(result.read_text())
    assert outcome["model"] > 0.6
    assert len(outcome["copies"]) == 3  # w itself in the first round, two noisy ones in the second
    assert max(outcome["copies"]) < 0.6


def test_nodes_run_no_app_that_is_not_signed(federation, tmp_path):
    done = train(federation, tmp_path / "run", "--rounds=1")
    assert done.returncode == 2
    assert "FAB" in done.stderr or "verif" in done.stderr.lower(), done.stderr
    assert not (tmp_path / "run/rounds.jsonl").exists()
    assert "could not be verified" in federation.log("node-0")


def test_a_signature_that_does_not_fit_the_app_is_refused(federation, tmp_path):
    place = federation.home / "signed-apps/fedveil/fedveil-run"
    signature = json.loads((place / "1.0.0.json").read_text())
    # The same signature on the same app, a second later: what a forger would have to do.
    (place / "9.0.0.fab").write_bytes((place / "1.0.0.fab").read_bytes())
    (place / "9.0.0.json").write_text(
        json.dumps(signature | {"signed_at": signature["signed_at"] + 1})
    )
    try:
        app = "--app=@fedveil/fedveil-run==9.0.0"
        done = train(federation, tmp_path / "run", app, "--rounds=1")
    finally:
        for file in place.glob("9.0.0.*"):
            file.unlink()
    assert done.returncode == 2
    assert "FAB verification failed" in federation.log("node-0")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-nodes",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "//v1/control/list-nodes",
        "/docs",
    ],
)
def test_strangers_reach_nothing_but_the_nodes_interface(federation, path):
    port = Deployment.open(federation.home).port
    assert post(port, path, federation.home / "ca.crt")[0] == 404


def test_without_the_gate_a_stranger_could_take_the_servers_task(federation):
    """Why the SuperLink itself must never be reachable: Flower asks this caller for nothing."""
    port = Deployment.open(federation.home).port + 1
    assert post(port, "/v1/runtime/acquire-task", federation.home / "ca.crt")[0] == 200
    assert post(port, "/v1/control/list-nodes", federation.home / "ca.crt")[0] == 200


def test_the_nodes_interface_asks_who_is_speaking(federation):
    port = Deployment.open(federation.home).port
    assert post(port, "/v1/fleet/pull-messages", federation.home / "ca.crt")[0] == 401


def test_a_node_that_was_not_registered_is_turned_away(federation, tmp_path):
    (tmp_path / "node.key").write_bytes(node_key().private)
    deployment = Deployment.open(federation.home)
    command = [
        PROGRAMS / "flower-supernode",
        *("--superlink", deployment.gate),
        *("--root-certificates", federation.home / "ca.crt"),
        *("--auth-supernode-private-key", tmp_path / "node.key"),
        *("--port", deployment.port + 5),
    ]
    # Into a file: the process it leaves behind for a moment would keep a pipe open.
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            list(map(str, command)),
            env=environment(tmp_path),
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=300,
        )
    assert "Failed to initialize the connection" in (tmp_path / "log").read_text()
    assert done.returncode != 0
    assert len(status(federation.home).nodes) == NODES


def test_registering_twice_changes_nothing(federation):
    assert register(federation.home) == register(federation.home)


def test_the_status_command_says_it_all(federation):
    done = subprocess.run(
        [Path(sys.executable).with_name("fedveil"), "deploy", "status", str(federation.home)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("online") == NODES
    assert "DOWN" not in done.stdout


def _as_node(federation, number):
    """Return the gate's port, the CA, a node's signed headers, and the node ids."""
    port = Deployment.open(federation.home).port
    known = register(federation.home)
    key = federation.home / "nodes" / f"node-{number}" / "node.key"
    return port, federation.home / "ca.crt", signed.headers(key), list(known.values())


def test_a_node_speaks_for_itself_alone(federation):
    port, authority, head, ids = _as_node(federation, 0)
    own, others = (
        signed.ask(port, "send-node-heartbeat", signed.heartbeat(n), authority, head)
        for n in ids[:2]
    )
    assert own[0] == 200
    assert others[0] == 403
    assert f"node {ids[0]} speaks as node {ids[1]}".encode() in others[1]


@pytest.mark.parametrize(
    ("source", "target", "answers", "told"),
    [
        ("superlink", "other", "m", "pushes a message of node 1"),
        ("own", "other", "m", "pushes a message to node"),
        ("own", "superlink", "", "answers none"),
    ],
)
def test_a_node_cannot_push_a_message_that_is_no_answer_of_its_own(
    federation, source, target, answers, told
):
    """Before, another node took it for the SuperLink's and imported the module it named."""
    port, authority, head, ids = _as_node(federation, 0)
    numbers = {"superlink": 1, "own": ids[0], "other": ids[1]}
    metadata = Metadata(
        src_node_id=numbers[source],
        dst_node_id=numbers[target],
        reply_to_message_id=answers,
        message_type="train",
    )
    pushed = PushMessagesRequest(
        node=Node(node_id=ids[0]), messages_list=[Message(metadata=metadata)]
    )
    code, text = signed.ask(port, "push-messages", pushed.SerializeToString(), authority, head)
    assert code == 403
    assert told in text.decode()


def test_what_is_no_message_or_too_long_or_signed_long_ago_is_refused(federation):
    port, authority, head, ids = _as_node(federation, 0)
    assert signed.ask(port, "get-run", b"\xff" * 9, authority, head)[0] == 403
    assert signed.ask(port, "get-run", bytes(100_000), authority, head)[0] == 413
    for _ in range(20):  # whatever it still sends, the node is told
        assert signed.ask(port, "push-object", bytes(8 * 2**20), authority, head)[0] == 413
    key = federation.home / "nodes/node-0/node.key"
    old = signed.headers(key, at=datetime.now(UTC) - timedelta(minutes=10))
    beat = signed.heartbeat(ids[0])
    assert signed.ask(port, "send-node-heartbeat", beat, authority, old)[0] == 401
    forged = {**head, FLEET_HTTP_SIGNATURE_HEADER: old[FLEET_HTTP_SIGNATURE_HEADER]}
    assert signed.ask(port, "send-node-heartbeat", beat, authority, forged)[0] == 401


def test_an_upgrade_to_websockets_is_not_found(federation):
    port = Deployment.open(federation.home).port
    with _connected(federation, port) as stranger:
        stranger.sendall(
            b"GET /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert stranger.recv(4096).startswith(b"HTTP/1.1 404 ")


def _connected(federation, port):
    context = ssl.create_default_context(cafile=federation.home / "ca.crt")
    plain = socket.create_connection(("127.0.0.1", port), timeout=30)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_strangers_that_hold_connections_keep_no_node_out(federation):
    """Before, a hundred took every connection to the SuperLink until they let go."""
    port, authority, head, ids = _as_node(federation, 0)
    with ExitStack() as held:
        strangers = [held.enter_context(_connected(federation, port)) for _ in range(120)]
        for number, stranger in enumerate(strangers):
            # Some have not finished their headers, the others promise a body that never comes.
            rest = b"" if number % 2 else b"Host: x\r\nContent-Length: 300000000\r\n\r\n"
            stranger.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\n" + rest)
        beat = signed.heartbeat(ids[0])
        assert signed.ask(port, "send-node-heartbeat", beat, authority, head)[0] == 200
        answer = b"".join(iter(lambda: strangers[0].recv(4096), b""))  # to the end: it is closed
        assert answer.startswith(b"HTTP/1.1 401 ")


def _said(federation, sent, *, pauses=0):
    """Return how the gate answers raw bytes, the last of them sent one by one."""
    port = Deployment.open(federation.home).port
    with _connected(federation, port) as stranger:
        with suppress(OSError):  # it may close before all is sent
            stranger.sendall(sent)
            for _ in range(pauses):
                stranger.sendall(b"x")
                time.sleep(0.5)
        with suppress(OSError):
            return b"".join(iter(lambda: stranger.recv(4096), b""))
    return b""


_ASK = b"POST /v1/fleet/send-node-heartbeat HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (_ASK + b"X-Huge: " + b"a" * 10_000_000, b"HTTP/1.1 400 "),
        (_ASK + b"X: 1\r\n" * 1_000_000, b"HTTP/1.1 400 "),
        (_ASK + b"Content-Length: 9\r\nContent-Length: 8\r\n\r\n", b"HTTP/1.1 400 "),
        (_ASK + b"Content-Length: -1\r\n\r\n", b"HTTP/1.1 400 "),
        (_ASK + b"Transfer-Encoding: chunked\r\n\r\n" + b"5\r\nhello\r\n" * 9, b"HTTP/1.1 401 "),
        (b"\x16\x03\x01" * 99, b"HTTP/1.1 400 "),
    ],
)
def test_headers_and_bodies_of_strangers_that_never_end_or_lie_are_refused(
    federation, sent, answer
):
    told = _said(federation, sent)
    # What is cut off while it still sends may never read why.
    assert told.startswith(answer) or (not told and len(sent) > 2**20)
    assert _beats(federation)


def test_headers_that_come_byte_by_byte_are_given_up(given_up):
    assert given_up["headers"].result() == b""


def test_a_body_of_a_node_that_is_shorter_than_it_says_is_given_up(federation, given_up):
    assert given_up["body"].result().startswith(b"HTTP/1.1 408 ")
    assert _beats(federation)


def _short_body(federation):
    port, _, head, ids = _as_node(federation, 0)
    lines = b"".join(f"{name}: {value}\r\n".encode() for name, value in head.items())
    with _connected(federation, port) as node:
        node.sendall(_ASK + lines + b"Content-Length: 9000\r\n\r\n" + signed.heartbeat(ids[0]))
        return node.recv(4096)


def _beats(federation):
    port, authority, head, ids = _as_node(federation, 0)
    beat = signed.heartbeat(ids[0])
    return signed.ask(port, "send-node-heartbeat", beat, authority, head)[0] == 200


def test_connections_that_never_agree_on_tls_are_counted_and_let_go(federation):
    """Before, uvicorn saw none of them, and asyncio kept each for a minute."""
    port = Deployment.open(federation.home).port
    with ExitStack() as held:
        strangers = [held.enter_context(_unsaid(port)) for _ in range(300)]
        assert _beats(federation)
        with suppress(ConnectionResetError):  # one too many of its address: closed at once
            strangers[-1].settimeout(5)
            assert strangers[-1].recv(1) == b""
        assert strangers[0].recv(1) == b""  # closed after ten seconds


def _unsaid(port):
    """Return a connection on which nothing is said, not even TLS."""
    address = ("127.0.0.1", port)
    return socket.create_connection(address, timeout=30, source_address=("127.0.0.2", 0))
