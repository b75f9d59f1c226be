"""R-GAP: the image in closed form, layer by layer from the last."""

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from fedveil.attacks.inversion.chain import INVERTIBLE, Activation, Layer, trace_chain
from fedveil.attacks.inversion.gradients import GradientMap, check_attackable, survived
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress, Uses
from fedveil.attacks.inversion.subspace import Subspace, range_of
from fedveil.errors import InapplicableAttackError
from fedveil.types import Shape

_GREY = 0.5  # the middle of the pixels' range and of a sigmoid's
_PRIOR = 1e-8  # weight of the prior at grey; forward equations weigh 1 and hold to about 1e-5
_TRUST = 100.0  # weight of the weight equations, whose errors are rounding only
_WEAK_SHARE = 12  # one direction in so many is left for the weight equations to settle
_SOUND = 1e-3  # a system whose eigenvalues spread less needs no second one
_SWEEPS = 3


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
        layers = trace_chain(observation.model, INVERTIBLE)
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


@dataclass(frozen=True)
class _Parity:
    """Input positions that only some kernel offsets reach; a stride of 2 makes four such classes.

    Attributes:
        positions: Int64 [P] input positions, row-major.
        offsets: Int64 [K] kernel offsets, row-major.
        reach: Float64 [L, K·P], 1 where an output position reads an input position by an offset.
        reads: Int64 [K·L], which of ``positions`` is so read; P where it is padding.
    """

    positions: Tensor
    offsets: Tensor
    reach: Tensor
    reads: Tensor


@dataclass(frozen=True)
class _Forward:
    """Forward equations, factored: the unknown is ``x = mean + U·u``.

    Attributes:
        mean: Float64 [n], the prior's centre.
        basis: Float64 [n, r] or None for all of the space: U.
        factor: Float64 [r, r], Cholesky factor of the normal matrix and the prior.
        weak: Float64 [n, q], the directions that the forward equations settle least.
        stiffness: Float64 [q, q], how firmly they do.
    """

    mean: Tensor
    basis: Tensor | None
    factor: Tensor
    weak: Tensor
    stiffness: Tensor


