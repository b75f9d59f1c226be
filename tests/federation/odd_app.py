"""A Flower app that names its records, its weight and a train function itself."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as Reply
from flwr.clientapp import ClientApp
from torch import nn

from fedveil.federation.answers import answering

app = ClientApp()


def weight(client):
    return 0.5 + 0.25 * client


def _answer(message, context, step):
    client = int(context.node_config["partition-id"])
    assert message.content["settings"]["server-round"] == 1
    arrays = {
        name: Array(np.asarray(array.numpy() + np.float32(step * (client + 1))))
        for name, array in message.content["weights"].items()
    }
    metrics = {
        "share": weight(client),
        "train_loss": 0.1 * client,
        "by class": [float(client), 1.0],
        "images": client,
    }
    content = {
        "model": ArrayRecord(arrays),
        "said": MetricRecord(metrics),
        "notes": ConfigRecord({"client": client}),
    }
    return Reply(RecordDict(content), reply_to=message)


@app.train()
def train(message, context):
    return _answer(message, context, 0.01)


def _net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


app.train("answers")(answering(train, _net, arrays="weights"))


@app.train("twice")
def train_twice(message, context):
    return _answer(message, context, 0.02)


@app.evaluate()
def evaluate(message, context):
    raise AssertionError("no client is to evaluate")
