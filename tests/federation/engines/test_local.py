import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import engine_apps
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg

from fedveil.errors import FedveilError
from fedveil.federation.engines.local import LocalGrid

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def grid():
    with LocalGrid("engine_apps:app", nodes=6, workers=2, run_config={"lr": 0.5}) as grid:
        yield grid


def ask(node, kind, **config):
    return Message(RecordDict({"config": ConfigRecord(config)}), node, kind)


def children(pid):
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_nodes_know_their_partition_and_compute_with_one_thread(grid):
    ids = grid.get_node_ids()
    assert ids == sorted(set(ids))
    assert [node.node_id for node in grid.get_nodes()] == ids
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in ids])
    who = [reply.content["who"] for reply in replies]
    assert [record["partition"] for record in who] == list(range(6))
    assert {record["partitions"] for record in who} == {6}
    assert {(record["threads"], record["omp"]) for record in who} == {(1, "1")}
    assert {record["run-config"] for record in who} == {"0.5"}
    assert os.getpid() not in {record["pid"] for record in who}


def test_replies_name_what_they_answer(grid):
    node = grid.get_node_ids()[3]
    message = Message(RecordDict(), node, "query", group_id="7")
    (reply,) = grid.send_and_receive([message])
    assert reply.metadata.reply_to_message_id == message.metadata.message_id != ""
    assert reply.metadata.message_id not in ("", message.metadata.message_id)
    assert reply.metadata.src_node_id == node
    assert reply.metadata.dst_node_id == message.metadata.src_node_id
    assert reply.metadata.group_id == "7"


def test_replies_keep_the_order_of_the_messages(grid):
    ids = grid.get_node_ids()
    naps = [0.4, 0.0, 0.2, 0.1, 0.0, 0.05]
    for _ in range(2):  # the second time the grid knows who is slow, and starts with them
        messages = [
            ask(node, "query.nap", seconds=nap) for node, nap in zip(ids, naps, strict=True)
        ]
        replies = grid.send_and_receive(messages)
        assert [reply.content["m"]["slept"] for reply in replies] == naps


def test_an_idle_worker_takes_the_next_message(grid):
    first, *others = grid.get_node_ids()
    messages = [ask(node, "query.nap", seconds=0.15) for node in others]
    start = time.monotonic()
    grid.send_and_receive([ask(first, "query.nap", seconds=0.75), *messages])
    assert time.monotonic() - start < 1.1  # halves dealt out beforehand would take 1.05 + overhead


def test_state_stays_with_its_node_whichever_worker_acts(grid):
    ids = grid.get_node_ids()
    pids = set()
    for times in range(1, 6):
        order = ids if times % 2 else ids[::-1]
        for reply in grid.send_and_receive([ask(node, "train.count") for node in order]):
            assert reply.content["m"]["times"] == times
            assert reply.content["m"]["whole"] == 1
            pids.add(reply.content["m"]["pid"])
    assert len(pids) == 2


def test_messages_to_one_node_run_one_after_another():
    with LocalGrid("engine_apps:app", nodes=3, workers=3) as grid:
        node = grid.get_node_ids()[1]
        replies = grid.send_and_receive([ask(node, "train.count") for _ in range(20)])
        assert [reply.content["m"]["times"] for reply in replies] == list(range(1, 21))


def test_an_exception_becomes_an_error_reply_and_leaves_the_state_alone(grid, capfd):
    ids = grid.get_node_ids()
    for _ in range(2):
        replies = grid.send_and_receive([ask(node, "query.fail") for node in ids])
        assert [reply.has_error() for reply in replies] == [False, True] * 3
        assert replies[1].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert replies[1].error.reason == "ValueError: partition 1 has no images"
    assert "Traceback" not in capfd.readouterr().err


def test_a_message_that_is_no_reply_is_refused(grid):
    (reply,) = grid.send_and_receive([ask(grid.get_node_ids()[0], "query.wrong")])
    assert "reply_to=message" in reply.error.reason


