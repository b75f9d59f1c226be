"""Images read off the gradient of a first fully connected layer, without a search."""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedveil.attacks.inversion.gradients import (
    GradientMap,
    check_attackable,
    infer_labels,
    survived,
)
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress, Uses
from fedveil.attacks.inversion.subspace import range_of
from fedveil.errors import InapplicableAttackError
from fedveil.models import first_layer

_SILENT = 1e-6  # of the largest; rounding of sums over a batch in float32
_PARALLEL = 0.3  # cosine to the mean row; rows of honest layers have about 0
_SAME = 1e-3  # root mean squared difference of pixels below which two readings are of one image
_INSIDE = 0.05  # how far rounding may put a pixel out of [0, 1]; further outside is no image
_READINGS = 1024
_COMMON = 8  # pixels that two readings must both have, to be said to agree
_GREY = 0.5  # for a pixel of which nothing came through


@dataclass(frozen=True, kw_only=True)
class FullyConnected:
    """Divide the gradient of a first linear layer's weights by that of its biases.

    Row i of the weights' gradient is ``Σ_n δ_ni·x_n`` and entry i of the biases' ``Σ_n δ_ni``, with
    δ zero for images at which the neuron is silent. A neuron that fires for one image of the batch
    gives that image exactly. Which neurons these are is seen from the readings: several neurons
    that fire for the same image alone agree, and mixtures do not. The N readings on which most
    neurons agree are taken, then those of the largest gradient.

    Where the rows of the layer have one direction in common and its biases are in order, as an
    active server arranges it (``fedveil.models.Imprint``), neighbouring rows are subtracted first:
    the difference is of the images between two thresholds alone.

    Entries that a known sanitiser destroyed are in no quotient and no comparison; a pixel that a
    reading has lost comes from the readings that agree with it, and is grey where none has it.
    Images are the nearest ones in the range of a known transformation. Of an update in which no
    neuron's bias moved, ``Inversion.untold`` says that nothing can be told.

    The labels of a batch are inferred as counts, and which image bears which is not: the loss,
    which pairs them as they come, says little there.

    Sources: Phong et al., "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption",
    IEEE TIFS 2018, section 3 (the quotient); Fowl et al., "Robbing the Fed", ICLR 2022, section 3
    (differences of rows). The choice by agreement is ours.

    Shape: any batch, computed in float64. Iterations are 0.

    Raises:
        FedveilError: On a call, a model whose first layer is not a linear layer with a bias, or one
            that does more to the pixels before than to scale and shift each.

    Example:
        >>> FullyConnected()(observation).images  # doctest: +SKIP
    """

    uses: ClassVar = Uses(linear=True, sanitizer=True)

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images."""
        begin = time.perf_counter()
        check_attackable(observation, attack="fc", most=None, batch_statistics=True)
        name, layer = first_linear(observation)
        scale, offset = preparation(observation, layer)
        binned = _is_binned(layer)
        order = layer.bias.detach().argsort(descending=True)
        device = next(observation.model.parameters()).device
        measure = GradientMap.of(observation, dtype=torch.float32, device=device)
        labels = infer_labels(observation).cpu()
        like = torch.zeros((), dtype=torch.float64, device=device)
        subspace = range_of(observation.knows, observation.shape).to(like)
        images, losses, untold = [], [], []
        for victim in range(observation.victims):
            rows = _Rows.of(observation, victim, name)
            untold.append(not bool(rows.bias.any()))
            rows = rows.between(order) if binned else rows
            pixels = _chosen(rows.in_pixels(scale, offset), observation.images)
            found = pixels.reshape(1, observation.images, *observation.shape)
            found = subspace.images(subspace.coordinates(found))
            images.append(found.cpu())
            part = observation.select(torch.tensor([victim]))
            losses.append(measure.distance(found.float(), labels[victim : victim + 1], part))
            if progress:
                progress(victim + 1, observation.victims, float(losses[-1]))
        seconds = (time.perf_counter() - begin) / observation.victims
        return Inversion(
            images=torch.cat(images),
            labels=labels,
            loss=torch.cat(losses).double().cpu(),
            seconds=torch.full((observation.victims,), seconds),
            iterations=torch.zeros(observation.victims, dtype=torch.int64),
            untold=torch.tensor(untold),
        )


def first_linear(observation: Observation) -> tuple[str, nn.Linear]:
    """Return name and module of the first layer.

    Raises:
        InapplicableAttackError: It is no linear layer with a bias that is trained.
    """
    model = observation.model
    name = first_layer(model, observation.shape)
    layer = model.get_submodule(name)
    given = observation.gradients.keys() >= {f"{name}.weight", f"{name}.bias"}
    if not isinstance(layer, nn.Linear) or not given:
        raise InapplicableAttackError(
            f"model {type(model).__name__}: its first layer {name} ({type(layer).__name__}) is no "
            "linear layer with a bias that is trained, so no image can be divided out of its "
            "gradient; use --attack ig"
        )
    return name, layer


def preparation(observation: Observation, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return scale and offset of what the layer receives, ``scale · pixels + offset``, [C·H·W].

    Raises:
        InapplicableAttackError: It receives something else, is used more than once for an image,
            or is given what a normalisation makes of the whole batch.
    """
    probe = torch.rand(1, *observation.shape, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros_like(probe)
    given = torch.cat([zero, zero + 1, probe]).to(layer.weight.detach())
    name = f"model {type(observation.model).__name__}: "
    received = _received(observation.model, layer, given, training=False)
    if len(received) > 1:
        raise InapplicableAttackError(
            f"{name}its first linear layer is used {len(received)} times for an image, so its "
            "gradient is of mixtures, and no image can be divided out of it; use --attack ig"
        )
    plain = received[0].shape[1] == layer.in_features == probe.numel()
    offset = received[0][0]
    scale = received[0][1] - offset if plain else offset
    expected = scale * given[2].double().flatten() + offset if plain else 0
    same = isinstance(expected, Tensor) and torch.allclose(expected, received[0][2], atol=1e-4)
    if not same or bool((scale.abs() < _SILENT).any()):
        raise InapplicableAttackError(
            f"{name}what its first linear layer receives is more than each pixel scaled and "
            "shifted, so no image can be divided out of its gradient; use --attack ig"
        )
    if observation.model.training and not torch.allclose(
        _received(observation.model, layer, given, training=True)[0], received[0], atol=1e-4
    ):
        raise InapplicableAttackError(
            f"{name}what its first linear layer receives of an image depends on the others of a "
            "batch in training mode, so no image can be divided out of its gradient; use "
            "--attack ig"
        )
    return scale, offset


def _received(model: nn.Module, layer: nn.Linear, given: Tensor, training: bool) -> list[Tensor]:
    """Return what a layer of a model receives, call by call, float64 [N, D]."""
    received: list[Tensor] = []

    def note(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        received.append(inputs[0].detach().double().flatten(1))

    buffers = {name: value.clone() for name, value in model.named_buffers()}
    handle = layer.register_forward_pre_hook(note)
    modes = [(module, module.training) for module in model.modules()]
    if not training:
        model.eval()
    try:
        with torch.no_grad():
            model(given)
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    return received


def _is_binned(layer: nn.Linear) -> bool:
    rows = nn.functional.normalize(layer.weight.detach().double(), dim=1)
    common = nn.functional.normalize(rows.mean(dim=0), dim=0)
    return len(rows) > 1 and float((rows @ common).median()) > _PARALLEL


@dataclass(frozen=True)
class _Rows:
    """What a layer's gradient says, a row a neuron.

    Attributes:
        weight: Float64 [R, C·H·W], zero where it was destroyed.
        bias: Float64 [R], zero where it was destroyed.
        sent: Bool [R, C·H·W], where both came through.
    """

    weight: Tensor
    bias: Tensor
    sent: Tensor

    @classmethod
    def of(cls, observation: Observation, victim: int, layer: str) -> "_Rows":
        update = {
            name: gradient[victim].detach().double()
            for name, gradient in observation.gradients.items()
        }
        kept = survived(update, observation.sanitizer)
        sent = kept[f"{layer}.weight"] & kept[f"{layer}.bias"][:, None]
        bias = torch.where(kept[f"{layer}.bias"], update[f"{layer}.bias"], 0.0)
        return cls(torch.where(sent, update[f"{layer}.weight"], 0.0), bias, sent)

    def between(self, order: Tensor) -> "_Rows":
        """Return each row minus the next in ``order``, and the last as it is."""
        weight, bias, sent = self.weight[order], self.bias[order], self.sent[order]
        # Of a neuron that fired for nobody nothing is sent either, and then there is nothing lost.
        silent = ~sent.any(dim=1, keepdim=True)
        both = sent & torch.cat([(sent | silent)[1:], torch.ones_like(sent[:1])])
        return _Rows(torch.where(both, _differences(weight), 0.0), _differences(bias), both)

    def in_pixels(self, scale: Tensor, offset: Tensor) -> "_Rows":
        """Return the rows in units of pixels, so that quotients are images."""
        pixels = (self.weight - self.bias[:, None] * offset) / scale
        return _Rows(torch.where(self.sent, pixels, 0.0), self.bias, self.sent)

    def select(self, which: Tensor) -> "_Rows":
        return _Rows(self.weight[which], self.bias[which], self.sent[which])

    def image(self) -> Tensor:
        """Return the image that suits all rows best, [C·H·W]."""
        energy = self.bias.square() @ self.sent.double()
        found = self.bias @ self.weight / energy.clamp_min(1e-60)
        return torch.where(energy > 0, found, _GREY)


def _differences(rows: Tensor) -> Tensor:
    return torch.cat([rows[:-1] - rows[1:], rows[-1:]])


def _chosen(rows: _Rows, images: int) -> Tensor:
    """Return the images that most readings agree on, [images, C·H·W]."""
    if images == 1:
        return rows.image()[None]
    strongest = rows.bias.abs().argsort(descending=True)[:_READINGS]
    loud = rows.bias[strongest].abs() > _SILENT * rows.bias.abs().max()
    strongest = strongest[loud & rows.sent[strongest].any(dim=1)]
    if not len(strongest):
        return rows.weight.new_zeros(images, rows.weight.shape[1])
    rows = rows.select(strongest)
    readings = rows.weight / rows.bias[:, None]
    inside = ((readings > -_INSIDE) & (readings < 1 + _INSIDE)).all(dim=1)
    if bool(inside.any()):
        rows, readings = rows.select(inside), readings[inside]
    alike = _alike(readings, rows.sent)
    taken: list[int] = []
    free = torch.ones(len(readings), dtype=torch.bool)
    while len(taken) < images and bool(free.any()):
        votes = (alike & free).sum(dim=1) * free
        best = int(votes.argmax())  # of equals the first, which has the largest gradient
        taken.append(best)
        free &= ~alike[best]
    # A bin may hold several images; which, nothing tells, so the strongest are given again.
    found = [
        torch.where(rows.sent[best], readings[best], rows.select(alike[best]).image())
        for best in taken
    ]
    return torch.stack([found[i % len(found)] for i in range(images)])


def _alike(readings: Tensor, sent: Tensor) -> Tensor:
    """Return which readings are of one image, bool [R, R], by the pixels that both have."""
    have = sent.double()
    common = have @ have.T
    square = readings.square() @ have.T
    apart = (square + square.T - 2 * readings @ readings.T).clamp_min(0)
    same = (apart < _SAME**2 * common) & (common >= min(_COMMON, readings.shape[1]))
    return same | torch.eye(len(readings), dtype=torch.bool)
