"""An ordinary Flower app that trains LeNet; of fedveil it has the recorder, and nothing else."""

import json
import os

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.app import Message as Reply
from flwr.clientapp import ClientApp
from torch.nn import functional as F

from fedveil.data import load_dataset
from fedveil.federation.recording import record_messages
from fedveil.models import build_model


def recorder(message, context, call_next):
    """Record where the test at hand wants it; an app would name its folder."""
    mod = record_messages(os.environ["PLAIN_RECORDED"], images=True)
    return mod(message, context, call_next)


app = ClientApp(mods=[recorder])


@app.train()
@app.train("step")
def train(message, context):
    told = json.loads(os.environ["PLAIN"])
    data = load_dataset("digits").train
    net = build_model("lenet", (1, 8, 8), 10, seed=1)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    server_round = message.content["config"]["server-round"]
    places = told["places"][server_round - 1]
    optimiser = torch.optim.SGD(net.parameters(), lr=told["rate"])
    F.cross_entropy(net(data.pixels[places]), data.labels[places]).backward()
    optimiser.step()
    counts = MetricRecord({"num-examples": len(places)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": counts})
    return Reply(content, reply_to=message)
