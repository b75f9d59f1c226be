"""The data: nothing here knows of fedveil."""

import torch
from sklearn.datasets import load_digits


def _digits():
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(digits.target)


def load_data(partition_id, num_partitions):
    """Return one client's images, float [N, 1, 8, 8] in [0, 1], and labels."""
    images, labels = _digits()
    own = [i for i in range(len(labels)) if i % 3][partition_id::num_partitions]
    return images[own], labels[own]


def load_central():
    """Return the server's unlabelled images, and others with labels to report on."""
    images, labels = _digits()
    return images[::6], images[3::6], labels[3::6]