def test_unknown_nodes_and_stale_messages_are_answered_with_an_error(grid):
    stale = ask(grid.get_node_ids()[0], "query")
    stale.metadata.created_at -= stale.metadata.ttl + 1
    unknown, expired = grid.send_and_receive([ask(10**6, "query"), stale])
    assert unknown.error.code == ErrorCode.NODE_UNAVAILABLE
    assert "1000000" in unknown.error.reason
    assert expired.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_push_then_pull_delivers_each_reply_once(grid):
    ids = grid.get_node_ids()
    sent = grid.push_messages([ask(node, "query") for node in ids])
    got = []
    while len(got) < len(ids):
        got += grid.pull_messages(sent)
    partitions = [reply.content["who"]["partition"] for reply in got]
    assert sorted(partitions) == list(range(6))
    assert grid.pull_messages(sent) == []
    assert grid.pull_messages(["no such id"]) == []


def test_a_message_is_sent_as_it_was_when_pushed(grid):
    node = grid.get_node_ids()[0]
    record = RecordDict({"config": ConfigRecord({"seconds": 0.0})})

    def messages():
        for seconds in (0.01, 0.02, 0.03, 0.04):
            record["config"]["seconds"] = seconds
            yield Message(record, node, "query.nap")

    replies = grid.send_and_receive(messages())
    assert [reply.content["m"]["slept"] for reply in replies] == [0.01, 0.02, 0.03, 0.04]


def test_mods_run_around_the_client_app(grid):
    replies = grid.send_and_receive(
        [ask(node, "query.marked", seen="no") for node in grid.get_node_ids()]
    )
    assert all(reply.content["config"]["seen"] == "yes" for reply in replies)
    assert [reply.content["mark"]["partition"] for reply in replies] == list(range(6))


@pytest.mark.parametrize("size", [10, 100_000])
def test_payloads_never_mix(grid, size):
    ids = grid.get_node_ids()
    shared = np.full(size, -1.0, dtype=np.float32)
    for round_number in range(4):
        common = ArrayRecord([shared + round_number])
        records = []
        for node in ids:
            own = ArrayRecord([np.full(size, 100 * round_number + node, dtype=np.float32)])
            arrays = ArrayRecord({"own": own["0"]} | {"common": common["0"]})
            records.append(RecordDict({"arrays": arrays, "config": ConfigRecord({"n": node})}))
        messages = [
            Message(record, node, "evaluate")
            for record, node in zip(records, ids, strict=True)
            for _ in range(2)
        ]
        del common, arrays, own, records  # their memory may be given to the next round's arrays
        for message, reply in zip(messages, grid.send_and_receive(messages), strict=True):
            node = message.metadata.dst_node_id
            arrays = reply.content["arrays"]
            assert (arrays["own"].numpy() == 100 * round_number + node).all()
            assert (arrays["common"].numpy() == round_number - 1).all()
            assert reply.content["config"]["n"] == node
            assert list(message.content["arrays"]) == ["own", "common"]


def test_two_interleaved_groups_each_get_their_own_model(grid):
    ids = grid.get_node_ids()
    for round_number in range(3):
        payloads = [
            RecordDict(
                {
                    "arrays": ArrayRecord([np.full(50_000, sign * (round_number + 1.0))]),
                    "config": ConfigRecord({}),
                }
            )
            for sign in (1, -1)
        ]
        messages = [Message(payloads[i % 2], node, "evaluate") for i, node in enumerate(ids)]
        for i, reply in enumerate(grid.send_and_receive(messages)):
            expected = (-1) ** i * (round_number + 1.0)
            assert (reply.content["arrays"]["0"].numpy() == expected).all()


