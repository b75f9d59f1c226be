"""How much of an image a reconstruction gives away."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.errors import FedveilError

EXACT = 40.0
"""PSNR in dB above which a reconstruction counts as exact."""

CANDIDATES = 100
"""Among how many images an original has to be told to count as identified."""

_FLOOR = 1e-20  # identical images score 200 dB, which JSON can hold
_SSIM_WINDOW = 11


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, float64 [N], at most 200.

    Args:
        images: [N, C, H, W], compared as they are: clip them first where the range is known.
        reference: [N, C, H, W]; the peak is 1.
    """
    _same_shape(images, reference)
    missed = images.double() - reference.double()
    return -10 * missed.square().flatten(1).mean(dim=1).clamp_min(_FLOOR).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Return the structural similarity of each image, float64 [N], 1 for identical ones.

    Gaussian window of 11 pixels; images with a shorter side are compared in a uniform window of
    the largest odd size that fits.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity",
    IEEE TIP 2004; computed by torchmetrics.

    Args:
        images: [N, C, H, W]; clipped to [0, 1].
        reference: [N, C, H, W].
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _same_shape(images, reference)
    side = min(images.shape[-2:])
    small = side < _SSIM_WINDOW
    scores = [
        structural_similarity_index_measure(
            image[None].double().clamp(0, 1),
            original[None].double(),
            gaussian_kernel=not small,
            kernel_size=side - 1 + side % 2 if small else _SSIM_WINDOW,
            data_range=1.0,
        )
        for image, original in zip(images, reference, strict=True)
    ]
    return torch.stack([torch.as_tensor(score).reshape(()) for score in scores])


def exact(images: Tensor, trained: Tensor) -> Tensor:
    """Return whether each image was recovered exactly: over 40 dB to what was trained on.

    Args:
        images: [N, C, H, W].
        trained: [N, C, H, W], the images after any transformation.

    Returns:
        Bool [N].
    """
    return psnr(images, trained) > EXACT


def identified(
    found: Tensor, originals: Tensor, strangers: Tensor, *, among: int = CANDIDATES
) -> Tensor:
    """Return the probability that each original is told from strangers by its update's images.

    A candidate is as far off as the nearest image that was rebuilt from the update. An original
    counts as identified where it is nearer than every other of ``among`` candidates: itself and
    strangers, none of which lies behind the update. Nothing is matched by the truth, so that images
    without content identify one original in ``among``, whatever the batch. The mean over draws of
    strangers is taken in closed form.

    Args:
        found: [V, N, C, H, W], compared as they are: clip them first where the range is known.
        originals: [V·N, C, H, W], one update after the other, or what a known transformation makes
            of them.
        strangers: [S, C, H, W], images of the same kind behind none of the updates, treated alike.
        among: Candidates, the original included; all strangers where there are fewer.

    Returns:
        Float64 [V·N], in [0, 1].
    """
    batches = torch.split(originals.double().flatten(1), found.shape[1])
    others = strangers.double().flatten(1)

    def nearness(candidates: Tensor, images: Tensor) -> Tensor:
        distances = torch.cdist(candidates, images.double().flatten(1)).nan_to_num(nan=torch.inf)
        return -distances.min(dim=1).values

    parts = [
        recognised(nearness(own, images), nearness(others, images), among=among)
        for own, images in zip(batches, found, strict=True)
    ]
    return torch.cat(parts)


def recognised(members: Tensor, strangers: Tensor, *, among: int = CANDIDATES) -> Tensor:
    """Return the probability that an image that was used scores highest among its candidates.

    The candidates are the image itself and ``among - 1`` strangers, drawn from all of them without
    replacement; the mean over draws is taken in closed form, so that no single stranger decides.

    Args:
        members: [N], scores of images that were used.
        strangers: [S], scores of images that were not; at least one.
        among: Candidates, the image itself included; all strangers where there are fewer.

    Returns:
        Float64 [N], in [0, 1].
    """
    count, drawn = len(strangers), min(among - 1, len(strangers))
    below = (strangers[None] < members[:, None]).sum(dim=1)
    steps = torch.arange(drawn, device=below.device)
    return ((below[:, None] - steps).clamp_min(0).double() / (count - steps)).prod(dim=1)


@dataclass(frozen=True)
class Roc:
    """How well scores part images that were used from images that were not.

    Attributes:
        auc: Probability that a member scores above a stranger, ties counted half.
        tpr_at_1: Share of members found where at most 1 % of strangers are called members.
        tpr_at_01: The same at 0.1 %; with fewer than 1,000 strangers, above all of them.
        strangers: How many there were.
    """

    auc: float
    tpr_at_1: float
    tpr_at_01: float
    strangers: int


