"""ClientApps whose answers are known in closed form, and a grid that keeps what it carries."""

import io
import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedveil.federation.client_app import app as own_app
from fedveil.federation.secagg.client import secure_aggregation_mod


def examples(client):
    return 10 + 7 * client


def change(client, shape):
    """What client number ``client`` adds to every tensor."""
    return np.full(shape, 0.01 * (client + 1), dtype=np.float32)


def _reply(message, client, arrays):
    metrics = MetricRecord(
        {
            "num-examples": examples(client),
            "loss": 0.5,
            "server-round": message.content["config"]["server-round"],
        }
    )
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def _app(train, mods=()):
    app = ClientApp(mods=list(mods))

    @app.query()
    def query(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        metrics = MetricRecord({"partition-id": client, "num-examples": examples(client)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    app.train()(train)
    return app


def _silent(message, client):
    return client in json.loads(str(message.content["config"].get("silent", "[]")))


def _echo(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    if _silent(message, client):
        raise RuntimeError(f"client {client} is silent")
    return _reply(message, client, message.content["arrays"])


def _add(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    if _silent(message, client):
        raise RuntimeError(f"client {client} is silent")
    arrays = {
        name: Array(np.asarray(array.numpy() + change(client, array.shape), array.numpy().dtype))
        for name, array in message.content["arrays"].items()
    }
    return _reply(message, client, ArrayRecord(arrays))


def _spoil(message: Message, context: Context) -> Message:
    """Overwrite the received arrays in place, then answer with zeros."""
    client = int(context.node_config["partition-id"])
    record = message.content["arrays"]
    for name in list(record):
        array = record[name].numpy()
        record[name] = Array(np.zeros_like(array))
    return _reply(message, client, record)


echo = _app(_echo)
add = _app(_add)
spoil = _app(_spoil)


shy = ClientApp()


@shy.query()
def _shy_query(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    if client == 1:
        raise RuntimeError("the data folder '/srv/images' of this node does not exist")
    metrics = MetricRecord({"partition-id": client, "num-examples": 5})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


ordinary = ClientApp()


@ordinary.train()
def _ordinary_train(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"num-examples": 10})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content, reply_to=message)


def _broken(make, mods=()):
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        # An app that echoes shows an answer that was averaged; one that adds has a norm.
        answer = _add if message.content["config"].get("add") else _echo
        reply = answer(message, context)
        if client == 1:
            make(reply)
        return reply

    return _app(train, mods)


def _nan(reply):
    arrays = reply.content["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(np.full(arrays[name].shape, np.nan, dtype=np.float32))


def _shape(reply):
    arrays = reply.content["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(np.zeros((1, 1), dtype=np.float32))


def _dtype(reply):
    arrays = reply.content["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(np.zeros(arrays[name].shape, dtype=np.float64))


def _name(reply):
    reply.content["arrays"]["intruder"] = Array(np.zeros(1, dtype=np.float32))


def _negative(reply):
    reply.content["metrics"]["num-examples"] = -5


def _absurd(reply):
    reply.content["metrics"]["num-examples"] = 10**9


def _stale(reply):
    reply.content["metrics"]["server-round"] = 0


def _infinite(reply):
    arrays = reply.content["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(np.full(arrays[name].shape, -np.inf, dtype=np.float32))


def _huge(reply):
    arrays = reply.content["arrays"]
    for name in list(arrays):
        value = arrays[name].numpy()
        arrays[name] = Array(np.asarray(value + 1e6 * np.sign(value + 0.5), dtype=np.float32))


class Intruder:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["FEDVEIL_INTRUDER"]),)


def _pickled(reply):
    arrays = reply.content["arrays"]
    name = next(iter(arrays))
    stream = io.BytesIO()
    np.save(stream, np.array([Intruder()], dtype=object), allow_pickle=True)
    arrays[name] = Array("float32", arrays[name].shape, "numpy.ndarray", stream.getvalue())


def _raw_pickle(reply):
    arrays = reply.content["arrays"]
    name = next(iter(arrays))
    data = pickle.dumps(Intruder())
    arrays[name] = Array("float32", arrays[name].shape, "numpy.ndarray", data)


def _bomb(reply):
    """A header that promises far more numbers than any machine holds."""
    arrays = reply.content["arrays"]
    name = next(iter(arrays))
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**13,)}
    np.lib.format.write_array_header_1_0(stream, header)
    arrays[name] = Array("float32", (10**13,), "numpy.ndarray", stream.getvalue())


def _many(reply):
    reply.content["arrays"]["intruder"] = Array(np.zeros(10**6, dtype=np.float32))


def _listed(reply):
    reply.content["metrics"]["loss"] = [1.0, 2.0]


def _two_records(reply):
    reply.content["more"] = reply.content["arrays"]


def _never(reply):
    time.sleep(60)


_LIES = {
    "nan": {"partition-id": float("nan")},
    "list": {"partition-id": [1]},
    "negative": {"partition-id": -7},
    "large": {"partition-id": 2**60},
    "another's": {"partition-id": 0},
    "no images": {"num-examples": 0},
    "less than none": {"num-examples": -3},
    "half": {"num-examples": 1.5},
    "many": {"num-examples": 10**12},
}

liar = ClientApp()


@liar.query()
def _liar_query(message: Message, context: Context) -> Message:
    """Say of client 1 what the message's lie asks for."""
    client = int(context.node_config["partition-id"])
    lie = str(message.content["config"].get("lie", ""))
    said = {"partition-id": client, "num-examples": 10 + client}
    if client == 1:
        said = {} if lie == "empty" else said | _LIES.get(lie, {})
    content = RecordDict({"metrics": MetricRecord(said)})
    if client == 1 and lie == "missing":
        content = RecordDict()
    return Message(content, reply_to=message)


@liar.train()
def _liar_train(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    config = message.content["config"]
    reply = _add(message, context)
    reply.content["metrics"]["num-examples"] = 10 + client
    arrays = reply.content["arrays"]
    for name in list(arrays):
        if arrays[name].dtype == "int64":
            arrays[name] = Array(np.asarray(arrays[name].numpy() + 5))
    if client == 1:
        lie = str(config.get("lie", ""))
        if lie == "many":
            reply.content["metrics"]["num-examples"] = 10**12
        if lie.startswith("loss "):
            reply.content["metrics"]["loss"] = float(lie.split()[1])
        if lie == "variance":
            (name,) = (name for name in arrays if name.endswith("running_var"))
            arrays[name] = Array(np.full(arrays[name].shape, -1.0, dtype=np.float32))
    return reply


sends_infinity, sends_huge, sends_pickle = map(_broken, (_infinite, _huge, _pickled))
sends_raw_pickle, sends_bomb, sends_many = map(_broken, (_raw_pickle, _bomb, _many))
sends_listed, sends_two_records, never_answers = map(_broken, (_listed, _two_records, _never))
sends_nan, sends_shape, sends_dtype, sends_name = map(_broken, (_nan, _shape, _dtype, _name))
sends_negative, sends_absurd, sends_stale = map(_broken, (_negative, _absurd, _stale))


SECURE = (secure_aggregation_mod,)


def leaves_at(stage):
    """Return a mod under which client 1 answers nothing from a stage of SecAgg+ on."""

    def mod(message, context, call_next):
        record = message.content.config_records.get("secaggplus_configs", {})
        if record.get("stage") == stage and context.node_config["partition-id"] == 1:
            raise RuntimeError(f"client 1 left before {stage}")
        return call_next(message, context)

    return mod


secure_echo, secure_add = _app(_echo, SECURE), _app(_add, SECURE)
leaves_setup, leaves_share_keys, leaves_unmask = (
    _app(_add, (leaves_at(stage), *SECURE)) for stage in ("setup", "share_keys", "unmask")
)
secure_sends_nan, secure_sends_huge, secure_sends_infinity, secure_sends_name = (
    _broken(make, SECURE) for make in (_nan, _huge, _infinite, _name)
)


def own_app_until_round_3(message, context):
    """Fedveil's own client app, of which half the clients fail in the third round."""
    number = message.content.config_records.get("config", {}).get("server-round", 0)
    if number == 3 and context.node_config["partition-id"] >= 3:
        raise RuntimeError("the disk of this node is full")
    return own_app(message, context)


class RecordingGrid(Grid):
    """Hands everything through and keeps each message that goes to a client, and each reply."""

    def __init__(self, inner):
        self.inner = inner
        self.sent = []
        self.replies = []

    def set_run(self, run):
        self.inner.set_run(run)

    @property
    def run(self):
        return self.inner.run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self):
        return self.inner.get_node_ids()

    def push_messages(self, messages):
        messages = list(messages)
        self.sent += messages
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids):
        return self.inner.pull_messages(message_ids)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.sent += messages
        replies = list(self.inner.send_and_receive(messages, timeout=timeout))
        self.replies += replies
        return replies
