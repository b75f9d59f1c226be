"""Two plain convolutional networks: McMahan's, and one small enough for a laptop."""

import torch
from torch import Tensor, nn

from fedveil.models.normalise import Normalise


def _conv_block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    # Pooling first is the same function (ReLU is monotone) on a quarter of the values.
    return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.MaxPool2d(2), nn.ReLU()]


class _TwoConvolutions(nn.Module):
    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        widths: tuple[int, int],
        kernel: int,
        hidden: int,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.normalise = Normalise()
        self.body = nn.Sequential(
            *_conv_block(channels, widths[0], kernel), *_conv_block(widths[0], widths[1], kernel)
        )
        self.hidden = nn.Linear(widths[1] * (height // 4) * (width // 4), hidden)
        self.output = nn.Linear(hidden, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        features = torch.flatten(self.body(self.normalise(pixels)), 1)
        return self.output(torch.relu(self.hidden(features)))  # type: ignore[no-any-return]


class MnistCNN(_TwoConvolutions):
    """McMahan's MNIST CNN: 1,663,370 parameters on 28×28 grey images of 10 classes.

    Two 5×5 convolutions (32 and 64 channels, each with 2×2 max pooling and ReLU), a hidden layer of
    512 and a linear output.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", AISTATS 2017, section 3.

    Args:
        shape: (C, H, W) of one image, pixels in [0, 1]; H and W at least 4.
        classes: Number of classes.

    Shape: float [N, C, H, W] to logits [N, classes].
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(shape, classes, widths=(32, 64), kernel=5, hidden=512)


class CNN(_TwoConvolutions):
    """The same form at a tenth of the cost: 3×3 convolutions of 16 and 32 channels, 64 hidden.

    105,866 parameters on 28×28 grey images of 10 classes.

    Args:
        shape: (C, H, W) of one image, pixels in [0, 1]; H and W at least 4.
        classes: Number of classes.

    Shape: float [N, C, H, W] to logits [N, classes].
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(shape, classes, widths=(16, 32), kernel=3, hidden=64)