def test_a_killed_worker_is_replaced_and_its_message_tried_again(tmp_path):
    fuse = tmp_path / "fuse"
    with LocalGrid("engine_apps:app", nodes=6, workers=2) as grid:
        ids = grid.get_node_ids()
        grid.send_and_receive([ask(node, "train.count") for node in ids])
        fuse.write_text("x")
        replies = grid.send_and_receive([ask(ids[0], "query.die", fuse=str(fuse))])
        assert not replies[0].has_error()
        fuse.write_text("xx")
        naps = [ask(node, "query.nap", seconds=0.05) for node in ids[1:]]
        doomed, *others = grid.send_and_receive([ask(ids[0], "query.die", fuse=str(fuse)), *naps])
        assert doomed.error.code == ErrorCode.CLIENT_APP_CRASHED
        assert f"node {ids[0]}" in doomed.error.reason
        assert "SIGKILL" in doomed.error.reason
        assert not any(reply.has_error() for reply in others)
        counts = grid.send_and_receive([ask(node, "train.count") for node in ids])
        assert [reply.content["m"]["times"] for reply in counts] == [2] * 6
        assert len({reply.content["m"]["pid"] for reply in counts}) <= 2


def test_idle_workers_that_were_killed_are_replaced():
    with LocalGrid("engine_apps:app", nodes=4, workers=2) as grid:
        ids = grid.get_node_ids()
        before = children(os.getpid())
        pids = {
            reply.content["who"]["pid"]
            for reply in grid.send_and_receive([ask(node, "query") for node in ids])
        }
        assert pids <= set(before)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        replies = grid.send_and_receive([ask(node, "query") for node in ids])
        assert not any(reply.has_error() for reply in replies)
        assert pids.isdisjoint(reply.content["who"]["pid"] for reply in replies)


def test_timeouts_hold_and_late_replies_are_thrown_away(grid):
    ids = grid.get_node_ids()
    late = [ask(node, "query.nap", seconds=0.6) for node in ids[:4]]  # two begin, two wait
    quick = ask(ids[5], "query.nap", seconds=0.0)
    grid.send_and_receive([quick])
    start = time.monotonic()
    assert grid.send_and_receive(late, timeout=0.2) == []
    assert time.monotonic() - start < 0.4
    replies = grid.send_and_receive(
        [ask(node, "query.nap", seconds=0.01 * i) for i, node in enumerate(ids)]
    )
    assert [reply.content["m"]["slept"] for reply in replies] == [0.01 * i for i in range(6)]
    assert time.monotonic() - start < 1.1  # the two that no worker had begun were withdrawn
    assert grid.pull_messages([message.metadata.message_id for message in late]) == []


def test_a_partly_answered_round_returns_what_came(grid):
    ids = grid.get_node_ids()
    slow = ask(ids[0], "query.nap", seconds=0.8)
    naps = [ask(node, "query.nap", seconds=0.0) for node in ids[1:]]
    replies = grid.send_and_receive([slow, *naps], timeout=0.4)
    assert [reply.metadata.src_node_id for reply in replies] == ids[1:]