def roc(members: Tensor, strangers: Tensor) -> Roc:
    """Return the operating points that tell whether anybody is recognised with confidence.

    Source: Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022,
    section III: attacks are compared at low false-positive rates.

    Args:
        members: [V, N], scores of images used in each of V updates.
        strangers: [V, S], of images that were not. Updates are scored one by one and averaged.
    """

    def found(rate: float) -> float:
        allowed = int(rate * strangers.shape[1])
        threshold = strangers.sort(dim=1, descending=True).values[:, allowed]
        return float((members > threshold[:, None]).double().mean())

    above = (members[:, :, None] > strangers[:, None]).double()
    equal = (members[:, :, None] == strangers[:, None]).double()
    auc = float((above + equal / 2).mean())
    return Roc(auc, found(0.01), found(0.001), strangers.shape[1])


def label_accuracy(labels: Tensor, truth: Tensor) -> Tensor:
    """Return the share of each batch's labels that was inferred, in any order.

    Args:
        labels: Int64 [V, N].
        truth: Int64 [V, N].

    Returns:
        Float64 [V].
    """
    classes = int(max(labels.max(), truth.max())) + 1
    shares = []
    for inferred, actual in zip(labels, truth, strict=True):
        counts = torch.bincount(inferred, minlength=classes)
        both = torch.minimum(counts, torch.bincount(actual, minlength=classes))
        shares.append(both.sum().double() / len(actual))
    return torch.stack(shares)


def match(images: Tensor, reference: Tensor) -> Tensor:
    """Return a batch's images in the order that suits the reference best.

    A gradient does not tell the order of a batch, so the assignment of least squared error is made
    before scoring.

    Args:
        images: [N, C, H, W].
        reference: [N, C, H, W].
    """
    if len(images) == 1:
        return images
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(reference.double().flatten(1), images.double().flatten(1)).square()
    _, order = linear_sum_assignment(cost.numpy())
    return images[torch.from_numpy(order)]


@dataclass(frozen=True)
class Interval:
    """A statistic and its interval."""

    value: float
    low: float
    high: float


def over_updates(values: Tensor) -> Interval:
    """Return the mean of shares with Student's 95 % interval over the updates they come from.

    Images that share an update are recovered or recognised together, so that they are one draw.

    Args:
        values: [V, N] in [0, 1], of N images in each of V updates. With one image an update it is
            Wilson's interval, and also where all updates agree, whose spread would look like
            certainty; of a single update nothing is known beyond it, so 0 to 1.
    """
    if values.shape[1] == 1:
        return wilson(values[:, 0])
    means = values.double().mean(dim=1)
    if len(means) < 2:
        return Interval(float(means.mean()), 0.0, 1.0)
    if not bool(means.std() > 0):
        return wilson(means)
    from scipy import stats

    mean = float(means.mean())
    wide = float(stats.t.ppf(0.975, len(means) - 1)) * float(means.std()) / len(means) ** 0.5
    return Interval(mean, max(0.0, mean - wide), min(1.0, mean + wide))


def bootstrap(
    values: Tensor,
    *,
    statistic: Callable[[Tensor], Tensor] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean or another statistic with its percentile bootstrap interval.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.

    Args:
        values: [N], one a sample.
        statistic: Maps [draws, N] to [draws]; None for the mean, ``median`` for the median.
        level: Share of the draws inside the interval.
        draws: Samples with replacement.
        seed: Seeds the draws.

    Raises:
        FedveilError: No values.
    """
    if len(values) == 0:
        raise FedveilError("there are no values to summarise; give at least one image")
    measure = statistic or (lambda sample: sample.mean(dim=1))
    values = values.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (draws, len(values)), generator=generator)
    sampled = measure(values[drawn])
    tail = (1 - level) / 2
    low, high = sampled.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(measure(values[None])[0]), low, high)


def wilson(values: Tensor, *, level: float = 0.95) -> Interval:
    """Return a share with its score interval, which has a width at 0 % and at 100 % too.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference",
    Journal of the American Statistical Association 22, 1927.

    Args:
        values: [N], 1 where it is so and 0 where not; parts where a sample is a batch.
        level: Coverage aimed at.

    Raises:
        FedveilError: No values.
    """
    if len(values) == 0:
        raise FedveilError("there are no values to summarise; give at least one image")
    count, share = len(values), float(values.double().mean())
    z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    shrink = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def median(sample: Tensor) -> Tensor:
    """Return the median of each row, the mean of the two middle ones where their number is even."""
    return sample.quantile(0.5, dim=1)


def _same_shape(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape:
        raise FedveilError(
            f"images of shape {tuple(images.shape)} cannot be compared with "
            f"{tuple(reference.shape)}; both must be [N, C, H, W]"
        )
