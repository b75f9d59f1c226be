"""Client apps the engine tests run; a module of their own, so that workers can import them."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import message_size_mod
from flwr.clientapp.typing import ClientAppCallable


def mark(message: Message, context: Context, call: ClientAppCallable) -> Message:
    """Leave a trace on the way in and on the way out, as a defence does."""
    message.content["config"]["seen"] = "yes"  # type: ignore[call-overload, index]
    reply = call(message, context)
    reply.content["mark"] = ConfigRecord({"partition": context.node_config["partition-id"]})
    return reply


app = ClientApp()
NOT_AN_APP = 7


@app.train()
def train(message: Message, context: Context) -> Message:
    """One step towards the node's own target, weighted by its own number of examples."""
    partition = int(context.node_config["partition-id"])
    arrays = [array * 0.5 + partition for array in message.content["arrays"].to_numpy_ndarrays()]
    keys = list(message.content["arrays"])
    record = ArrayRecord(dict(zip(keys, map(torch.from_numpy, arrays), strict=True)))
    metrics = MetricRecord({"num-examples": partition + 1})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)


@app.train("count")
def count(message: Message, context: Context) -> Message:
    """Count the messages this node has had, in its state; a large array lies beside."""
    seen = context.state.get("seen", MetricRecord({"times": 0}))
    seen["times"] += 1
    context.state["seen"] = seen
    if "large" not in context.state:
        large = np.full(10_000, context.node_id, dtype=np.float64)
        context.state["large"] = ArrayRecord([large])
    stored = context.state["large"].to_numpy_ndarrays()[0]
    whole = bool((stored == context.node_id).all() and len(stored) == 10_000)
    record = MetricRecord({"times": seen["times"], "whole": int(whole), "pid": os.getpid()})
    return Message(RecordDict({"m": record}), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who and where this is."""
    record = ConfigRecord(
        {
            "partition": context.node_config["partition-id"],
            "partitions": context.node_config["num-partitions"],
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "omp": os.environ["OMP_NUM_THREADS"],
            "run-config": str(context.run_config.get("lr", "")),
        }
    )
    return Message(RecordDict({"who": record}), reply_to=message)


@app.query("marked", mods=[mark, message_size_mod])
def marked(message: Message, context: Context) -> Message:
    """Return what the mod wrote on the way in."""
    record = ConfigRecord({"seen": message.content["config"]["seen"]})
    return Message(RecordDict({"config": record}), reply_to=message)


@app.query("nap")
def nap(message: Message, context: Context) -> Message:
    """Sleep as long as the message says."""
    seconds = message.content["config"]["seconds"]
    time.sleep(seconds)
    return Message(RecordDict({"m": MetricRecord({"slept": seconds})}), reply_to=message)


@app.query("fail")
def fail(message: Message, context: Context) -> Message:
    """Raise on odd partitions."""
    if context.node_config["partition-id"] % 2:
        context.state["spoilt"] = MetricRecord({"x": 1})
        raise ValueError(f"partition {context.node_config['partition-id']} has no images")
    return Message(RecordDict(), reply_to=message)


@app.query("die")
def die(message: Message, context: Context) -> Message:
    """Kill this worker outright, as often as the file named in the message has lines to lose."""
    fuse = Path(message.content["config"]["fuse"])
    if left := fuse.read_text():
        fuse.write_text(left[1:])
        os.kill(os.getpid(), signal.SIGKILL)
    return Message(RecordDict({"m": MetricRecord({"pid": os.getpid()})}), reply_to=message)


@app.query("wrong")
def wrong(message: Message, context: Context) -> Message:
    """Return the message itself instead of a reply."""
    return message


@app.query("busy")
def busy(message: Message, context: Context) -> Message:
    """Compute and never come back."""
    Path(message.content["config"]["flag"]).touch()
    matrix = torch.rand(200, 200)
    while threading.main_thread().is_alive():
        matrix = torch.tanh(matrix @ matrix)
    return Message(RecordDict(), reply_to=message)


@app.evaluate()
def echo(message: Message, context: Context) -> Message:
    """Return what came, untouched, after scribbling over the record it came in."""
    came = message.content["arrays"]
    reply = RecordDict({"arrays": ArrayRecord(dict(came)), "config": message.content["config"]})
    for key in list(came):
        del came[key]
    return Message(reply, reply_to=message)
