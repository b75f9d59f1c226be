"""Datasets and their partition over clients."""

from fedveil.data.images import Dataset, Images
from fedveil.data.load import load_dataset, load_own_images
from fedveil.data.partition import Dirichlet, Iid, Partition, Shards, parse_partition

__all__ = [
    "Dataset",
    "Dirichlet",
    "Iid",
    "Images",
    "Partition",
    "Shards",
    "load_dataset",
    "load_own_images",
    "parse_partition",
]
