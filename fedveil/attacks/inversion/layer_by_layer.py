"""Through ReLU and max pooling, layer by layer from the last: patterns are searched for."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from fedveil.attacks.inversion.chain import Layer, trace_chain
from fedveil.attacks.inversion.gradients import (
    GradientMap,
    check_attackable,
    infer_labels,
    variation,
)
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress, Uses
from fedveil.attacks.inversion.smoothed import (
    FOLLOWERS,
    Smoothed,
    composed,
    exact_slopes,
    pooled_first,
    slopes,
    smooth_slopes,
)
from fedveil.errors import FedveilError, InapplicableAttackError
from fedveil.types import Shape

_GREY, _NOISE = 0.5, 0.2
_ROUNDS, _CONJUGATE = 12, 400
# Unsure share and damping of each stage, chosen on the same images as the schedules below.
_STAGES = (
    *((0.3, 1e-5), (0.2, 1e-7), (0.15, 1e-7), (0.1, 1e-8), (0.075, 1e-9)),
    *((0.05, 1e-9), (0.035, 1e-9), (0.035, 1e-10), (0.01, 1e-10)),
)
_NEAR = 0.03  # temperature by which near places are told, of the spread of the layer's output
_SURE = 0.02
_ROUNDING = 1e-12
_EXPLAINED = 1e-2  # of the pixels' equations, below which a picture is there
_SILENT = 1e-5  # of the root mean square of a layer's values
_PRECISE = 1e-20  # of a linear system's right-hand side, squared
_FOUND = 1e-6  # of a layer's equations, squared: what float32 gradients leave is below
_NOTHING = 1e-30
_REPORT = 50
_SMOOTH_LAST = 1e-3  # of a schedule's first weight of the variation


Bounds = tuple[float | None, float | None]


@dataclass(frozen=True)
class _Schedule:
    """How a descent goes; chosen on four CIFAR-100 images from the 900th on, behind ``cnn``.

    Attributes:
        rate: First step size, of the spread of the start.
        hot: First temperature, of the spread of what the layer returns at the start.
        cold: Last temperature.
        forward: Weight of what the layer returns against its weights' gradient.
        smooth: First weight of the variation, which falls to a thousandth; 0 leaves it out.
    """

    rate: float
    hot: float
    cold: float
    forward: float = 1.0
    smooth: float = 0.0


_HIDDEN = _Schedule(rate=0.3, hot=2.0, cold=0.07)
_HIDDEN_AGAIN = _Schedule(rate=0.03, hot=0.3, cold=0.01)
_PIXELS = _Schedule(rate=0.5, hot=1.0, cold=0.02, forward=3.0, smooth=1e-3)
_PIXELS_AGAIN = _Schedule(rate=0.1, hot=0.2, cold=0.01, forward=3.0, smooth=1e-4)


@dataclass(frozen=True)
class _Equations:
    """What a convolution's input has to explain, for V victims.

    Attributes:
        layer: The convolution.
        follower: What follows it.
        pattern: The part of it whose slopes its output does not tell.
        last: The part after that, if any.
        shape: (C, H, W) of its input, before constants are applied.
        given: Float [V, *], what its follower returned.
        upper: Float [V, *], the loss's slopes behind the pattern.
        gradient: Float [V, O, C·K·K], with respect to its weights.
    """

    layer: Layer[Smoothed]
    follower: Smoothed
    pattern: Smoothed
    last: Smoothed | None
    shape: Shape
    given: Tensor
    upper: Tensor
    gradient: Tensor

    def to(self, dtype: torch.dtype) -> "_Equations":
        return replace(
            self,
            given=self.given.to(dtype),
            upper=self.upper.to(dtype),
            gradient=self.gradient.to(dtype),
        )

    @property
    def module(self) -> nn.Conv2d:
        assert isinstance(self.layer.module, nn.Conv2d)
        return self.layer.module

    def returned(self, inputs: Tensor) -> Tensor:
        return _returned(self.layer, inputs)

    def weight_gradient(self, inputs: Tensor, behind: Tensor) -> Tensor:
        """Return [V, O, C·K·K] from the slopes [V, O, H', W'] at what the layer returns."""
        module, entered = self.module, self.layer.scale * inputs + self.layer.offset
        assert not isinstance(module.padding, str)
        patches = F.unfold(
            entered, module.kernel_size, module.dilation, module.padding, module.stride
        )
        return behind.flatten(2) @ patches.transpose(1, 2)

    def explained(self, returned: Tensor) -> Tensor:
        """Return what the equations set equal to ``given``."""
        if self.last is None or self.last.known is None:
            return self.follower.exact(returned)
        return self.last.known(self.pattern.exact(returned), self.given)

    def behind(self, inputs: Tensor) -> Tensor:
        return exact_slopes(self.pattern, self.returned(inputs), self.upper)

    def before(self, inputs: Tensor) -> Tensor:
        """Return the loss's slopes at the input."""
        module = self.module
        weight = module.weight.detach().to(inputs) * self.layer.scale
        found: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            inputs.shape,
            weight,
            self.behind(inputs),
            module.stride,
            module.padding,
            module.dilation,
        )
        return found

    def missed(self, inputs: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return what is left of both kinds of equations, squared and as a share, float [V]."""
        returned = self.returned(inputs)
        behind = slopes(self.pattern, returned, self.upper, temperature)
        return (
            _share(self.explained(returned), self.given),
            _share(self.weight_gradient(inputs, behind), self.gradient),
        )

    def loss(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            behind = self.behind(inputs)
            forward = _share(self.explained(self.returned(inputs)), self.given)
            return forward + _share(self.weight_gradient(inputs, behind), self.gradient)


@dataclass(frozen=True, kw_only=True)
class LayerByLayer:
    """Recover a single image through ReLU and max pooling, from the last layer to the first.

    The first linear layer's gradient is the outer product of its slopes, which its bias's gradient
    is, and its input, so that both are known exactly. Below, a convolution's input u has to explain
    what its follower φ returned, ``φ(W∗u) = v``, and its weights' gradient, ``Σ D ⊗ u = g``, where
    the slopes D behind φ are known but for the pattern: at which places units are active, and
    which place of a window is the largest. Given the pattern, both are linear. The pattern is
    searched for by descent from noise, along slopes of functions near φ whose temperature falls;
    then the linear equations are solved, again and again while the pattern changes. Where they hold
    to rounding the layer's input is found, and with it the slopes for the layer before.

    At the pixels several starts are made, and the answer is a last descent from their mean: where
    the equations leave directions open, each start fills them with something else.

    Sources: Eltaras et al., "R-CONV: An Analytical Approach for Efficient Data Reconstruction via
    Convolutional Gradients", 2024, and Zhu & Blaschko, "R-GAP", ICLR 2021 (the equations, layer by
    layer). The search for patterns is ours.

    Args:
        steps: Of the descent at each convolution.
        starts: Descents at the pixels, before the last one.
        together: Victims searched at once; memory grows with it.
        device: Where to compute; None for a GPU when there is one.
        seed: Seeds the starts.

    Raises:
        FedveilError: On a call, what ``check_attackable`` refuses, a batch of more than one image,
            a model that is no chain of convolutions, activations, poolings and linear layers, one
            whose first linear layer has no bias or follows no convolution, or one with a hidden
            convolution of more inputs than equations.

    Example:
        >>> LayerByLayer(steps=2000)(observation).images  # doctest: +SKIP
    """

    uses: ClassVar = Uses()

    steps: int = 3000
    starts: int = 1
    together: int = 32
    device: torch.device | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "starts", "together"):
            if getattr(self, name) < 1:
                raise FedveilError(
                    f"attack layers: {name} {getattr(self, name)} is out of range; give 1 or more"
                )

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's image; ``untold`` where a layer was not found."""
        check_attackable(observation, attack="layers", most=1)
        device = self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chain = _Chain.of(observation, device)
        labels = infer_labels(observation).cpu()
        measure = GradientMap.of(observation, dtype=torch.float64, device=torch.device("cpu"))
        images, losses, untold, seconds = [], [], [], []
        for index in torch.split(torch.arange(observation.victims), self.together):
            begin = time.perf_counter()
            part = observation.select(index)
            told = _Reported(progress, int(index[0]), observation.victims)
            found, solved = self._recover(chain, part, told)
            images.append(found.cpu().double()[:, None])
            untold.append(~solved.cpu())
            losses.append(measure.distance(images[-1], labels[index], part))
            seconds += [(time.perf_counter() - begin) / len(index)] * len(index)
            if progress:
                progress(int(index[-1]) + 1, observation.victims, float(losses[-1].max()))
        steps = self.steps * (len(chain.layers) + self.starts)
        return Inversion(
            images=torch.cat(images),
            labels=labels,
            loss=torch.cat(losses),
            seconds=torch.tensor(seconds),
            iterations=torch.full((observation.victims,), steps),
            untold=torch.cat(untold),
        )

    def _recover(
        self, chain: "_Chain", observation: Observation, told: "_Reported"
    ) -> tuple[Tensor, Tensor]:
        """Return images [V, C, H, W], and bool [V], of whom every layer was found."""
        generator = torch.Generator().manual_seed(self.seed)
        given, upper = chain.above(observation)
        solved = torch.ones(len(given), dtype=torch.bool, device=given.device)
        for place in reversed(range(1, len(chain.layers))):
            equations = chain.equations(place, given, upper, observation)
            solved &= _determined(equations)
            _check_any(solved, equations)
            least, most = chain.range(place)
            start = chain.start(place, len(given), generator)
            inputs = self._hidden(equations, start, (least, most), told)
            solved &= equations.loss(inputs) < _FOUND
            given, upper = inputs, equations.before(inputs)
        equations = chain.equations(0, given, upper, observation)
        images = self._pixels(equations, generator, told)
        told_of = (equations.gradient != 0).flatten(1).any(dim=1)
        return images, solved & told_of & (equations.loss(images) < _EXPLAINED)

    def _hidden(
        self, equations: _Equations, start: Tensor, bounds: Bounds, told: "_Reported"
    ) -> Tensor:
        inputs = _solve(equations, start.double(), bounds)
        if bool((equations.loss(inputs) < _ROUNDING).all()):
            return inputs  # no pattern was in doubt
        reached = _descend(equations, start, bounds, self.steps, _HIDDEN, told)
        reached = _descend(equations, reached, bounds, self.steps, _HIDDEN_AGAIN, told)
        return _settle(equations, reached.double(), bounds)

    def _pixels(
        self, equations: _Equations, generator: torch.Generator, told: "_Reported"
    ) -> Tensor:
        victims, ends = len(equations.given), []
        grey = equations.given.new_full((victims, *equations.shape), _GREY)
        images = _solve(equations, grey, (0.0, 1.0))
        if bool(((equations.loss(images) < _ROUNDING) & _determined(equations)).all()):
            return images
        for _ in range(self.starts):
            noise = torch.randn((victims, *equations.shape), generator=generator)
            start = (_GREY + _NOISE * noise).to(equations.given.device, torch.float32)
            ends.append(_descend(equations, start, (0.0, 1.0), self.steps, _PIXELS, told))
        mean = torch.stack(ends).mean(dim=0)
        last = _descend(equations, mean, (0.0, 1.0), self.steps, _PIXELS_AGAIN, told).double()
        exact = _solve(equations, last, (0.0, 1.0))
        # Where the equations leave directions open, what explains them best is noise.
        found = (equations.loss(exact) < _ROUNDING).view(-1, 1, 1, 1)
        return torch.where(found, exact, last)


