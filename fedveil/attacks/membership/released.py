"""Membership in what a released model was trained on, from its answers alone.

Every attack scores images by the confidence of models in their labels, φ = log(p / (1 - p)), where
p is the probability of an image's own class. It is close to normal over models, which the loss
-log p is not.

Source of φ: Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022,
section IV-C.
"""

from itertools import chain

import torch
from torch import Tensor, nn

from fedveil.data.images import Images
from fedveil.errors import FedveilError

_BLOCK = 500
_LEAST_SPREAD = 1e-3


def confidence(model: nn.Module, images: Images) -> Tensor:
    """Return φ of each image, float64 [N], in evaluation mode.

    Args:
        model: Takes float [N, C, H, W] in [0, 1], returns logits [N, classes].
        images: With the labels that are asked for.
    """
    training = model.training
    model.eval()
    held = next(chain(model.parameters(), model.buffers()), None)
    device = held.device if held is not None else torch.device("cpu")
    found = []
    try:
        with torch.no_grad():
            for start in range(0, len(images), _BLOCK):
                block = images[start : start + _BLOCK]
                logits = model(block.pixels.to(device)).double().cpu()
                own = logits.gather(1, block.labels[:, None])[:, 0]
                others = logits.scatter(1, block.labels[:, None], -torch.inf)
                # log p - log(1 - p), without the cancellation of a p near 1.
                found.append(own - others.logsumexp(dim=1))
    finally:
        model.train(training)
    return torch.cat(found)


def loss(target: Tensor) -> Tensor:
    """Return φ itself as the score, float64 [N]: as the loss ranks images, without any shadow.

    Source: Yeom et al., "Privacy Risk in Machine Learning", CSF 2018, section 3.

    Args:
        target: φ under the released model, float64 [N].
    """
    return target


def calibrated(target: Tensor, shadows: Tensor) -> Tensor:
    """Return φ less its mean over other models, float64 [N]: what an image's difficulty leaves.

    It asks nothing of the few shadows but a mean, and holds where they fit less well than the
    model, which upsets a likelihood ratio.

    Source: Watson et al., "On the Importance of Difficulty Calibration in Membership Inference
    Attacks", ICLR 2022, equation 4.

    Args:
        target: φ under the released model, float64 [N].
        shadows: φ under S models of the same kind, float64 [S, N], half of which held each image.
    """
    return target - shadows.mean(dim=0)


def likelihood_ratio(target: Tensor, shadows: Tensor, held: Tensor) -> Tensor:
    """Return how much likelier φ is of an image that was trained on than of one that was not.

    φ under models that held an image, and under models that did not, is taken for normal. Each
    image has means of its own; with a handful of shadows the two variances are those of all images
    together, as the source does below 64 of them.

    Source: Carlini et al. 2022, section V, algorithm 1 (LiRA, online).

    Args:
        target: φ under the released model, float64 [N].
        shadows: φ under S models of the same kind, float64 [S, N].
        held: Bool [S, N], whether a shadow was trained on an image.

    Raises:
        FedveilError: An image that every shadow held, or none did.
    """
    with_, without = held.sum(dim=0), (~held).sum(dim=0)
    if bool((with_ == 0).any()) or bool((without == 0).any()):
        raise FedveilError(
            "a likelihood ratio needs shadows that held each image and shadows that did not; "
            "train more shadows, each on half the images"
        )
    density = torch.zeros_like(target)
    for side, count, sign in ((held, with_, 1), (~held, without, -1)):
        mean = (shadows * side).sum(dim=0) / count
        residual = ((shadows - mean) * side).square().sum()
        freedom = int(side.sum()) - side.shape[1]
        spread = (residual / max(1, freedom)).sqrt().clamp_min(_LEAST_SPREAD)
        # The mean is itself known from few shadows only.
        wide = spread * (1 + 1 / count).sqrt()
        density += sign * (-((target - mean) / wide).square() / 2 - wide.log())
    return density


def relative(target: Tensor, shadows: Tensor, population: Tensor, held: Tensor) -> Tensor:
    """Return against which share of a population an image is likelier under the model, [0, 1].

    An image's likelihood under the released model is held against its mean under other models, and
    the ratio against that of images that nobody trained on. The mean over models that held an image
    and models that did not count alike.

    Source: Zarifzadeh, Liu & Shokri, "Low-Cost High-Power Membership Inference Attacks" (RMIA),
    ICML 2024, equations 2 to 4, with γ = 1.

    Args:
        target: φ under the released model, float64 [N].
        shadows: φ under other models, float64 [S, N].
        population: Bool [N], which images the ratio is held against.
        held: Bool [S, N], whether a shadow was trained on an image.

    Raises:
        FedveilError: Fewer than two images in the population.
    """
    if int(population.sum()) < 2:
        raise FedveilError("RMIA compares with at least 2 images of a population; give more")
    likely, known = target.sigmoid(), shadows.sigmoid()
    sides = [(known * side).sum(0) / side.sum(0).clamp_min(1) for side in (held, ~held)]
    both = held.any(dim=0) & (~held).any(dim=0)
    mean = torch.where(both, (sides[0] + sides[1]) / 2, known.mean(dim=0))
    ratio = likely / mean.clamp_min(torch.finfo(mean.dtype).tiny)
    others = ratio[population].sort().values
    # Of the population an image is compared with itself, too: were it left out, it would stand
    # below every member of the same ratio, and ratios of sure answers are all 1.
    share: Tensor = torch.searchsorted(others, ratio, right=True) / len(others)
    return share
