"""Image classifiers that take pixels in [0, 1] and normalise inside."""

from fedveil.models.cnn import CNN, MnistCNN
from fedveil.models.imprint import Imprint
from fedveil.models.inspect import (
    batch_statistics_names,
    check_sendable,
    first_layer,
    has_batch_norm,
    output_layer,
    twins,
)
from fedveil.models.lenet import LeNet
from fedveil.models.registry import MODELS, build_model
from fedveil.models.resnet import (
    ResNet,
    batch_norm_resnet,
    group_norm_resnet,
    wide_group_norm_resnet,
)
from fedveil.models.vit import ViT

__all__ = [
    "CNN",
    "MODELS",
    "Imprint",
    "LeNet",
    "MnistCNN",
    "ResNet",
    "ViT",
    "batch_norm_resnet",
    "batch_statistics_names",
    "build_model",
    "check_sendable",
    "first_layer",
    "group_norm_resnet",
    "has_batch_norm",
    "output_layer",
    "twins",
    "wide_group_norm_resnet",
]