@dataclass(frozen=True)
class _Reported:
    """Tells a caller between victims that the search is alive, and is how Ctrl-C gets in."""

    progress: Progress | None
    done: int
    total: int

    def __call__(self, loss: float) -> None:
        if self.progress:
            self.progress(self.done, self.total, loss)


@dataclass(frozen=True)
class _Chain:
    """The convolutions of a model, from the pixels on, and its first linear layer."""

    layers: tuple[Layer[Smoothed], ...]
    shapes: tuple[Shape, ...]
    linear: Layer[Smoothed]
    device: torch.device

    @classmethod
    def of(cls, observation: Observation, device: torch.device) -> "_Chain":
        model = observation.model
        chain = trace_chain(model, FOLLOWERS)
        place = next(i for i, one in enumerate(chain) if isinstance(one.module, nn.Linear))
        convolutions, linear = tuple(chain[:place]), chain[place]
        if not convolutions:
            raise FOLLOWERS.stopped(model, f"{linear.name} is linear; --attack fc or ica reads it")
        if any(isinstance(one.module, nn.Conv2d) for one in chain[place:]):
            raise FOLLOWERS.stopped(model, f"a convolution follows {linear.name}")
        if linear.module.bias is None:
            raise FOLLOWERS.stopped(model, f"{linear.name} has no bias")
        shapes = [observation.shape]
        values = torch.zeros(1, *observation.shape, device=device)
        for one in convolutions:
            values = composed(one.activations).exact(_returned(one, values))
            shapes.append((values.shape[1], values.shape[2], values.shape[3]))
        if math.prod(shapes[-1]) != linear.module.in_features:
            raise FOLLOWERS.stopped(model, f"{linear.name} takes more than what comes before it")
        return cls(convolutions, tuple(shapes), linear, device)

    def above(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Return the first linear layer's input and the slopes there, float64 [V, C, H, W]."""
        name = self.linear.name
        behind = observation.gradients[f"{name}.bias"].detach().to(self.device, torch.float64)
        gradient = observation.gradients[f"{name}.weight"].detach().to(self.device, torch.float64)
        size = behind.square().sum(dim=1, keepdim=True).clamp_min(_NOTHING)
        given = torch.einsum("vo,voi->vi", behind, gradient) / size
        weight = self.linear.module.weight.detach().to(self.device, torch.float64)
        shape = self.shapes[-1]
        return given.view(-1, *shape), (behind @ weight).view(-1, *shape)

    def equations(
        self, place: int, given: Tensor, upper: Tensor, observation: Observation
    ) -> _Equations:
        layer = self.layers[place]
        # What was solved for is zero up to rounding where a unit is silent.
        size = given.square().flatten(1).mean(dim=1).sqrt().view(-1, 1, 1, 1)
        given = torch.where(given.abs() < _SILENT * size, 0.0, given)
        gradient = observation.gradients[f"{layer.name}.weight"].detach().flatten(2)
        followers = pooled_first(layer.activations)
        last = followers[-1] if followers and followers[-1].slope is not None else None
        return _Equations(
            layer,
            composed(followers),
            composed(followers if last is None else followers[:-1]),
            last,
            self.shapes[place],
            given,
            upper if last is None or last.slope is None else upper * last.slope(given),
            gradient.to(self.device, torch.float64),
        )

    def range(self, place: int) -> Bounds:
        """Return the least and the largest value that the layers before ``place`` give."""
        follower = composed(self.layers[place - 1].activations)
        return follower.least, follower.most

    def start(self, place: int, victims: int, generator: torch.Generator) -> Tensor:
        """Return what noise in place of an image makes the layers before ``place`` give."""
        noise = torch.randn((victims, *self.shapes[0]), generator=generator)
        values = (_GREY + _NOISE * noise).to(self.device)
        for layer in self.layers[:place]:
            values = composed(layer.activations).exact(_returned(layer, values))
        return values


def _determined(equations: _Equations) -> Tensor:
    """Return of whom there are as many equations as inputs, bool [V]; zeros tell of none."""
    known = (equations.given != 0).flatten(1).sum(dim=1)
    return known + (equations.gradient != 0).flatten(1).sum(dim=1) >= math.prod(equations.shape)


def _check_any(determined: Tensor, equations: _Equations) -> None:
    """Refuse a hidden layer whose inputs other inputs would explain as well, for every victim."""
    if not determined.any():
        raise InapplicableAttackError(
            f"--attack layers stops at {equations.layer.name}: fewer equations tell of it than its "
            f"{math.prod(equations.shape)} inputs, or none; use --attack ig, which searches for "
            "the image at once"
        )


def _returned(layer: Layer[Smoothed], inputs: Tensor) -> Tensor:
    module = layer.module
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    bias = None if module.bias is None else module.bias.detach().to(inputs)
    entered = layer.scale * inputs + layer.offset
    return F.conv2d(
        *(entered, module.weight.detach().to(inputs), bias),
        *(module.stride, module.padding, module.dilation),
    )


def _descend(
    equations: _Equations,
    start: Tensor,
    bounds: Bounds,
    steps: int,
    schedule: _Schedule,
    told: _Reported,
) -> Tensor:
    """Return inputs [V, C, H, W], float32, after a descent in which the temperature falls."""
    equations = equations.to(torch.float32)
    inputs = start.float().clone().requires_grad_()
    with torch.no_grad():
        spread = float(equations.returned(start.float()).std())
    rate = schedule.rate * float(start.std().clamp_min(_NOTHING))
    optimiser = torch.optim.Adam([inputs], lr=rate)
    for step in range(steps):
        done = step / steps
        optimiser.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
        temperature = spread * schedule.hot * (schedule.cold / schedule.hot) ** done
        forward, backward = equations.missed(inputs, temperature)
        loss = (schedule.forward * forward + backward).sum()
        if schedule.smooth:
            loss = loss + schedule.smooth * _SMOOTH_LAST**done * variation(inputs).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        with torch.no_grad():
            _keep_within(inputs, bounds)
        if step % _REPORT == 0:
            told(float(loss.detach()))
    return inputs.detach()


def _keep_within(inputs: Tensor, bounds: Bounds) -> None:
    if bounds != (None, None):
        inputs.clamp_(*bounds)


def _settle(equations: _Equations, inputs: Tensor, bounds: Bounds) -> Tensor:
    """Return a hidden input where it is found, else what the descent reached.

    The pattern is taken as it is but where it is least sure. There the outputs explain nothing, and
    the slopes are unknowns of their own, so that what is left is linear; fewer places are unsure in
    each stage. A stage may be further from all equations and nearer to the input, since a wrong
    place of a window costs more the nearer the rest is.
    """
    losses, moved = equations.loss(inputs), inputs
    for unsure, damping in _STAGES:
        moved = moved - _step(equations, moved, unsure, damping)
        _keep_within(moved, bounds)
        reached = equations.loss(moved)
        better = reached < losses
        inputs = torch.where(better.view(-1, 1, 1, 1), moved, inputs)
        losses = torch.where(better, reached, losses)
        if bool((losses < _ROUNDING).all()):
            break
    return inputs


def _solve(equations: _Equations, inputs: Tensor, bounds: Bounds) -> Tensor:
    """Return inputs after solving the linear equations of their pattern, as long as it helps."""
    losses = equations.loss(inputs)
    for _ in range(_ROUNDS):
        moved = inputs - _step(equations, inputs, 0.0, 0.0)
        _keep_within(moved, bounds)
        reached = equations.loss(moved)
        better = reached < losses
        inputs = torch.where(better.view(-1, 1, 1, 1), moved, inputs)
        losses = torch.where(better, reached, losses)
        if not better.any() or bool((losses < _ROUNDING).all()):
            break
    return inputs


def _step(equations: _Equations, inputs: Tensor, unsure: float, damping: float) -> Tensor:
    """Return the least-squares step of the inputs under their pattern, by conjugate gradients.

    Args:
        equations: In float64.
        inputs: [V, C, H, W].
        unsure: Share of the outputs, those of the least sure pattern, that are left out, and whose
            slopes are free.
        damping: Weight of the step's own length.
    """
    behind = equations.behind(inputs)
    trusted, free = _unsure(equations, inputs, unsure)
    free = free * _size(equations.upper).view(-1, 1, 1, 1) / math.sqrt(equations.upper[0].numel())
    forward_size = _size(equations.given).view(-1, 1, 1, 1)
    backward_size = _size(equations.gradient).view(-1, 1, 1)

    def explained(values: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        forward = equations.explained(equations.returned(values)) - equations.given
        backward = equations.weight_gradient(values, behind + free * moved) - equations.gradient
        return trusted * forward / forward_size, backward / backward_size

    still = torch.zeros_like(behind)
    missed, pulled = vjp(explained, inputs, still)[:2]
    split = inputs[0].numel()

    def normal(direction: Tensor) -> Tensor:
        along = (direction[:, :split].view_as(inputs), direction[:, split:].view_as(behind))
        return _joined(*pulled(jvp(explained, (inputs, still), along)[1])) + damping * direction

    return _conjugate_gradients(normal, _joined(*pulled(missed)))[:, :split].view_as(inputs)


def _unsure(equations: _Equations, inputs: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return which outputs are trusted, and which slopes behind them are free; 1 or 0, as float64.

    Where a smooth function is furthest from the exact one, two places of a window are nearly alike.
    """
    values = equations.returned(inputs)
    outputs = equations.pattern.exact(values)
    if share == 0:
        return torch.ones_like(outputs), torch.zeros_like(values)
    temperature = _NEAR * float(values.std())
    with torch.no_grad():
        away = (equations.pattern.smooth(values, temperature) - outputs).abs()
        away = torch.where(equations.upper == 0, 0.0, away / temperature)
        most = [
            one[one > 0].quantile(1 - share) if bool((one > 0).any()) else _SURE for one in away
        ]
        doubtful = (away >= torch.tensor(most).to(away).view(-1, 1, 1, 1)) & (away > _SURE)
    reached = smooth_slopes(equations.pattern, values, doubtful.to(values), temperature)
    return (~doubtful).to(values), (reached > _SURE).to(values)


def _joined(inputs: Tensor, moved: Tensor) -> Tensor:
    return torch.cat([inputs.flatten(1), moved.flatten(1)], dim=1)


def _conjugate_gradients(normal: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Return the solutions [V, n] of V systems with the right-hand sides ``wanted``."""
    solution, left = torch.zeros_like(wanted), wanted
    direction, length = wanted, _squared(wanted)
    first = length.clamp_min(_NOTHING)
    for _ in range(_CONJUGATE):
        bent = normal(direction)
        along = length / (direction * bent).sum(dim=1).clamp_min(_NOTHING)
        solution = solution + along[:, None] * direction
        left = left - along[:, None] * bent
        fresh = _squared(left)
        if bool((fresh < _PRECISE * first).all()):
            break
        direction = left + (fresh / length.clamp_min(_NOTHING))[:, None] * direction
        length = fresh
    return solution


def _squared(values: Tensor) -> Tensor:
    return values.square().flatten(1).sum(dim=1)


def _size(values: Tensor) -> Tensor:
    return _squared(values).sqrt().clamp_min(_NOTHING)


def _share(values: Tensor, wanted: Tensor) -> Tensor:
    return _squared(values - wanted) / _squared(wanted).clamp_min(_NOTHING)
