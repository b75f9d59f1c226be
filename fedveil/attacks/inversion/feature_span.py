"""Images whose features lie where an update says: whole clients, after many local steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedveil.attacks.inversion.gradients import GradientMap, check_attackable, variation
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress, Uses
from fedveil.attacks.inversion.peeling import labels_of
from fedveil.errors import FedveilError, InapplicableAttackError
from fedveil.models import first_layer
from fedveil.types import Shape

_RANK = 1e-6  # singular values below this share of the largest are rounding
_DRIFT = 1.2  # directions an image that are kept where features moved during local training
_SURE = 4e-3  # residual above which no search has ended at an image of the client's
_ALIKE = 40.0  # times the least residual; those above it have not either
_EXPLAINED = 0.1  # of an update's squared length; where more is left, images are missing or wrong
_SAME = 0.01  # squared error a pixel below which two answers are one
_COARSE = 4  # pixels a value of the first starts
_TURNED, _MOVED, _MIRRORED = 0.35, 0.15, 0.3
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class FeatureSpan:
    """Search, image by image, for what has its features in the span of a linear layer's update.

    The update of a linear layer's weights is a sum of slope × what the layer was given, over all
    images and local steps. Behind convolutions that is an image's features, which hardly move while
    a client trains with a small step size, so those of its N images span nearly all of the update's
    rows, whatever the order, the batches and the labels were. Images that are no client's, blends
    of the client's among them, leave the span, since features are not linear in pixels. So a search
    need not simulate any step, nor find all images at once: of what an image's features have that
    found images do not explain, it minimises the share outside the span, and the image's total
    variation, from many starts. A found image is thereby no answer any more, nor is a blend of
    some. The features are those of the model halfway between the one sent and the one returned.

    Starts are coarse noise at first and then what was found, turned, sheared, moved and mirrored at
    random, which leads to images that noise does not reach. A search that has ended at an image is
    known by its residual, beside the least of all; where fewer than N have, or where the images
    found do not explain the update, the attack cannot tell.

    Sources: ours; the span is that of fedveil's membership test ``Span``; features as what is
    inverted after Kariyappa et al., "Cocktail Party Attack", ICML 2023, section 5 (who part them by
    independent components, of one gradient). The setting is that of Dimitrov et al., "Data Leakage
    in Federated Averaging", TMLR 2022, who simulate all local steps.

    Args:
        rounds: Rounds of starts, at most.
        starts: Images searched together in each.
        steps: Of Adam in each round.
        learning_rate: Adam's, on pixels; it falls to nothing by a cosine.
        variation: Weight of the mean absolute difference of neighbouring pixels.
        seed: Seeds the starts.

    Shape: any batch of fewer images than the layer has neurons, any number of local steps.
    Iterations are steps.

    Raises:
        FedveilError: On a call, what ``check_attackable`` refuses; settings out of range; no linear
            layer behind another one that takes each image as one row, or one that is too narrow.

    Example:
        >>> FeatureSpan(rounds=4)(observation).images  # doctest: +SKIP
    """

    uses: ClassVar = Uses()

    rounds: int = 12
    starts: int = 60
    steps: int = 300
    learning_rate: float = 0.05
    variation: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "starts", "steps", "learning_rate"):
            if getattr(self, name) <= 0:
                raise FedveilError(
                    f"attack features: {name} {getattr(self, name)} is out of range; give more "
                    "than 0"
                )
        if self.variation < 0:
            raise FedveilError(
                f"attack features: variation {self.variation} is out of range; give 0 or more"
            )

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images."""
        check_attackable(observation, attack="features", most=None, local=True)
        name, layer = _behind_features(observation)
        device = layer.weight.device
        measure = GradientMap.of(observation, dtype=torch.float32, device=device)
        generator = torch.Generator().manual_seed(self.seed)
        images, labels, losses, seconds, spent, untold = [], [], [], [], [], []
        for victim in range(observation.victims):
            begin = time.perf_counter()
            part = observation.select(torch.tensor([victim]))
            span = _Span.of(part, name, measure)
            own, sure, rounds = self._searched(span, observation.images, generator)
            update = observation.gradients[f"{name}.weight"][victim].detach().double()
            slopes = torch.linalg.lstsq(span.features(own).double().T, update.T).solution.T
            seen = labels_of(observation.model, layer, own, slopes)
            images.append(own.double().cpu())
            labels.append(seen)
            losses.append(measure.distance(own[None], seen[None].to(device), part).double().cpu())
            spent.append(rounds * self.steps)
            untold.append(sure < observation.images or not float(losses[-1]) < _EXPLAINED)
            seconds.append(time.perf_counter() - begin)
            if progress:
                progress(victim + 1, observation.victims, float(losses[-1]))
        return Inversion(
            images=torch.stack(images),
            labels=torch.stack(labels),
            loss=torch.cat(losses),
            seconds=torch.tensor(seconds),
            iterations=torch.tensor(spent),
            untold=torch.tensor(untold),
        )

    def _searched(
        self, span: "_Span", count: int, generator: torch.Generator
    ) -> tuple[Tensor, int, int]:
        """Return [count, C, H, W], how many of them are sure, and the rounds it took."""
        starts = _noise(span.shape, self.starts, generator)
        found, left = torch.empty(0, *span.shape), torch.empty(0)
        sure, taken = 0, 0
        while taken < self.rounds and sure < count:
            taken += 1
            explained = span.explained_by(found[:sure])
            reached, beyond = self._descended(span, starts.to(span.rows), explained)
            found, left = torch.cat([found.to(reached), reached]), torch.cat([left, beyond.cpu()])
            kept = _distinct(found, left, count)
            found, left = found[kept], left[kept]
            sure = int((left < min(_SURE, _ALIKE * float(left.min()))).sum())
            starts = _changed(found[: sure or count].cpu(), self.starts, generator)
        return found[torch.arange(count) % len(found)], sure, taken

    def _descended(self, span: "_Span", starts: Tensor, explained: Tensor) -> tuple[Tensor, Tensor]:
        """Return where searches end, [S, C, H, W], and their residuals with nothing found, [S]."""
        images = starts.clone().requires_grad_()
        optimizer = torch.optim.Adam([images], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            with torch.enable_grad():
                left = span.residual(images, explained)
                loss = (left + self.variation * variation(images)).sum()
                (images.grad,) = torch.autograd.grad(loss, images)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        with torch.no_grad():
            return images.detach(), span.residual(images, span.explained_by(images[:0]))


@dataclass(frozen=True)
class _Span:
    """Where the features of a client's images lie.

    Attributes:
        model: Whose features.
        state: Its weights and buffers, halfway through the client's training.
        layer: The linear layer that is given the features.
        rows: Float32 [r, D], orthonormal.
        dark: Features of an image that is black, [D].
        shape: (C, H, W) of an image.
    """

    model: nn.Module
    state: dict[str, Tensor]
    layer: str
    rows: Tensor
    dark: Tensor
    shape: Shape

    @classmethod
    def of(cls, observation: Observation, layer: str, measure: GradientMap) -> "_Span":
        """Return the span of an observation's first victim."""
        local, images = observation.local, observation.images
        half = 0.0 if local is None else local.learning_rate * local.steps(images) / 2
        state = {
            name: weight - half * observation.gradients[name][0].detach().to(weight)
            for name, weight in measure.parameters.items()
        }
        state |= measure.constants
        update = observation.gradients[f"{layer}.weight"][0].detach().double()
        _, values, rows = torch.linalg.svd(update, full_matrices=False)
        most = images if local is None else round(_DRIFT * images)
        kept = min(most, int((values > _RANK * values[0]).sum()))
        black = torch.zeros(1, *observation.shape).to(update.device)
        like = next(iter(measure.parameters.values()))
        span = cls(measure.model, state, layer, rows[:kept].to(like), rows[0], observation.shape)
        with torch.no_grad():
            return replace(span, dark=span.features(black.to(like))[0])

    def features(self, images: Tensor) -> Tensor:
        """Return what the layer is given, [N, D]."""
        with _given(self.model.get_submodule(self.layer)) as received:
            functional_call(self.model, self.state, (images,))
        return received[0]

    def explained_by(self, images: Tensor) -> Tensor:
        """Return orthonormal rows [K, D] that span features of these images and of a black one."""
        with torch.no_grad():
            known = self.dark[None]
            if len(images):
                known = torch.cat([known, self.features(images.to(known))])
            orthogonal: Tensor = torch.linalg.qr(known.double().T)[0]
        return orthogonal.T.to(self.rows)

    def residual(self, images: Tensor, explained: Tensor) -> Tensor:
        """Return of what is not explained of each image's features the share outside, [N]."""
        features = self.features(images)
        outside, beyond = (
            (features - (features @ rows.T) @ rows).square().sum(dim=1)
            for rows in (self.rows, explained)
        )
        return outside / beyond.clamp_min(_TINY)


@contextmanager
def _given(layer: nn.Module) -> Iterator[list[Tensor]]:
    received: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _m, inputs: received.append(inputs[0]))
    try:
        yield received
    finally:
        hook.remove()


