"""A small network that undoes an image transformation, as far as public images teach it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.errors import FedveilError

_DILATIONS = (1, 2, 4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class LearnedInverse:
    """Train a network to map transformed images back to their originals.

    It is applied on top of a reconstruction, which no attack on the gradient brings closer to the
    original than the transformed image itself: what it adds is what images have in common. The
    network is convolutional (3×3, dilated up to 4, so that each pixel sees 21×21), adds its answer
    to its input, and is trained by Adam on the squared error; its last layer starts at zero, so an
    untrained one returns its input.

    Source: the decoder of Gao et al., "Privacy-preserving Collaborative Learning with Automatic
    Transformation Search", CVPR 2021, and of Balunović et al., "Bayesian Framework for Gradient
    Leakage", ICLR 2022, are larger relatives.

    Args:
        steps: Steps of Adam.
        batch: Images a step.
        width: Channels of the hidden layers.
        learning_rate: Largest step size; it falls to zero by a cosine.
        seed: Seeds weights and batches.

    Raises:
        FedveilError: On ``fit``, no images.

    Example:
        >>> undo = LearnedInverse().fit(BlockDCT(keep=10), public_images)  # doctest: +SKIP
        >>> undo(result.images[:, 0])  # doctest: +SKIP
    """

    steps: int = 500
    batch: int = 32
    width: int = 32
    learning_rate: float = 2e-3
    seed: int = 0

    def fit(
        self,
        transform: nn.Module,
        images: Tensor,
        *,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Return the trained inverse.

        Args:
            transform: What is to be undone; no gradient passes through it.
            images: Float [M, C, H, W] in [0, 1], public: none of a victim's.
            progress: Called as ``progress(step, steps, squared error)``.

        Returns:
            Float [N, C, H, W] to the same shape, in [0, 1].
        """
        if not len(images):
            raise FedveilError("a learned inverse needs public images to learn from; give some")
        with torch.no_grad():
            hidden = torch.cat([transform(part) for part in torch.split(images, 256)]).float()
        generator = torch.Generator().manual_seed(self.seed)
        network = _network(images.shape[1], self.width, self.seed)
        optimiser = torch.optim.Adam(network.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        for step in range(self.steps):
            index = torch.randint(len(images), (self.batch,), generator=generator)
            flip = bool(torch.rand((), generator=generator) < 0.5)
            given, wanted = hidden[index], images[index].float()
            if flip:  # blocks lie symmetrically wherever sides are multiples of them
                given, wanted = given.flip(-1), wanted.flip(-1)
            loss = F.mse_loss(given + network(given), wanted)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            if progress:
                progress(step + 1, self.steps, float(loss.detach()))
        return _Inverse(network)


@dataclass(frozen=True)
class _Inverse:
    network: nn.Module

    def __call__(self, images: Tensor) -> Tensor:
        given = images.float().clamp(-0.5, 1.5)
        with torch.no_grad():
            return torch.cat([p + self.network(p) for p in torch.split(given, 256)]).clamp(0, 1)


def _network(channels: int, width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        inputs = channels
        for dilation in _DILATIONS:
            layers += [nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation), nn.ReLU()]
            inputs = width
        last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        return nn.Sequential(*layers, last)
