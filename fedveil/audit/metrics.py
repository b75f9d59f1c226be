"""How much of an image a reconstruction gives away."""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from fedveil.errors import FedveilError
from fedveil.results import AUC, EXACTLY, FOUND, FOUND_SURELY

CANDIDATES = 100
"""Among how many images an original has to be told to count as identified."""

RATES = (0.01, 0.001)
"""False-positive rates at which members are counted."""

_FEWEST = 20  # images that were used, behind a share that is said to be small
_FLOOR = 1e-20  # identical images score 200 dB, which JSON can hold
_SSIM_WINDOW = 11
_DRAWS = 2_000  # of a bootstrap
_TOGETHER = 64  # images that are compared with all strangers at once


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
    return psnr(images, trained) > EXACTLY


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
    batch, others = found.shape[1], strangers.double().flatten(1)
    # There are many strangers: to read all of them for each update would take most of the time.
    several = max(1, _TOGETHER // batch)
    parts = []
    for images, own in zip(
        torch.split(found.double().flatten(2), several),
        torch.split(originals.double().reshape(*found.shape[:2], -1), several),
        strict=True,
    ):
        far = _distances(others, images.flatten(0, 1)).reshape(-1, *images.shape[:2])
        near = _distances(own, images).amin(dim=2)
        parts.append(recognised(-near, -far.amin(dim=2).T, among=among).flatten())
    return torch.cat(parts)


def _distances(candidates: Tensor, images: Tensor) -> Tensor:
    return torch.cdist(candidates, images).nan_to_num(nan=torch.inf)


def recognised(members: Tensor, strangers: Tensor, *, among: int = CANDIDATES) -> Tensor:
    """Return the probability that an image that was used scores highest among its candidates.

    The candidates are the image itself and ``among - 1`` strangers, drawn from all of them without
    replacement; the mean over draws is taken in closed form, so that no single stranger decides.

    Args:
        members: [..., N], scores of images that were used.
        strangers: [..., S], scores of images that were not, of as many groups; at least one each.
        among: Candidates, the image itself included; all strangers where there are fewer.

    Returns:
        Float64 [..., N], in [0, 1].
    """
    count = strangers.shape[-1]
    below = (strangers[..., None, :] < members[..., None]).sum(dim=-1)
    steps = torch.arange(min(among - 1, count), device=below.device)
    return ((below[..., None] - steps).clamp_min(0).double() / (count - steps)).prod(dim=-1)


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


@dataclass(frozen=True)
class Roc:
    """How well scores part images that were used from images that were not.

    Attributes:
        auc: Probability that a member scores above a stranger, ties counted half.
        found: For each of ``RATES`` the share of members found where at most so many strangers are
            called members; None where there are too few images to tell.
        strangers: How many there were.
    """

    auc: Interval
    found: tuple[Interval | None, ...]
    strangers: int

    def as_json(self) -> dict[str, float | None]:
        """Return ``auc``, ``tpr_at_1`` and ``tpr_at_01``, each with its ``_low`` and ``_high``."""
        row: dict[str, float | None] = {}
        for name, told in zip(
            (score.key for score in (AUC, FOUND, FOUND_SURELY)),
            (self.auc, *self.found),
            strict=True,
        ):
            ends = (None, None, None) if told is None else astuple(told)
            row |= zip((name, f"{name}_low", f"{name}_high"), ends, strict=True)
        return row

    def as_text(self) -> str:
        """Return the columns that ``ROC_HEAD`` names."""
        auc = f"{self.auc.value:.3f} [{self.auc.low:.3f}, {self.auc.high:.3f}]"
        found = (
            "cannot tell" if one is None else f"{one.value:.1%} [{one.low:.1%}, {one.high:.1%}]"
            for one in self.found
        )
        return f"{auc:22}" + "".join(f"{text:24}" for text in found).rstrip()


ROC_HEAD = f"{AUC.heading:22}{FOUND.heading:24}{FOUND_SURELY.heading}"
"""What stands over the columns of ``Roc.as_text``."""


@dataclass(frozen=True)
class Ranks:
    """Where images that were used stand among strangers, update by update.

    Source: Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022,
    section III: attacks are compared at low false-positive rates.

    Attributes:
        above: Float64 [V, N], the share of strangers that each of N images of V updates scores
            above, ties counted half.
        found: For each of ``RATES`` float64 [V, N], 1 where it scores above all but so many of the
            strangers; None where they are too few for one of them to be so many.
        strangers: How many there were.
    """

    above: Tensor
    found: tuple[Tensor | None, ...]
    strangers: int

    @classmethod
    def of(cls, members: Tensor, strangers: Tensor) -> "Ranks":
        """Return where scores [V, N] stand among scores [V, S], each update's among its own.

        Raises:
            FedveilError: A score that is not a number, which stands nowhere.
        """
        if odd := int(members.isnan().sum()) + int(strangers.isnan().sum()):
            raise FedveilError(
                f"{odd} of {members.numel() + strangers.numel()} scores of a membership attack are "
                "not numbers, so that nobody can tell who was used: the model, or one trained to "
                "compare with it, diverges; lower the learning rate"
            )
        found: list[Tensor | None] = []
        for rate in RATES:
            if strangers.shape[1] * rate < 1:
                found.append(None)
                continue
            allowed = int(rate * strangers.shape[1])
            limit = strangers.sort(dim=1, descending=True).values[:, allowed]
            found.append((members > limit[:, None]).double())
        above = [_above(own, others) for own, others in zip(members, strangers, strict=True)]
        return cls(torch.stack(above), tuple(found), strangers.shape[1])

    @classmethod
    def joined(cls, parts: Sequence["Ranks"]) -> "Ranks":
        """Return ranks among several sets of strangers, of as many images an update, as one."""
        found: list[Tensor | None] = []
        for rate in zip(*(part.found for part in parts), strict=True):
            told = [one for one in rate if one is not None]
            found.append(torch.cat(told) if len(told) == len(parts) else None)
        above = torch.cat([part.above for part in parts])
        return cls(above, tuple(found), min(part.strangers for part in parts))

    def roc(self) -> Roc:
        """Return the operating points with intervals over updates, whose images share their luck.

        A share of fewer than 20 images is told only where its interval lies above the rate: so few
        can show that members are found, and not that they are not.
        """
        found: list[Interval | None] = []
        for rate, values in zip(RATES, self.found, strict=True):
            share = None if values is None else over_updates(values)
            few = self.above.numel() < _FEWEST
            found.append(None if share is None or (few and share.low <= rate) else share)
        return Roc(over_updates(self.above), tuple(found), self.strangers)


def roc_of_one(members: Tensor, strangers: Tensor) -> Roc:
    """Return the operating points of one model that is asked of many images.

    Args:
        members: [M], M at least 2.
        strangers: [S], S at least 2.

    Returns:
        Intervals over the images: of the area DeLong's, of shares Wilson's.

    Raises:
        FedveilError: As of ``Ranks.of``.
    """
    ranks = Ranks.of(members[None], strangers[None])
    found = (None if values is None else wilson(values[0]) for values in ranks.found)
    return Roc(area(members, strangers), tuple(found), len(strangers))


def area(members: Tensor, strangers: Tensor) -> Interval:
    """Return the area under the receiver's operating characteristic with its 95 % interval.

    Source: DeLong, DeLong & Clarke-Pearson, "Comparing the Areas under Two or More Correlated
    Receiver Operating Characteristic Curves", Biometrics 1988.

    Args:
        members: [M], M at least 2.
        strangers: [S], S at least 2.
    """
    over, under = _above(members, strangers), 1 - _above(strangers, members)
    value = float(over.mean())
    wide = 1.96 * float(over.var() / len(over) + under.var() / len(under)) ** 0.5
    return Interval(value, max(0.0, value - wide), min(1.0, value + wide))


def _above(one: Tensor, other: Tensor) -> Tensor:
    """Return for each of ``one`` the share of ``other`` it lies above, ties counted half."""
    order = other.sort().values
    below, through = (torch.searchsorted(order, one, right=side) for side in (False, True))
    return (below + through).double() / (2 * len(other))


def bootstrap(
    values: Tensor,
    *,
    statistic: Callable[[Tensor], Tensor] | None = None,
) -> Interval:
    """Return the mean or another statistic with its 95 % percentile bootstrap interval.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.

    Args:
        values: [N], one a sample.
        statistic: Maps [draws, N] to [draws]; None for the mean, ``median`` for the median.

    Raises:
        FedveilError: No values.
    """
    if len(values) == 0:
        raise FedveilError("there are no values to summarise; give at least one image")
    measure = statistic or (lambda sample: sample.mean(dim=1))
    values = values.double()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (_DRAWS, len(values)), generator=generator)
    sampled = measure(values[drawn])
    low, high = sampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
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
