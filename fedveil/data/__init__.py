"""Datasets and their partition over clients."""

from fedveil.data.images import Dataset, Images

__all__ = ["Dataset", "Images"]
