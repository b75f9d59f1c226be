"""The model, the data and the training: nothing here knows of fedveil."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

MEAN, DEVIATION = 0.305, 0.376


class Net(nn.Module):
    """A small CNN for normalised 8x8 digits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc = nn.Linear(16 * 4 * 4, 10)

    def forward(self, images):
        """Return the logits."""
        pooled = self.pool(F.relu(self.conv(images)))
        return self.fc(pooled.view(-1, 16 * 4 * 4))


def _digits():
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    return (images - MEAN) / DEVIATION, torch.tensor(digits.target)


def load_data(partition_id, num_partitions):
    """Return one client's images, normalised, for training and for validation."""
    images, labels = _digits()
    own = torch.tensor([i for i in range(len(labels)) if i % 3][partition_id::num_partitions])
    cut = len(own) * 4 // 5
    train, valid = (TensorDataset(images[part], labels[part]) for part in (own[:cut], own[cut:]))
    return DataLoader(train, batch_size=16, shuffle=True), DataLoader(valid, batch_size=64)


def load_central():
    """Return the server's images, normalised: some to calibrate on, others to report on."""
    images, labels = _digits()
    calibration, report = (TensorDataset(images[k::6], labels[k::6]) for k in (0, 3))
    return DataLoader(calibration, batch_size=64), DataLoader(report, batch_size=64)


def train(net, loader, epochs, lr):
    """Train in place; return the mean loss."""
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimiser.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimiser.step()
            total += float(loss.detach())
    return total / (epochs * len(loader))


def test(net, loader):
    """Return loss and accuracy."""
    net.eval()
    right, loss = 0, 0.0
    with torch.no_grad():
        for images, labels in loader:
            logits = net(images)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return loss / len(loader.dataset), right / len(loader.dataset)
