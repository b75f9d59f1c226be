"""Which unlabelled images a protected run asks its clients about."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.data import load_dataset
from fedveil.federation.job import Job
from fedveil.types import Shape


def question_images(job: Job) -> Tensor:
    """Return the calibration images, or as many of the public set that the settings name.

    Those of another kind are brought to the shape of the clients' own: grey where those are, and
    averaged over areas.

    Args:
        job: The run.

    Returns:
        uint8 [N, C, H, W].

    Raises:
        FedveilError: The set cannot be loaded.
    """
    own, config = job.evaluation.calibration.raw, job.config
    if config.questions is None:
        return own
    public = load_dataset(config.questions, seed=config.seed).train.raw
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(public), generator=generator)[: config.calibration_images]
    return in_shape(public[chosen], job.dataset.shape)


def in_shape(raw: Tensor, shape: Shape) -> Tensor:
    """Return images in another shape, uint8 [N, C, H, W].

    Args:
        raw: uint8 [N, C, H, W] of any shape.
        shape: (C, H, W).
    """
    channels, height, width = shape
    pixels = raw.float()
    if pixels.shape[1] != channels:
        pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if pixels.shape[2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8)