def test_a_client_app_may_be_an_object_and_workers_may_be_spawned(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    with LocalGrid(engine_apps.query, nodes=2, workers=1, start_method="spawn") as grid:
        (reply,) = grid.send_and_receive([ask(grid.get_node_ids()[1], "query")])
        assert reply.content["who"]["partition"] == 1
        assert reply.content["who"]["threads"] == 1


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_workers_compute_although_the_parent_has_used_threads():
    convolution = torch.nn.Conv2d(3, 16, 3)
    convolution(torch.rand(8, 3, 64, 64)).sum().backward()
    torch.rand(600, 600) @ torch.rand(600, 600)

    def step(message, context):
        layer = torch.nn.Conv2d(3, 16, 3)
        layer(torch.rand(8, 3, 64, 64)).sum().backward()
        torch.rand(600, 600) @ torch.rand(600, 600)
        return Message(RecordDict(), reply_to=message)

    with LocalGrid(step, nodes=4, workers=2) as grid:
        messages = [ask(node, "query") for node in grid.get_node_ids()]
        replies = grid.send_and_receive(messages, timeout=20)
    assert len(replies) == 4
    assert not any(reply.has_error() for reply in replies)


def test_closing_leaves_no_process_and_refuses_further_messages(tmp_path):
    others = children(os.getpid())
    grid = LocalGrid("engine_apps:app", nodes=2, workers=2)
    node = grid.get_node_ids()[0]
    flag = tmp_path / "begun"
    grid.push_messages([ask(node, "query.busy", flag=str(flag))])
    assert until(flag.exists, 5)
    mine = set(children(os.getpid())).difference(others)
    assert len(mine) == 2
    grid.close()
    grid.close()
    assert not any(map(alive, mine))
    with pytest.raises(RuntimeError, match="closed"):
        grid.push_messages([ask(node, "query")])


SCRIPT = """
    import sys, time
    from flwr.app import ConfigRecord, Message, RecordDict
    from fedveil.federation.engines.local import LocalGrid
    grid = LocalGrid("engine_apps:app", nodes=3, workers=2)
    flag = ConfigRecord({"flag": sys.argv[1]})
    node = grid.get_node_ids()[0]
    grid.push_messages([Message(RecordDict({"config": flag}), node, "query.busy")])
    print("ready", flush=True)
"""


def start_script(tail, flag):
    code = textwrap.dedent(SCRIPT) + tail
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(flag)],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    assert until(flag.exists, 10)
    return process


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(end, tmp_path):
    shared_before = set(Path("/dev/shm").iterdir())
    tail = "grid.send_and_receive([], timeout=1)\ntime.sleep(60)\n"
    process = start_script(tail, tmp_path / "begun")
    workers = children(process.pid)
    assert len(workers) == 2
    # Ctrl-C reaches every process of the terminal's group.
    (os.killpg if end == signal.SIGINT else os.kill)(process.pid, end)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -end
    assert until(lambda: not any(map(alive, workers)), 5)
    assert set(Path("/dev/shm").iterdir()) <= shared_before
    assert errors.count("Traceback") == (end == signal.SIGINT)  # the parent's own


def test_ctrl_c_while_a_worker_is_forked_is_not_lost():
    """Python drops what its hooks around a fork raise; the second fork meets an interrupt there."""
    forks = []

    def interrupt():
        forks.append(os.getpid())
        if len(forks) == 2:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    os.register_at_fork(before=interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            LocalGrid("engine_apps:app", nodes=3, workers=3)
    finally:
        forks.extend([0, 0])  # the hook stays for good; let it do nothing from now on
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_grid_that_was_never_closed_lets_the_program_end(tmp_path):
    process = start_script("time.sleep(1)\n", tmp_path / "begun")
    process.communicate(timeout=10)
    assert process.returncode == 0


def test_flowers_fedavg_gives_what_a_plain_loop_gives(grid):
    rng = np.random.default_rng(0)
    start = {"w": torch.from_numpy(rng.normal(size=(300, 70))), "b": torch.zeros(5)}
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=6)
    result = strategy.start(grid, ArrayRecord(start), num_rounds=2)
    weights = np.arange(1, 7) / 21
    expected = {name: tensor.numpy() for name, tensor in start.items()}
    for _ in range(2):
        expected = {
            name: sum(weight * (array * 0.5 + i) for i, weight in enumerate(weights))
            for name, array in expected.items()
        }
    for name, array in expected.items():
        np.testing.assert_allclose(result.arrays[name].numpy(), array, rtol=1e-6)
    assert len(result.train_metrics_clientapp) == 2


def test_ten_thousand_nodes_answer_in_seconds():
    with LocalGrid("engine_apps:app", nodes=10_000) as grid:
        messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        start = time.monotonic()
        replies = grid.send_and_receive(messages)
        assert time.monotonic() - start < 15
    assert [reply.content["who"]["partition"] for reply in replies] == list(range(10_000))


def test_mistakes_are_named():
    with pytest.raises(FedveilError, match="nodes = 0"):
        LocalGrid("engine_apps:app", nodes=0)
    with pytest.raises(FedveilError, match="no_such_module"):
        LocalGrid("no_such_module:app", nodes=1)
    with pytest.raises(FedveilError, match="not a ClientApp"):
        LocalGrid("engine_apps:NOT_AN_APP", nodes=1)
