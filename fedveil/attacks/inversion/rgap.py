"""R-GAP: the image in closed form, layer by layer from the last."""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedveil.attacks.inversion.chain import Layer, trace_chain
from fedveil.attacks.inversion.closed_form import Convolution
from fedveil.attacks.inversion.gradients import GradientMap, check_attackable, survived
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress, Shape, Uses
from fedveil.attacks.inversion.subspace import Subspace, range_of
from fedveil.errors import InapplicableAttackError


@dataclass(frozen=True, kw_only=True)
class RGAP:
    """Recover a single image exactly, without a search.

    The last layer's gradient is the outer product of ``p − y`` and its input, and the bias gradient
    is ``p − y``: the input and the label follow. An invertible activation gives what the layer
    before returned; that layer's weights and the gradient with respect to them are linear equations
    for its own input; and so on to the pixels. What depends on the model only is factored once for
    all victims.

    Every step needs the whole gradient of its layer, since one matrix serves all its channels. An
    observation of which a known sanitiser destroyed entries is therefore refused; one that was only
    clipped is not, as a common factor cancels in every step.

    Source: Zhu & Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021, algorithm 1.

    Args:
        together: Victims solved at once; memory grows with it.

    Returns (on a call):
        Images of ``Inversion``, float64, with 0 iterations.

    Raises:
        FedveilError: A batch of more than one image, an update of which a known sanitiser destroyed
            entries, or a model that is no chain of convolutions and linear layers with biases and
            invertible activations; the sentence names the layer that stops it.

    Example:
        >>> RGAP()(observation).images  # doctest: +SKIP
    """

    uses: ClassVar = Uses(linear=True)

    together: int = 4

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's image."""
        begin = time.perf_counter()
        check_attackable(observation, attack="rgap", most=1)
        _check_whole(observation)
        layers = trace_chain(observation.model)
        subspace = range_of(observation.knows, observation.shape)
        device = next(observation.model.parameters()).device
        subspace = subspace.to(torch.zeros((), dtype=torch.float64, device=device))
        solvers = _solvers(layers, observation.shape, subspace)
        victims = torch.arange(observation.victims)
        images, labels, losses = [], [], []
        measure = GradientMap.of(observation, dtype=torch.float64, device=device)
        for index in torch.split(victims, self.together):
            part = observation.select(index)
            flat, label = _recover(layers, solvers, part)
            image = subspace.images(subspace.coordinates(flat.reshape(-1, *observation.shape)))
            images.append(image[:, None])
            labels.append(label[:, None])
            losses.append(measure.distance(images[-1], labels[-1], part))
            if progress:
                progress(int(index[-1]) + 1, len(victims), float(losses[-1].max()))
        return Inversion(
            images=torch.cat(images),
            labels=torch.cat(labels),
            loss=torch.cat(losses),
            seconds=torch.full((len(victims),), (time.perf_counter() - begin) / len(victims)),
            iterations=torch.zeros(len(victims), dtype=torch.int64),
        )


def _check_whole(observation: Observation) -> None:
    for victim in range(observation.victims):
        own = {name: gradient[victim] for name, gradient in observation.gradients.items()}
        for name, kept in survived(own, observation.sanitizer).items():
            if lost := int((~kept).sum()):
                raise InapplicableAttackError(
                    f"the closed-form attack rgap needs every entry of an update, and the known "
                    f"sanitiser destroyed {lost} of {kept.numel()} in {name}; use --attack lm, "
                    "which leaves them out"
                )


def _solvers(layers: list[Layer], shape: Shape, subspace: Subspace) -> list[Convolution | None]:
    solvers: list[Convolution | None] = []
    for layer in layers:
        if isinstance(layer.module, nn.Conv2d):
            own = subspace if not solvers else Subspace(None, shape)
            solver = Convolution(layer, shape, own)
            solvers.append(solver)
            shape = solver.out_shape
        else:
            solvers.append(None)
            shape = (layer.module.out_features, 1, 1)
    return solvers


def _recover(
    layers: list[Layer], solvers: list[Convolution | None], observation: Observation
) -> tuple[Tensor, Tensor]:
    gradients = {k: g.double() for k, g in observation.gradients.items()}
    dz = gradients[_parameter(layers[-1], "bias")]
    label = dz.argmin(dim=1)
    h = dz.new_zeros(0)
    for depth in range(len(layers) - 1, -1, -1):
        layer, solver = layers[depth], solvers[depth]
        if depth < len(layers) - 1:
            z = h
            slope = torch.ones_like(h)
            for activation in reversed(layer.activations):
                slope = slope * activation.slope(z)
                z = activation.invert(z)
            dz = dz * slope
        weight_gradient = gradients[_parameter(layer, "weight")]
        if solver is not None:
            h, dz = solver.solve(z, dz, weight_gradient), solver.backward(dz)
        else:
            h, dz = _linear(layer, dz, weight_gradient)
    return h, label


def _linear(layer: Layer, dz: Tensor, weight_gradient: Tensor) -> tuple[Tensor, Tensor]:
    energy = dz.square().sum(dim=1, keepdim=True)
    if bool((energy == 0).any()):
        raise InapplicableAttackError(
            f"the closed-form attack rgap stops at {layer.name}: its bias received no gradient; "
            "use --attack lm"
        )
    h = torch.einsum("vkn,vk->vn", weight_gradient, dz) / energy
    weight = layer.module.weight.detach().double() * layer.scale
    return (h - layer.offset) / layer.scale, dz @ weight


def _parameter(layer: Layer, kind: str) -> str:
    return f"{layer.name}.{kind}" if layer.name else kind
