"""Small residual networks, with group or with batch normalisation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.models.normalise import Normalise

_WIDTHS = (16, 32, 64)
_WIDER = 4
_GROUPS = 8


class _Block(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet for small images: three stages of 16, 32 and 64 channels, ``blocks`` blocks each.

    Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2;
    ``wider`` is k of Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.

    Args:
        shape: (C, H, W) of one image, pixels in [0, 1].
        classes: Number of classes.
        blocks: Residual blocks a stage; the depth is 6·blocks + 2.
        norm: Maps a channel count to a normalisation layer.
        wider: How many times as many channels.

    Shape: float [N, C, H, W] to logits [N, classes].
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        blocks: int,
        norm: Callable[[int], nn.Module],
        wider: int = 1,
    ) -> None:
        super().__init__()
        widths = [wider * width for width in _WIDTHS]
        self.normalise = Normalise()
        self.stem = nn.Conv2d(shape[0], widths[0], 3, padding=1, bias=False)
        self.stem_norm = norm(widths[0])
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(_Block(inputs, outputs, stride, norm))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.output = nn.Linear(inputs, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        x = F.relu(self.stem_norm(self.stem(self.normalise(pixels))))
        return self.output(torch.flatten(F.adaptive_avg_pool2d(self.stages(x), 1), 1))  # type: ignore[no-any-return]


def group_norm_resnet(shape: tuple[int, int, int], classes: int) -> ResNet:
    """Return an 8-layer ResNet with group normalisation (8 groups), which has no running state."""
    return ResNet(shape, classes, blocks=1, norm=_group_norm)


def wide_group_norm_resnet(shape: tuple[int, int, int], classes: int) -> ResNet:
    """Return the same with four times the channels, 64 to 256."""
    return ResNet(shape, classes, blocks=1, norm=_group_norm, wider=_WIDER)


def batch_norm_resnet(shape: tuple[int, int, int], classes: int) -> ResNet:
    """Return an 8-layer ResNet with batch normalisation."""
    return ResNet(shape, classes, blocks=1, norm=nn.BatchNorm2d)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(_GROUPS, channels)
