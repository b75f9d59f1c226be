"""What reconstructions are worth, and what images without content get from the same scorer."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedveil.attacks.inversion import Inversion
from fedveil.audit.metrics import exact, identified, label_accuracy, match, psnr, ssim
from fedveil.data import Dataset, Images
from fedveil.errors import FedveilError

_STRANGERS = 495
_FEWEST = 2  # strangers
_CONTENT_FREE = 400  # images, in whole batches, that measure one floor
_TOGETHER = 64  # images that are scored at once
_BLUR = 2.0  # pixels


@dataclass(frozen=True)
class Scorer:
    """Scores one victim's reconstructions against what really lay behind its updates.

    Attributes:
        victims: M images, one update after the other.
        trained: [M, C, H, W], what the client made of them.
        strangers, strangers_trained: [S, C, H, W], training images behind none of the updates, and
            what the client would have made of them.
        public: Images of nobody's training.
        public_trained: What the client would have made of those.
        seed: Of the draws behind a floor.
    """

    victims: Images
    trained: Tensor
    strangers: Tensor
    strangers_trained: Tensor
    public: Images
    public_trained: Tensor
    seed: int

    @classmethod
    def of(cls, dataset: Dataset, used: Tensor, transform: nn.Module | None, seed: int) -> "Scorer":
        """Return the scorer of the training images ``used``, int64 [M].

        Strangers are drawn from the other training images, and from test images where every
        training image was used.
        """
        generator = torch.Generator().manual_seed(seed)
        others = strangers_to(dataset.train, used, generator)
        victims = dataset.train[used]
        public = dataset.test[~dataset.test.doubles_of(victims)]
        public = public[torch.randperm(len(public), generator=generator)]
        public = public[: 2 * _STRANGERS]
        if not len(others) and len(public) < _FEWEST:
            raise FedveilError(
                f"every training image of {dataset.name} was used, and of its test images "
                f"{len(public)} are no doubles of those: give at least {_FEWEST}, or fewer --images"
            )
        half = len(public) // 2
        strangers = dataset.train[others] if len(others) else public[half:]
        public = public[:half] if half else strangers
        made = [images.transformed(transform).pixels for images in (victims, strangers, public)]
        return cls(victims, made[0], strangers.pixels, made[1], public, made[2], seed)

    def score(self, result: Inversion, *, knows: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images [M, C, H, W] in their originals' order, and column name to [M].

        Distances are to the original that suits a reconstruction best, as a batch has no order.
        Identification matches nothing by the truth: see ``fedveil.audit.metrics.identified``.

        Args:
            result: What an attack found.
            knows: Whether its attacker transforms the candidates as the client did.
        """
        originals, trained = self.victims.pixels, self.trained
        images = _in_order(result.images.float(), trained)
        before = (result.images if result.originals is None else result.originals).float()
        # Everybody knows the range of pixels; transformed ones may lie outside it.
        clipped = _in_order(before, originals).clamp(0, 1)
        as_trained = images.clamp(0, 1) if torch.equal(trained, originals) else images
        # Who knows the transformation looks for the candidate that would have become what was
        # found.
        if knows:
            told = identified(result.images.float(), trained, self.strangers_trained)
        else:
            told = identified(before.clamp(0, 1), originals, self.strangers)
        batch = result.images.shape[1]
        right = label_accuracy(result.labels, self.victims.labels.reshape(-1, batch))
        return images, {
            "exact": exact(as_trained, trained).double(),
            "identified": told,
            "label_accuracy": right.repeat_interleave(batch),
            "psnr_original": psnr(clipped, originals),
            "psnr_trained": psnr(as_trained, trained),
            "ssim_original": ssim(clipped, originals),
            "psnr_ceiling": psnr(trained.clamp(0, 1), originals),
            "seconds_per_image": (result.seconds.double() / batch).repeat_interleave(batch),
        }

    def floors(self, batch: int, *, knows: bool) -> dict[str, Tensor]:
        """Return what images without content get, column name to [M].

        Batches of other photographs with their labels, of blurred noise with the photographs' mean
        and spread, and of the photographs' mean image stand in for what an attack found. Of the
        three the one counts, column by column, that gets most.

        Args:
            batch: Images an update.
            knows: As of ``score``.
        """
        count = len(self.victims) // batch
        draws = max(1, -(-_CONTENT_FREE // len(self.victims)))
        # To score one draw after the other takes most of the time of a small audit.
        several = count * max(1, _TOGETHER // len(self.victims))
        generator = torch.Generator().manual_seed(self.seed)
        best: dict[str, Tensor] = {}
        for images, labels in self.content_free(count * draws, batch, generator, knows=knows):
            scored = [
                self._column_scores(own, guessed, knows=knows)
                for own, guessed in zip(
                    torch.split(images, several), torch.split(labels, several), strict=True
                )
            ]
            for name in scored[0]:
                each = torch.cat([one[name] for one in scored])
                mean = each.reshape(draws, -1).mean(dim=0)
                if name not in best or mean.mean() > best[name].mean():
                    best[name] = mean
        return best

    def _column_scores(self, images: Tensor, labels: Tensor, *, knows: bool) -> dict[str, Tensor]:
        """Return column name to [T·M], of T draws [T·V, N, C, H, W] of the V victims' images."""
        batch, draws = images.shape[1], images.shape[:2].numel() // len(self.victims)
        originals, trained = (
            values.repeat(draws, 1, 1, 1) for values in (self.victims.pixels, self.trained)
        )
        if knows:
            told = identified(images, trained, self.strangers_trained)
        else:
            told = identified(images, originals, self.strangers)
        near = _in_order(images, originals).clamp(0, 1)
        right = label_accuracy(labels, self.victims.labels.repeat(draws).reshape(-1, batch))
        return {
            "exact": exact(_in_order(images, trained), trained).double(),
            "identified": told,
            "label_accuracy": right.repeat_interleave(batch),
            "psnr_original": psnr(near, originals),
        }

    def content_free(
        self, victims: int, batch: int, generator: torch.Generator, *, knows: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of one kind at a time, float [V, N, C, H, W] with int64 [V, N] labels."""
        photographs = self.public_trained if knows else self.public.pixels
        drawn = torch.randint(len(photographs), (victims, batch), generator=generator)
        labels = self.public.labels[drawn]
        yield photographs[drawn], labels
        yield _blurred_noise(photographs, (victims, batch), generator), labels
        yield photographs.mean(dim=0).expand(victims, batch, *photographs.shape[1:]), labels


def strangers_to(
    train: Images, used: Tensor, generator: torch.Generator, *, most: int = _STRANGERS
) -> Tensor:
    """Return up to ``most`` of the images not ``used``, int64, drawn, none a double of one used."""
    order = torch.randperm(len(train), generator=generator)
    own = {image.numpy().tobytes() for image in train.raw[used]}
    others = order[~torch.isin(order, used)].tolist()
    apart = (place for place in others if train.raw[place].numpy().tobytes() not in own)
    return torch.tensor(list(itertools.islice(apart, most)), dtype=torch.int64)


def _blurred_noise(like: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    from kornia.filters import gaussian_blur2d

    side = min(like.shape[-2:])
    window = min(4 * int(_BLUR) + 1, side - 1 + side % 2)
    noise = torch.randn(size[0] * size[1], *like.shape[1:], generator=generator)
    soft = gaussian_blur2d(noise, (window, window), (_BLUR, _BLUR), border_type="replicate")
    across = (0, 2, 3)
    mean, spread = (f(like, across, keepdim=True) for f in (torch.mean, torch.std))
    scaled = soft * spread / soft.std().clamp_min(1e-6) + mean
    return scaled.clamp(0, 1).reshape(*size, *like.shape[1:])


def _in_order(found: Tensor, originals: Tensor) -> Tensor:
    """Return images [V, N, C, H, W] as [V·N, C, H, W], each batch in its originals' order."""
    batches = torch.split(originals, found.shape[1])
    return torch.cat([match(images, own) for images, own in zip(found, batches, strict=True)])
