"""A network behind a block that a server adds in order to read its clients' images."""

import torch
from torch import Tensor, nn


class Imprint(nn.Module):
    """A linear measurement in bins in front of a model, which otherwise works as before.

    ``y = x + U·relu(W·x − c)``: every row of W takes the mean of the pixels, and the thresholds c
    are the quantiles of that mean among public images, taken as normally distributed. An image
    passes the thresholds below its mean, so the gradients of two neighbouring rows differ by the
    images between them, if only one is there by that image itself. All columns of U are equal, so
    that every row receives the same gradient from an image.

    Source: Fowl et al., "Robbing the Fed: Directly Obtaining Private Data in Federated Learning
    with Modified Models", ICLR 2022, section 3. The skip connection is ours: the model behind sees
    the image nearly as it is, so that it can be trained on.

    Args:
        model: Takes float [N, C, H, W] in [0, 1], returns logits [N, classes].
        shape: (C, H, W) of one image.
        bins: Rows of W.
        mean: Mean of images' mean pixels; as that and the next, the default is about that of
            CIFAR-10's training images, which are public.
        deviation: Standard deviation of images' mean pixels.
        strength: Entries of U.

    Shape: float [N, C, H, W] to logits [N, classes].
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        *,
        bins: int = 128,
        mean: float = 0.47,
        deviation: float = 0.13,
        strength: float = 1e-3,
    ) -> None:
        super().__init__()
        pixels = shape[0] * shape[1] * shape[2]
        self.measure = nn.Linear(pixels, bins)
        self.add = nn.Linear(bins, pixels, bias=False)
        self.model = model
        places = torch.arange(1, bins + 1, dtype=torch.float64) / (bins + 1)
        thresholds = mean + deviation * torch.special.ndtri(places)
        with torch.no_grad():
            self.measure.weight.fill_(1 / pixels)
            self.measure.bias.copy_(-thresholds)
            self.add.weight.fill_(strength)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        bins = torch.relu(self.measure(pixels.flatten(1)))
        return self.model(pixels + self.add(bins).reshape(pixels.shape))  # type: ignore[no-any-return]