def _behind_features(observation: Observation) -> tuple[str, nn.Linear]:
    """Return the first linear layer that takes each image as one row, which is not the first layer.

    Raises:
        InapplicableAttackError: There is none, or it has too few neurons.
    """
    model, images = observation.model, observation.images
    plain = replace(observation, local=None)
    weight = next(model.parameters())
    measure = GradientMap.of(plain, dtype=torch.float32, device=weight.device)
    tried = torch.rand(max(2, images), *observation.shape, generator=torch.Generator())
    names = measure.linear_layers(tried.to(weight.device))
    first = first_layer(model, observation.shape)
    name = next(iter(names), None)
    if name is None or name == first:
        raise InapplicableAttackError(
            f"model {type(model).__name__} has no linear layer that takes each image's features as "
            "one row; use --attack ica where the first layer is linear, else --attack ig"
        )
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    if layer.out_features <= images:
        raise InapplicableAttackError(
            f"layer {name} has {layer.out_features} neurons, which span whatever {images} images "
            "give it; observe clients with fewer images than that, or use --attack ig"
        )
    return name, layer


def _noise(shape: Shape, count: int, generator: torch.Generator) -> Tensor:
    channels, *size = shape
    coarse = [-(-side // _COARSE) for side in size]
    values = torch.randn(count, channels, *coarse, generator=generator)
    smooth = F.interpolate(values, size, mode="bicubic")
    return smooth.mul(0.4).sub(0.1).clamp(0, 1)


def _changed(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return [count, C, H, W]: images drawn from these, turned, sheared, moved and mirrored."""
    drawn = images[torch.randint(len(images), (count,), generator=generator)]
    turn = torch.eye(2) + _TURNED * torch.randn(count, 2, 2, generator=generator)
    mirrored = torch.rand(count, generator=generator) < _MIRRORED
    turn[mirrored, :, 0] *= -1
    move = _MOVED * torch.randn(count, 2, 1, generator=generator)
    grid = F.affine_grid(torch.cat([turn, move], dim=2), list(drawn.shape), align_corners=False)
    return F.grid_sample(drawn, grid, align_corners=False, padding_mode="border")


def _distinct(images: Tensor, left: Tensor, most: int) -> Tensor:
    """Return indices of different images, of the least residual first."""
    flat = images.flatten(1)
    apart = torch.cdist(flat, flat).square() / flat.shape[1]
    kept: list[int] = []
    for place in left.argsort().tolist():
        if len(kept) < most and not bool((apart[place, kept] < _SAME).any()):
            kept.append(place)
    return torch.tensor(kept)
