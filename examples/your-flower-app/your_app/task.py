"""The model, the data and the training: nothing here knows of fedveil."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small CNN for 8x8 digits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.output = nn.Linear(16 * 4 * 4, 10)

    def forward(self, images):
        """Return the logits."""
        return self.output(F.max_pool2d(F.relu(self.conv(images)), 2).flatten(1))


def load_test():
    """Return the images and labels only the server has."""
    digits = load_digits()
    images = torch.tensor(digits.images[::4] / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(digits.target[::4])


def load_train(partition_id, num_partitions):
    """Return one client's images, shuffled."""
    digits = load_digits()
    index = [i for i in range(len(digits.target)) if i % 4][partition_id::num_partitions]
    images = torch.tensor(digits.images[index] / 16, dtype=torch.float32).unsqueeze(1)
    data = TensorDataset(images, torch.tensor(digits.target[index]))
    return DataLoader(data, batch_size=10, shuffle=True)


def train(net, loader, epochs, learning_rate):
    """Train in place; return the mean loss of the last epoch."""
    optimiser = torch.optim.SGD(net.parameters(), lr=learning_rate)
    net.train()
    for _ in range(epochs):
        total = 0.0
        for images, labels in loader:
            optimiser.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimiser.step()
            total += float(loss) / len(loader)
    return total


def accuracy(net, images, labels):
    """Return the share of images that are classified correctly."""
    net.eval()
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())
