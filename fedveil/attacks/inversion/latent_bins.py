"""An active server that sorts the images of a sum into the neurons of a hidden layer."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedveil.attacks.inversion.gradients import GradientMap, check_attackable
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress, Uses
from fedveil.errors import FedveilError, InapplicableAttackError
from fedveil.models.inspect import output_layer
from fedveil.types import Shape

_STRENGTH = 1e-3  # of the head's columns: what the bins say leaves the logits nearly alone
_LOUD = 1e-3  # of the largest difference of neighbouring bins; rounding of sums in float32
_GREY = 0.5
_PART = 512
_DECAY = 1e-3  # of the smoothness, from the first step of the search to the last
_STEP = 0.05  # of the search for an image, in pixels' range
_TRIED = 3  # readings for each image that are decoded, since some are mixtures


def binned(
    model: nn.Module, shape: Shape, public: Tensor, *, noise: float = 0.0, seed: int = 0
) -> nn.Module:
    """Return a copy of a model whose last hidden layer sorts images into bins.

    Every row of the layer takes the projection on which public images differ most, and the
    thresholds are that projection's quantiles among them, so that neuron i fires for the images
    above the i-th. All columns of the head are equal, so that an image gives every neuron that
    fires for it the same slope. No layer is added and none changes its shape.

    Source: after Shi et al., "Scale-MIA: A Scalable Model Inversion Attack against Secure Federated
    Learning via Latent Space Reconstruction", NDSS 2025, section IV, who plant the bins of Fowl et
    al., "Robbing the Fed", ICLR 2022, behind an encoder.

    Args:
        model: A linear layer with a ReLU behind it, then a linear head; anything before.
        shape: (C, H, W) of one image.
        public: Float [P, C, H, W], images of the clients' kind.
        noise: Standard deviation of what each entry of a row is multiplied by, besides 1, for a
            server whose rows are not to be parallel. Thresholds are each row's own quantiles.
        seed: Seeds that noise.

    Raises:
        FedveilError: The model does not end in a linear layer, a ReLU and a linear head.
    """
    planted = copy.deepcopy(model)
    _, hidden, head = _ending(planted, shape)
    with torch.no_grad(), receiving(planted, hidden) as received:
        features = torch.cat(
            [_first(received, planted, part) for part in torch.split(public, _PART)]
        )
        centred = features - features.mean(dim=0)
        direction = torch.linalg.svd(centred, full_matrices=False)[2][0]
        generator = torch.Generator().manual_seed(seed)
        disturbed = torch.randn(hidden.weight.shape, generator=generator).to(direction)
        rows = direction * (1 + noise * disturbed)
        places = torch.arange(len(rows)).to(rows).add(0.5) / len(rows)
        seen = (features @ rows.T).sort(dim=0).values
        index = (places * len(seen)).long().clamp(max=len(seen) - 1)
        hidden.weight.copy_(rows)
        hidden.bias.copy_(-seen[index, torch.arange(len(rows))])
        head.weight.copy_(_column(len(head.weight)).to(rows)[:, None] * _STRENGTH)
        head.bias.zero_()
    return planted


@dataclass(frozen=True, kw_only=True)
class LatentBins:
    """Read what a hidden layer was given off its bins, then search the image that gives it.

    The layer's rows are in the order of their thresholds. The gradient of neighbouring rows differs
    by the images between their thresholds alone, weights by biases, so a bin with one image gives
    what the layer received for it exactly, whatever the number of clients that were added up. Each
    such reading is then inverted through the layers before, by Adam on the squared difference. A
    bin with several images gives a mixture that no image leads to; those that fit best are given,
    and grey where there are fewer readings than images.

    Source: Shi et al., "Scale-MIA", NDSS 2025, section IV; they decode by a network trained on
    public images.

    Args:
        steps: Steps of the search for images.
        smoothness: Weight of the total variation at first; it falls to a thousandth of that, so
            that coarse things are settled before fine ones.

    Shape: any batch or sum of one gradient step.

    Raises:
        FedveilError: On a call, a model that does not end in a linear layer, a ReLU and a linear
            head.

    Example:
        >>> LatentBins()(observation).images  # doctest: +SKIP
    """

    uses: ClassVar = Uses()

    steps: int = 600
    smoothness: float = 3.0

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images."""
        begin = time.perf_counter()
        check_attackable(observation, attack="latent", most=None)
        model = copy.deepcopy(observation.model).eval()
        name, hidden, head = _ending(model, observation.shape)
        measure = GradientMap.of(observation, dtype=torch.float32, device=hidden.weight.device)
        images, labels, losses = [], [], []
        for victim in range(observation.victims):
            weight, bias = (
                observation.gradients[f"{name}.{part}"][victim].detach().double()
                for part in ("weight", "bias")
            )
            slopes, inputs = _readings(weight, bias, _TRIED * observation.images)
            found, missed = decoded(
                model, hidden, inputs.to(hidden.weight), observation.shape,
                steps=self.steps, smoothness=self.smoothness,
            )  # fmt: skip
            order = missed.argsort()[: observation.images]
            own = torch.full((observation.images, *observation.shape), _GREY)
            own[: len(order)] = found[order].cpu()
            read = torch.zeros(observation.images, dtype=torch.float64)
            read[: len(order)] = observation.images * slopes[order].cpu()
            seen = _labels(model, head, own, read)
            images.append(own)
            labels.append(seen)
            part = observation.select(torch.tensor([victim]))
            losses.append(measure.distance(own[None], seen[None], part))
            if progress:
                progress(victim + 1, observation.victims, float(losses[-1]))
        seconds = (time.perf_counter() - begin) / observation.victims
        return Inversion(
            images=torch.stack(images),
            labels=torch.stack(labels),
            loss=torch.cat(losses).double().cpu(),
            seconds=torch.full((observation.victims,), seconds),
            iterations=torch.full((observation.victims,), self.steps),
        )


