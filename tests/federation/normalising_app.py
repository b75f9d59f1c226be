"""An ordinary Flower app whose model takes normalised images and flattens them by ``view``."""

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.app import Message as Reply
from flwr.clientapp import ClientApp
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

app = ClientApp()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.output = nn.Linear(16 * 4 * 4, 10)

    def forward(self, images):
        pooled = F.max_pool2d(F.relu(self.conv(images)), 2)
        return self.output(pooled.view(-1, 16 * 4 * 4))


def raw():
    digits = load_digits()
    pixels = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    return pixels, torch.tensor(digits.target)


def normalised():
    pixels, labels = raw()
    return (pixels - 0.7) / 0.1, labels


def held_out(pair, first):
    return tuple(part[first::4] for part in pair)


def right(weights, pair):
    net = Net()
    net.load_state_dict(dict(weights))
    with torch.no_grad():
        return int((net(pair[0]).argmax(1) == pair[1]).sum())


@app.train()
def train(message, context):
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    pixels, labels = held_out(normalised(), 2 + context.node_config["partition-id"] % 2)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for _ in range(4):
        for index in torch.randperm(len(labels)).split(20):
            optimiser.zero_grad()
            F.cross_entropy(net(pixels[index]), labels[index]).backward()
            optimiser.step()
    metrics = MetricRecord({"num-examples": len(labels)})
    arrays = ArrayRecord(net.state_dict())
    return Reply(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
