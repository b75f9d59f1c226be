"""The grid of the ServerApp; what it costs and saves is in benchmarks/deployed_round.py."""

import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedveil.federation.engines.eager_grid import EagerGrid

GONE, THERE = 71, 72


class SuperLink(Grid):
    """Answers for a node that is gone as Flower's SuperLink does, by Flower's own function."""

    def __init__(self):
        self.asked = {}
        self.looks = 0

    set_run = run = create_message = get_node_ids = get_nodes = send_and_receive = None

    def push_messages(self, messages):
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"message {number}"
            self.asked[f"message {number}"] = message
        return list(self.asked)

    def pull_messages(self, message_ids):
        self.looks += 1
        for number in list(message_ids):
            message = self.asked[number]
            if message.metadata.dst_node_id == GONE:
                yield create_message_error_unavailable_res_message(message.metadata, "node_unavail")
            elif self.looks > 1:
                yield Message(message.content, reply_to=message)


@pytest.fixture
def messages(monkeypatch):
    for name, value in (("_run_id", 1), ("_node_id", 1), ("_task_id", 0)):
        monkeypatch.setattr(TaskIdentity, name, value)
    content = RecordDict({"m": MetricRecord({"x": 1})})
    return [Message(content, dst_node_id=node, message_type="train") for node in (GONE, THERE)]


def test_a_node_that_is_gone_is_named_by_its_number(messages):
    gone, there = EagerGrid(SuperLink()).send_and_receive(messages, timeout=5)
    assert gone.metadata.src_node_id == GONE
    assert "heartbeat" in gone.error.reason
    assert there.metadata.src_node_id == THERE
    assert not there.has_error()


def test_the_wait_ends_with_its_time(messages):
    grid = SuperLink()
    grid.looks = -(10**6)
    (only,) = EagerGrid(grid).send_and_receive(messages, timeout=0.3)
    assert only.metadata.src_node_id == GONE
