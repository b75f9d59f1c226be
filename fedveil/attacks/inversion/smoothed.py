"""What may follow a layer in a recovery through activation patterns, and smooth functions near it.

The slope of a ReLU and the place of a window's largest value jump, and between two jumps their
derivative is zero, so no descent finds them. A smooth function near them has slopes that tell.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedveil.attacks.inversion.chain import Followers, Unary, argument

_REFUSAL = (
    "the recovery layer by layer does not apply, {reason}; use --attack ig, which takes any "
    "differentiable network"
)


@dataclass(frozen=True)
class Smoothed:
    """An activation or pooling, and a smooth function near it.

    Attributes:
        exact: Float [V, C, H, W] to what the network makes of it.
        smooth: The same from an input and a temperature above 0, which tends to ``exact`` as the
            temperature tends to 0.
        slope: Its output to its derivative there, where the output tells.
        known: An input and what was returned to what the input's equation is: where a unit is known
            to be active, the input itself, since the exact function would not move it from the
            wrong side.
        pools: Whether it takes the largest value of each window.
        least: The smallest value it returns; None where there is none.
        most: The largest.
    """

    exact: Unary
    smooth: Callable[[Tensor, float], Tensor]
    slope: Unary | None = None
    known: Callable[[Tensor, Tensor], Tensor] | None = None
    pools: bool = False
    least: float | None = None
    most: float | None = None


def pooled_first(followers: Sequence[Smoothed]) -> tuple[Smoothed, ...]:
    """Return the same function with activations after the pooling of the largest, as far as may be.

    Those that do not fall commute with it, and what is last is known from its output.
    """
    ordered = list(followers)
    for place in range(1, len(ordered)):
        if ordered[place].pools and ordered[place - 1].slope is not None:
            ordered[place - 1 : place + 1] = ordered[place], ordered[place - 1]
    return tuple(ordered)


def composed(followers: Sequence[Smoothed]) -> Smoothed:
    """Return followers one after another as one."""

    def exact(values: Tensor) -> Tensor:
        for one in followers:
            values = one.exact(values)
        return values

    def smooth(values: Tensor, temperature: float) -> Tensor:
        for one in followers:
            values = one.smooth(values, temperature)
        return values

    # Pooling keeps the range of what it pools.
    ranged = [one for one in followers if one.least is not None or one.most is not None]
    last = ranged[-1] if ranged else None
    return Smoothed(
        exact,
        smooth,
        least=None if last is None else last.least,
        most=None if last is None else last.most,
    )


def slopes(follower: Smoothed, values: Tensor, upper: Tensor, temperature: float) -> Tensor:
    """Return the loss's slopes at a follower's input, and let a descent see what moves them.

    The value is the exact one; its derivative by ``values`` is that of the smooth function's slopes
    (a straight-through estimate: Bengio, Léonard & Courville, "Estimating or Propagating Gradients
    Through Stochastic Neurons", 2013).

    Args:
        follower: What follows.
        values: Float [V, C, H, W], its input.
        upper: Slopes at its output.
        temperature: Of the smooth function, above 0.
    """
    given = values if values.requires_grad else values.detach().requires_grad_()
    near = (follower.smooth(given, temperature) * upper).sum()
    (smooth,) = torch.autograd.grad(near, given, create_graph=True)
    return exact_slopes(follower, values, upper) + smooth - smooth.detach()


def smooth_slopes(follower: Smoothed, values: Tensor, upper: Tensor, temperature: float) -> Tensor:
    """Return the slopes of the smooth function near a follower, without a graph."""
    with torch.enable_grad():
        given = values.detach().requires_grad_()
        near = (follower.smooth(given, temperature) * upper).sum()
        (found,) = torch.autograd.grad(near, given)
    return found


def exact_slopes(follower: Smoothed, values: Tensor, upper: Tensor) -> Tensor:
    """Return the loss's slopes at a follower's input, without a graph."""
    with torch.enable_grad():
        given = values.detach().requires_grad_()
        (found,) = torch.autograd.grad((follower.exact(given) * upper).sum(), given)
    return found


def _alike(function: Unary) -> Smoothed:
    return Smoothed(function, lambda values, _: function(values))


def _rising(function: Unary, slope: Unary, least: float, most: float) -> Smoothed:
    return Smoothed(function, lambda values, _: function(values), slope, least=least, most=most)


def _leaky(slope: float) -> Smoothed:
    def smooth(values: Tensor, temperature: float) -> Tensor:
        bent = temperature * F.softplus(values / temperature)
        return slope * values + (1 - slope) * bent

    return Smoothed(
        lambda values: F.leaky_relu(values, slope),
        smooth,
        lambda reached: torch.where(reached > 0, 1.0, slope).to(reached),
        lambda values, reached: torch.where(
            reached > 0, values, slope * values if slope else values.relu()
        ),
        least=None if slope else 0.0,
    )


def _largest(size: Any, stride: Any, padding: Any, dilation: Any, ceil: Any) -> Smoothed | None:
    height, width = _pair(size)
    down, right = _pair(size if stride is None else stride)
    if _pair(padding) != (0, 0) or _pair(dilation) != (1, 1) or ceil:
        return None

    def smooth(values: Tensor, temperature: float) -> Tensor:
        windows = values.unfold(2, height, down).unfold(3, width, right).flatten(-2)
        return temperature * torch.logsumexp(windows / temperature, dim=-1)

    return Smoothed(
        lambda values: F.max_pool2d(values, (height, width), (down, right)), smooth, pools=True
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _pooled(node: fx.Node) -> Smoothed | None:
    size, stride = argument(node, 1, "kernel_size", 2), argument(node, 2, "stride", None)
    padding, dilation = argument(node, 3, "padding", 0), argument(node, 4, "dilation", 1)
    return _largest(size, stride, padding, dilation, argument(node, 5, "ceil_mode", False))


def _averaged(places: Sequence[Any], names: Mapping[str, Any]) -> Smoothed:
    return _alike(lambda values: F.avg_pool2d(values, *places, **names))


_RELU = _leaky(0.0)
_SIGMOID = _rising(torch.sigmoid, lambda y: y * (1 - y), 0.0, 1.0)
_TANH = _rising(torch.tanh, lambda y: 1 - y.square(), -1.0, 1.0)

FOLLOWERS = Followers[Smoothed](
    modules={
        nn.ReLU: lambda _: _RELU,
        nn.LeakyReLU: lambda module: _leaky(module.negative_slope),
        nn.Sigmoid: lambda _: _SIGMOID,
        nn.Tanh: lambda _: _TANH,
        nn.GELU: lambda module: _alike(lambda a: F.gelu(a, approximate=module.approximate)),
        nn.SiLU: lambda _: _alike(F.silu),
        nn.ELU: lambda module: _alike(lambda a: F.elu(a, module.alpha)),
        nn.Softplus: lambda _: _alike(F.softplus),
        nn.MaxPool2d: lambda module: _largest(
            module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
        ),
        nn.AvgPool2d: lambda module: _alike(module.forward),
        nn.AdaptiveAvgPool2d: lambda module: _alike(module.forward),
    },
    functions={
        torch.relu: lambda _: _RELU,
        F.relu: lambda _: _RELU,
        "relu": lambda _: _RELU,
        F.leaky_relu: lambda node: _leaky(float(argument(node, 1, "negative_slope", 0.01))),
        torch.sigmoid: lambda _: _SIGMOID,
        "sigmoid": lambda _: _SIGMOID,
        torch.tanh: lambda _: _TANH,
        "tanh": lambda _: _TANH,
        F.silu: lambda _: _alike(F.silu),
        F.gelu: lambda node: _alike(
            lambda a: F.gelu(a, approximate=argument(node, 1, "approximate", "none"))
        ),
        F.max_pool2d: _pooled,
        torch.max_pool2d: _pooled,
        F.avg_pool2d: lambda node: _averaged(node.args[1:], node.kwargs),
    },
    biases=False,
    refusal=_REFUSAL,
)
