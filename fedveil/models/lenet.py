"""The LeNet of the gradient-leakage literature."""

import torch
from torch import Tensor, nn

_CHANNELS = 12
_STRIDES = (2, 2, 1)


class LeNet(nn.Module):
    """Three 5×5 convolutions of 12 channels with sigmoids, then one linear layer.

    Weights and biases start uniform in [-0.5, 0.5], as in the published attack code: smaller ones
    saturate nothing and leak as much, but the literature's numbers are for these.

    Source: Zhu, Liu & Han, "Deep Leakage from Gradients", NeurIPS 2019, section 4.1.

    Args:
        shape: (C, H, W) of one image, pixels in [0, 1].
        classes: Number of classes.

    Shape: float [N, C, H, W] to logits [N, classes].
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for stride in _STRIDES:
            layers += [nn.Conv2d(channels, _CHANNELS, 5, stride, padding=2), nn.Sigmoid()]
            channels, height, width = _CHANNELS, -(-height // stride), -(-width // stride)
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(channels * height * width, classes)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        return self.fc(torch.flatten(self.body(pixels), 1))  # type: ignore[no-any-return]
