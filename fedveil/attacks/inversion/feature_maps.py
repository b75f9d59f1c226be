"""Images from what a fixed map makes of them: what sums of few images show of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.analytic import Statistics
from fedveil.attacks.inversion.gradients import variation
from fedveil.attacks.membership.leverage import joint
from fedveil.features import FeatureMap


@dataclass(frozen=True, kw_only=True)
class FeatureInversion:
    """Search for images whose features point where given ones do.

    Adam from noise, on the angle between the features and on the image's total variation; of
    several searches the one with the least angle counts. A map may not see how bright an image is,
    nor how strong its contrasts, so the answer is given those of public images on average.

    Source: Mahendran and Vedaldi, "Understanding Deep Image Representations by Inverting Them",
    CVPR 2015, section 3.

    Args:
        starts: Searches an image.
        steps: Of each.
        rate: Adam's, on the logits of pixels; it falls to nothing by a cosine.
        variation: Weight of the mean absolute difference of neighbouring pixels, beside one less
            the cosine.
    """

    starts: int = 4
    steps: int = 800
    rate: float = 0.1
    variation: float = 1e-4

    def __call__(
        self, features: FeatureMap, told: Tensor, public: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return images, float32 in [0, 1], [N, C, H, W].

        Args:
            features: The map, which is differentiable.
            told: Features of any length, float [N, D].
            public: Images that are no client's, float in [0, 1], [P, C, H, W].
            generator: Draws the starts.
        """
        wanted = F.normalize(told.float(), dim=1).repeat(self.starts, 1)
        logits = torch.randn(len(wanted), *features.shape, generator=generator)
        logits = logits.mul_(0.5).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with torch.enable_grad():
            for _ in range(self.steps):
                images = torch.sigmoid(logits)
                loss = _angle(features, images, wanted) + self.variation * variation(images)
                (logits.grad,) = torch.autograd.grad(loss.sum(), logits)
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            images = torch.sigmoid(logits)
            angles = _angle(features, images, wanted).view(self.starts, len(told))
            best = angles.argmin(0), torch.arange(len(told))
            chosen = images.view(self.starts, len(told), *features.shape)[best]
            return _lit_alike(chosen, public)


@dataclass(frozen=True, kw_only=True)
class SpanInversion:
    """Search for images whose features and label lie in the span of sums.

    With z = (φ, y) the sums hold M = Σ zzᵀ, whose span has no more dimensions than there are images
    in it, or twice as many where these are looked at with their mirror images. Where they are fewer
    than D less the pixels of an image, hardly an image lies in it that is not in the sums, however
    many of its class are. Adam on the part of z that is outside, and on the total variation, from
    noise and from a given picture; the search that ends nearest to the span counts.

    Source: that inputs in the span of an update are the batch's own is Dimitrov et al., "SPEAR:
    Exact Gradient Inversion of Batches in Federated Learning", NeurIPS 2024; for sums it is ours.

    Args:
        starts: Searches a sum from noise, beside the one from a picture.
        steps: Of each.
        rate: Adam's, on the logits of pixels; it falls to nothing by a cosine.
        variation: As of ``FeatureInversion``.
    """

    starts: int = 4
    steps: int = 800
    rate: float = 0.1
    variation: float = 1e-4

    def __call__(
        self,
        features: FeatureMap,
        sums: Sequence[Statistics],
        labels: Tensor,
        begun: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return images, float32 in [0, 1], [N, C, H, W].

        Args:
            features: The map, which is differentiable.
            sums: N of them, without noise.
            labels: int64 [N], of the images that are searched.
            begun: A picture for each to begin with, float in [0, 1], [N, C, H, W].
            generator: Draws the other starts.
        """
        spans = [span_of(some, views=features.views) for some in sums]
        wanted = F.one_hot(labels, len(sums[0].counts)).float()
        noise = 0.5 * torch.randn(self.starts, *begun.shape, generator=generator)
        logits = torch.cat([begun.clamp(0.02, 0.98).logit()[None], noise]).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)

        def left(images: Tensor) -> Tensor:
            found = F.normalize(features(images.flatten(0, 1)), dim=1)[:, : features.dimension]
            units = found.view(*images.shape[:2], -1)
            given = torch.cat([units, wanted.expand(len(images), -1, -1)], 2)
            known = zip(given.unbind(1), spans, strict=True)
            return torch.stack(
                [(z - z @ span @ span.T).square().sum(1) / 2 for z, span in known], 1
            )

        with torch.enable_grad():
            for _ in range(self.steps):
                images = torch.sigmoid(logits)
                smooth = variation(images.flatten(0, 1)).view(images.shape[:2])
                loss = left(images) + self.variation * smooth
                (logits.grad,) = torch.autograd.grad(loss.sum(), logits)
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            images = torch.sigmoid(logits)
            return images[left(images).argmin(0), torch.arange(len(sums))]


def span_of(sums: Statistics, *, views: int) -> Tensor:
    """Return an orthonormal basis of the span of what images add to sums, float32 [D + K, R].

    Whole numbers: N images span no more than N · ``views`` dimensions, to the last bit, and so many
    random combinations of the columns span them all (Halko, Martinsson and Tropp, SIAM Review
    2011).

    Args:
        sums: Without noise.
        views: How often an image is looked at, as of the map.
    """
    both = joint(sums, sums.counts.double())
    rank = min(len(both), views * int(sums.counts.sum()))
    drawn = torch.Generator().manual_seed(0)
    mixed = both @ torch.randn(len(both), rank, dtype=both.dtype, generator=drawn)
    basis: Tensor = torch.linalg.qr(mixed).Q
    return basis.float()


def _angle(features: FeatureMap, images: Tensor, wanted: Tensor) -> Tensor:
    found = features(images)[:, : features.dimension]
    return 1 - (F.normalize(found, dim=1) * wanted).sum(1)


def _lit_alike(images: Tensor, public: Tensor) -> Tensor:
    """Return images with the brightness and the contrast that public ones have on average."""
    mean = images.mean((1, 2, 3), keepdim=True)
    deviation = images.std((1, 2, 3), keepdim=True).clamp(min=1e-6)
    usual = public.mean((1, 2, 3)).mean(), public.std((1, 2, 3)).mean()
    return ((images - mean) / deviation * usual[1] + usual[0]).clamp(0, 1)