class Convolution:
    """One convolution's equations for its input, given its output and its weights' gradient.

    Forward equations ``A·h = z − b`` couple the input channels and depend on the model only. Weight
    equations ``D·h_c = g_c`` couple no channels, and D, made of the output's gradient, is one for
    all channels. Both enter one weighted least-squares problem with a weak prior at grey.

    Source: Zhu & Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021, section 3
    (the equations). The order of elimination is ours: where the weight equations nearly settle the
    input they are solved first, in blocks of one parity class, and the forward equations correct
    them; elsewhere the forward equations are factored once for the model and the weight equations
    settle the few directions which those leave open.

    Args:
        layer: The convolution, with the constants applied to its input.
        shape: (C, H, W) of what those constants are applied to.
        subspace: The images the input is known to lie among.
    """

    def __init__(self, layer: Layer[Activation], shape: Shape, subspace: Subspace) -> None:
        module = layer.module
        assert isinstance(module, nn.Conv2d)
        self.layer = layer
        self.shape = shape
        self._module = module
        weight = module.weight.detach().double()
        self._weight = weight * layer.scale
        offsets = self._convolve(weight.new_full((1, *shape), layer.offset), weight)
        self.out_shape: Shape = (offsets.shape[1], offsets.shape[2], offsets.shape[3])
        assert module.bias is not None
        positions = math.prod(self.out_shape[1:])
        self._constant = offsets.flatten() + module.bias.detach().double().repeat_interleave(
            positions
        )
        self._parities = _parities(module, shape)
        self._check_count(subspace)
        settled = self.out_shape[0] * math.prod(module.kernel_size) >= shape[1] * shape[2]
        self._forward = None if settled and subspace.basis is None else self._factor(subspace)
        self._gram = [_gram(self._weight, p.offsets) for p in self._parities]

    def solve(self, z: Tensor, dz: Tensor, gradient: Tensor) -> Tensor:
        """Return what was applied to.

        Args:
            z: Float64 [V, O·H'·W'], the convolution's output.
            dz: Float64 [V, O·H'·W'], the loss's gradient with respect to it.
            gradient: Float64 [V, O, C, K, K], with respect to the weights.

        Returns:
            Float64 [V, C·H·W].

        Raises:
            FedveilError: The equations have no solution, as those of no image.
        """
        try:
            return self._solve(z, dz, gradient)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not among its exports
            raise InapplicableAttackError(
                f"the closed-form attack rgap stops at {self.layer.name}: its equations have no "
                "solution, so the update is not one image's plain gradient (a defence, another "
                "learning rate, or damage); use --attack lm or ig"
            ) from None

    def _solve(self, z: Tensor, dz: Tensor, gradient: Tensor) -> Tensor:
        victims, maps = len(z), self.out_shape[0]
        target = z - self._constant
        slopes = dz.reshape(victims * maps, -1)
        measured = gradient.flatten(3).transpose(1, 2)
        systems, values = [], []
        for parity in self._parities:
            system = (slopes @ parity.reach).reshape(victims, -1, len(parity.positions))
            value = measured[..., parity.offsets].flatten(2)
            values.append(value - self.layer.offset * system.sum(2)[:, None])
            systems.append(system * self.layer.scale)
        energy = sum(system.square().sum((1, 2)) for system in systems) * self.shape[0]
        own = self._weight.square().sum() * math.prod(self.out_shape[1:])
        trust = (_TRUST * own / energy).sqrt()[:, None, None]
        systems = [system * trust for system in systems]
        values = [value * trust for value in values]
        if self._forward is None:
            return self._weights_first(target, systems, values)
        return self._forward_first(self._forward, target, systems, values)

    def backward(self, dz: Tensor) -> Tensor:
        """Return the gradient with respect to the input, [V, C·H·W], from that of the output."""
        module = self._module
        size = (len(dz), *self.shape)
        back: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            size,
            self._weight,
            dz.reshape(-1, *self.out_shape),
            module.stride,
            module.padding,
            module.dilation,
        )
        return back.flatten(1)

    def _apply(self, h: Tensor) -> Tensor:
        return self._convolve(h.reshape(-1, *self.shape), self._weight).flatten(1)

    def _convolve(self, images: Tensor, weight: Tensor) -> Tensor:
        module = self._module
        return F.conv2d(images, weight, None, module.stride, module.padding, module.dilation)

    def _check_count(self, subspace: Subspace) -> None:
        unknowns = subspace.size
        maps = self.out_shape[0]
        rows = sum(min(maps * len(p.offsets), len(p.positions)) for p in self._parities)
        equations = math.prod(self.out_shape) + self.shape[0] * rows
        if equations < unknowns:
            raise InapplicableAttackError(
                f"the closed-form attack rgap stops at {self.layer.name}: it leaves {unknowns} "
                f"unknowns and at most {equations} independent equations; use --attack lm"
            )

    def _weights_first(self, target: Tensor, systems: list[Tensor], values: list[Tensor]) -> Tensor:
        victims, channels = len(target), self.shape[0]
        x = target.new_empty(victims, channels, self.shape[1] * self.shape[2])
        inverses = []
        sound = True
        for parity, system, value in zip(self._parities, systems, values, strict=True):
            normal = system.mT @ system
            normal.diagonal(dim1=1, dim2=2).add_(_PRIOR)
            spread = torch.linalg.eigvalsh(normal)
            sound = sound and bool((spread[:, 0] > _SOUND * spread[:, -1]).all())
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(normal))
            x[:, :, parity.positions] = (value @ system + _PRIOR * _GREY) @ inverse
            inverses.append(inverse)
        if sound:
            return x.flatten(1)
        factor = torch.linalg.cholesky(self._innovation(inverses))
        missed = (target - self._apply(x))[..., None]
        back = self.backward(torch.cholesky_solve(missed, factor)[..., 0]).reshape(x.shape)
        for parity, inverse in zip(self._parities, inverses, strict=True):
            x[:, :, parity.positions] += back[:, :, parity.positions] @ inverse
        return x.flatten(1)

    def _innovation(self, inverses: list[Tensor]) -> Tensor:
        # I + A·B⁻¹·Aᵀ costs n·m·(n + m) by matrix products. B⁻¹ is one block for all channels, so
        # the sum over channels is the model's alone, and the rest is a lookup in the block.
        victims = len(inverses[0])
        maps, positions = self.out_shape[0], math.prod(self.out_shape[1:])
        total = inverses[0].new_zeros(victims, maps * maps, positions * positions)
        for parity, gram, inverse in zip(self._parities, self._gram, inverses, strict=True):
            k = len(parity.offsets)
            read = F.pad(inverse, (0, 1, 0, 1))[:, parity.reads][:, :, parity.reads]
            read = read.reshape(victims, k, positions, k, positions).transpose(2, 3)
            total += gram @ read.reshape(victims, k * k, -1)
        total = total.reshape(victims, maps, maps, positions, positions).transpose(2, 3)
        total = total.reshape(victims, maps * positions, maps * positions)
        total.diagonal(dim1=1, dim2=2).add_(1.0)
        return total

    def _forward_first(
        self, forward: _Forward, target: Tensor, systems: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        victims, channels = len(target), self.shape[0]
        right = self.backward(target - self._apply(forward.mean[None]))
        if forward.basis is not None:
            right = right @ forward.basis
        step = torch.cholesky_solve(right.T, forward.factor).T
        x = forward.mean + (step if forward.basis is None else step @ forward.basis.T)
        planes = x.reshape(victims, channels, -1)
        weak = forward.weak.reshape(channels, -1, forward.weak.shape[1])
        normal = forward.stiffness.expand(victims, -1, -1).clone()
        pull = x.new_zeros(victims, weak.shape[2])
        for parity, system, value in zip(self._parities, systems, values, strict=True):
            missed = value - planes[:, :, parity.positions] @ system.mT
            for channel in range(channels):
                seen = system @ weak[channel, parity.positions]
                normal += seen.mT @ seen
                pull += (missed[:, channel, None] @ seen)[:, 0]
        settle = torch.cholesky_solve(pull[..., None], torch.linalg.cholesky(normal))[..., 0]
        return x + settle @ forward.weak.T

    def _factor(self, subspace: Subspace) -> _Forward:
        size = math.prod(self.shape)
        mean = self._weight.new_full((size,), _GREY)
        matrix = self._sparse()
        if subspace.basis is None:
            basis = None
            normal = torch.from_numpy((matrix.T @ matrix).toarray()).to(mean)
        else:
            basis = subspace.basis.to(mean)
            mean = basis @ (basis.T @ mean)
            seen = torch.from_numpy(matrix @ basis.cpu().numpy()).to(mean)
            normal = seen.T @ seen
        normal.diagonal().add_(_PRIOR)
        factor = torch.linalg.cholesky(normal)
        width = len(normal)
        short = max(0, width - math.prod(self.out_shape))
        weak = _weak_directions(factor, min(width, short + width // _WEAK_SHARE + 1))
        stiffness = weak.T @ normal @ weak
        return _Forward(mean, basis, factor, weak if basis is None else basis @ weak, stiffness)

    def _sparse(self) -> Any:
        # A dense convolution of every unit image costs seconds in float64, this milliseconds.
        from scipy.sparse import coo_array

        maps, channels = self._weight.shape[:2]
        size, outputs = math.prod(self.shape[1:]), math.prod(self.out_shape[1:])
        kernels = self._weight.flatten(2).cpu()
        rows, columns, values = [], [], []
        for parity in self._parities:
            reads = parity.reads.cpu().reshape(-1, outputs)
            offset, output = torch.nonzero(reads < len(parity.positions), as_tuple=True)
            pixel = parity.positions.cpu()[reads[offset, output]]
            cells = (maps, channels, len(pixel))
            rows.append((torch.arange(maps)[:, None, None] * outputs + output).expand(cells))
            columns.append((torch.arange(channels)[None, :, None] * size + pixel).expand(cells))
            values.append(kernels[:, :, parity.offsets.cpu()[offset]])
        row, column, value = (
            torch.cat([entry.flatten() for entry in part]).numpy()
            for part in (rows, columns, values)
        )
        return coo_array((value, (row, column)), (maps * outputs, channels * size)).tocsr()


def _weak_directions(factor: Tensor, count: int) -> Tensor:
    # Inverse iteration. The span need not be exact: what is solved in it is, and the rest is
    # settled firmly enough without.
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(factor), count, generator=generator, dtype=factor.dtype).to(factor)
    for _ in range(_SWEEPS):
        block = torch.linalg.qr(torch.cholesky_solve(block, factor)).Q
    return block


def _parities(module: nn.Conv2d, shape: Shape) -> tuple[_Parity, ...]:
    height, width = shape[1:]
    eye = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    reach = F.unfold(
        eye,
        module.kernel_size,
        module.dilation,
        module.padding,  # type: ignore[arg-type]
        module.stride,
    ).permute(2, 1, 0)
    found = []
    for row in range(module.stride[0]):
        for column in range(module.stride[1]):
            positions = _grid(module, 0, row, height, True), _grid(module, 1, column, width, True)
            offsets = (
                _grid(module, 0, row, module.kernel_size[0], False),
                _grid(module, 1, column, module.kernel_size[1], False),
            )
            at = torch.nonzero((positions[0][:, None] & positions[1]).flatten())[:, 0]
            by = torch.nonzero((offsets[0][:, None] & offsets[1]).flatten())[:, 0]
            part = reach[:, by][:, :, at]
            hit, index = part.max(dim=-1)
            reads = torch.where(hit > 0, index, len(at)).T.flatten()
            device = module.weight.device
            found.append(
                _Parity(
                    at.to(device),
                    by.to(device),
                    part.flatten(1).contiguous().to(device),
                    reads.to(device),
                )
            )
    return tuple(found)


def _grid(module: nn.Conv2d, axis: int, residue: int, size: int, input_side: bool) -> Tensor:
    padding = module.padding[axis]
    assert isinstance(padding, int)
    index = torch.arange(size)
    index = index + padding if input_side else index * module.dilation[axis]
    return index % module.stride[axis] == residue


def _gram(weight: Tensor, offsets: Tensor) -> Tensor:
    kernels = weight.flatten(2)[:, :, offsets]
    maps, _, count = kernels.shape
    return torch.einsum("ock,pcl->opkl", kernels, kernels).reshape(maps * maps, count * count)


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


def _solvers(
    layers: list[Layer[Activation]], shape: Shape, subspace: Subspace
) -> list[Convolution | None]:
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
    layers: list[Layer[Activation]], solvers: list[Convolution | None], observation: Observation
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


def _linear(layer: Layer[Activation], dz: Tensor, weight_gradient: Tensor) -> tuple[Tensor, Tensor]:
    energy = dz.square().sum(dim=1, keepdim=True)
    if bool((energy == 0).any()):
        raise InapplicableAttackError(
            f"the closed-form attack rgap stops at {layer.name}: its bias received no gradient; "
            "use --attack lm"
        )
    h = torch.einsum("vkn,vk->vn", weight_gradient, dz) / energy
    weight = layer.module.weight.detach().double() * layer.scale
    return (h - layer.offset) / layer.scale, dz @ weight


def _parameter(layer: Layer[Activation], kind: str) -> str:
    return f"{layer.name}.{kind}" if layer.name else kind
