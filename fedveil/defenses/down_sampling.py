"""Images of fewer pixels, enlarged again."""

from torch import Tensor
from torch.nn import functional as F

from fedveil.defenses.protocol import KNOWN_FORWARD, SEARCHED, Metadata, Transformation
from fedveil.errors import FedveilError


class DownSampling(Transformation):
    """Average the pixels of every square and enlarge the result to the old size, bilinearly.

    Linear; its range has one dimension for each square.

    Args:
        factor: Side of a square in pixels, at least 1; 1 changes nothing.

    Shape: float [..., C, H, W] to the same shape; sides that are no multiples give squares of
        unequal size.

    Raises:
        FedveilError: A factor below 1; on a call: one larger than the images.
    """

    metadata = Metadata(
        attack=SEARCHED, broken_by=KNOWN_FORWARD, strengths=("factor=2", "factor=4")
    )

    def __init__(self, *, factor: int) -> None:
        super().__init__()
        if factor < 1:
            raise FedveilError(f"factor={factor} is out of range: give at least 1")
        self.factor = factor

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return f"factor={self.factor}"

    @property
    def strength(self) -> float:
        """Side of a square in pixels."""
        return float(self.factor)

    def forward(self, images: Tensor) -> Tensor:
        """Return the coarser images at their old size."""
        size = images.shape[-2:]
        if self.factor > min(size):
            raise FedveilError(
                f"factor={self.factor} is larger than images of {tuple(size)}; use a smaller one"
            )
        if self.factor == 1:
            return images
        flat = images.reshape(-1, *images.shape[-3:])
        small = F.adaptive_avg_pool2d(flat, (size[0] // self.factor, size[1] // self.factor))
        large = F.interpolate(small, tuple(size), mode="bilinear", align_corners=False)
        return large.reshape(images.shape)