def decoded(
    model: nn.Module,
    layer: nn.Linear,
    wanted: Tensor,
    shape: Shape,
    *,
    steps: int,
    smoothness: float,
) -> tuple[Tensor, Tensor]:
    """Return images that give a layer what it is to receive, and what each misses of it.

    Args:
        model: In evaluation mode.
        layer: One of its layers.
        wanted: Float [K, features].
        shape: (C, H, W) of one image.
        steps: Steps of Adam, from grey.
        smoothness: Weight of the total variation at first.

    Returns:
        Float [K, C, H, W] in [0, 1], and [K], the squared difference as a share of a grey image's.
    """
    images = torch.full((len(wanted), *shape), _GREY).to(wanted).requires_grad_()
    optimiser = torch.optim.Adam([images], _STEP)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with receiving(model, layer) as received:
        with torch.no_grad():
            size = (_first(received, model, images) - wanted).square().sum(dim=1).clamp_min(1e-30)
        for step in range(steps):
            missed = (_first(received, model, images) - wanted).square().sum(dim=1) / size
            rough = sum(images.diff(dim=side).abs().flatten(1).mean(dim=1) for side in (2, 3))
            weight = smoothness * _DECAY ** (step / steps)
            (slope,) = torch.autograd.grad((missed + weight * rough).sum(), images)
            images.grad = slope
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        with torch.no_grad():
            missed = (_first(received, model, images) - wanted).square().sum(dim=1) / size
    return images.detach(), missed


@contextmanager
def receiving(model: nn.Module, layer: nn.Module) -> Iterator[list[Tensor]]:
    """Note what a layer of a model is given, [N, features] a forward pass, while it lasts."""
    received: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _m, inputs: received.append(inputs[0]))
    training = model.training
    model.eval()
    try:
        yield received
    finally:
        handle.remove()
        model.train(training)


def _first(received: list[Tensor], model: nn.Module, images: Tensor) -> Tensor:
    received.clear()
    model(images)
    return received[0]


def _ending(model: nn.Module, shape: Shape) -> tuple[str, nn.Linear, nn.Linear]:
    """Return the name of the last hidden layer, it and the head."""
    try:
        last = output_layer(model, shape)
    except FedveilError as error:
        raise InapplicableAttackError(f"{error}; there is no head behind bins") from error
    reached: list[tuple[str, nn.Linear, Tensor]] = []
    hooks = [
        module.register_forward_hook(
            lambda own, _i, output, name=name: reached.append((name, own, output))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    head = model.get_submodule(last)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), receiving(model, head) as received:
            model(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    before = [entry for entry in reached if entry[1] is not head]
    fits = bool(before) and before[-1][2].shape == received[0].shape
    if not fits or not torch.equal(before[-1][2].relu(), received[0]):
        raise InapplicableAttackError(
            f"model {type(model).__name__}: it does not end in a linear layer, a ReLU and a linear "
            "head, so it has no neurons to sort images into; use --attack ig"
        )
    name, hidden, _ = before[-1]
    if hidden.bias is None or not isinstance(head, nn.Linear) or head.bias is None:
        raise InapplicableAttackError(
            f"model {type(model).__name__}: {name} or {last} has no bias, so nothing has a "
            "threshold; use --attack ig"
        )
    return name, hidden, head


def _column(classes: int) -> Tensor:
    """Return a head's column by which every label's slope differs, and none is near zero."""
    places = torch.arange(classes)
    return (1 - 2 * (places % 2)) * (1 + places / classes)


def _readings(weight: Tensor, bias: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return slopes [K] and what the layer received [K, features], bin by bin."""
    weight = torch.cat([weight[:-1] - weight[1:], weight[-1:]])
    bias = torch.cat([bias[:-1] - bias[1:], bias[-1:]])
    strongest = bias.abs().argsort(descending=True)[:most]
    strongest = strongest[bias[strongest].abs() > _LOUD * bias.abs().max().clamp_min(1e-30)]
    if not len(strongest):
        return bias.new_zeros(1), weight.new_zeros(1, weight.shape[1])
    return bias[strongest], weight[strongest] / bias[strongest, None]


def _labels(model: nn.Module, head: nn.Linear, images: Tensor, slopes: Tensor) -> Tensor:
    """Return the label of each image whose slope at a bin is the nearest to what was read."""
    column = head.weight.detach()[:, 0].cpu().double()
    with torch.no_grad():
        likely = model(images.to(head.weight)).softmax(dim=1).cpu().double()
    caused = (likely @ column)[:, None] - column
    found: Tensor = (caused - slopes[:, None]).abs().argmin(dim=1)
    return found
