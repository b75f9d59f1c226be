"""A network as the chain of layers that a recovery walks backwards, from logits to pixels."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedveil.errors import InapplicableAttackError
from fedveil.models.inspect import twins

Unary = Callable[[Tensor], Tensor]

_EDGE = 1e-12  # keeps the inverse of a saturated activation finite


Follower = TypeVar("Follower")


@dataclass(frozen=True)
class Activation:
    """An invertible elementwise function.

    Attributes:
        invert: Its output to its input.
        slope: Its output to its derivative there.
    """

    invert: Unary
    slope: Unary


@dataclass(frozen=True)
class Layer(Generic[Follower]):
    """A convolution or linear layer, what is applied to its input and what follows it.

    Attributes:
        name: Its qualified name in the model.
        module: ``nn.Conv2d`` or ``nn.Linear``.
        activations: Functions applied to its output, in order.
        scale: The layer's input is ``scale · (what the previous layer gives) + offset``.
        offset: See ``scale``.
    """

    name: str
    module: nn.Conv2d | nn.Linear
    activations: tuple[Follower, ...] = ()
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class _Constant:
    operation: str
    value: float


class _Passed:
    """Moves values and changes none."""


@dataclass(frozen=True)
class Followers(Generic[Follower]):
    """What a recovery can take between two layers, and how it refuses the rest.

    Attributes:
        modules: Class of a module to what it is for the recovery; None refuses it.
        functions: Function, or name of a tensor's method, to the same, from its call.
        biases: Whether it needs a bias in every layer.
        refusal: The attack's name and what to use in its place, after ``reason``.
    """

    modules: Mapping[type[nn.Module], Callable[[Any], Follower | None]]
    functions: Mapping[object, Callable[[fx.Node], Follower | None]]
    biases: bool
    refusal: str

    def stopped(self, model: nn.Module, reason: str) -> InapplicableAttackError:
        """Return the error that names the model and what stops the recovery."""
        return InapplicableAttackError(
            f"model {type(model).__name__}: {self.refusal.format(reason=reason)}"
        )


def _leaky(slope: float) -> Activation:
    return Activation(
        lambda y: torch.where(y > 0, y, y / slope),
        lambda y: torch.where(y > 0, torch.ones_like(y), torch.full_like(y, slope)),
    )


_SIGMOID = Activation(
    lambda y: torch.logit(y.clamp(_EDGE, 1 - _EDGE)), lambda y: (y * (1 - y)).clamp_min(0)
)
_TANH = Activation(
    lambda y: torch.atanh(y.clamp(_EDGE - 1, 1 - _EDGE)), lambda y: (1 - y.square()).clamp_min(0)
)

INVERTIBLE = Followers[Activation](
    modules={
        nn.Sigmoid: lambda _: _SIGMOID,
        nn.Tanh: lambda _: _TANH,
        nn.LeakyReLU: lambda module: _leaky(module.negative_slope),
    },
    functions={
        torch.sigmoid: lambda _: _SIGMOID,
        torch.tanh: lambda _: _TANH,
        "sigmoid": lambda _: _SIGMOID,
        "tanh": lambda _: _TANH,
        F.leaky_relu: lambda node: _leaky(float(argument(node, 1, "negative_slope", 0.01))),
    },
    biases=True,
    refusal="the closed-form attack rgap does not apply, {reason}; use --attack lm, which needs no "
    "closed form",
)
_RESHAPES: set[object] = {torch.flatten, "flatten", "reshape", "view"}
_AFFINE: dict[object, Callable[[float, float, float], tuple[float, float]]] = {
    "add": lambda scale, offset, c: (scale, offset + c),
    "sub": lambda scale, offset, c: (scale, offset - c),
    "mul": lambda scale, offset, c: (scale * c, offset * c),
    "div": lambda scale, offset, c: (scale / c, offset / c),
}


def trace_chain(model: nn.Module, followers: Followers[Follower]) -> list[Layer[Follower]]:
    """Return the model's layers in the order of execution.

    Args:
        model: A chain of convolutions and linear layers, each followed by what ``followers`` takes;
            constants may be added to and multiplied with the pixels; flattening is allowed between
            layers.
        followers: What may stand between layers.

    Raises:
        FedveilError: The model is no such chain; the sentence names what stops it.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # tracing runs the user's own code
        raise followers.stopped(model, f"its forward pass cannot be traced ({error})") from error
    modules = dict(model.named_modules())
    layers: list[Layer[Follower]] = []
    scale, offset = 1.0, 0.0
    previous: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "output" or _asks_size(node):
            continue
        if previous is not None and previous not in node.all_input_nodes:
            reason = f"{node.name} does not follow {previous.name}: it is no chain"
            raise followers.stopped(model, reason)
        if sum(not _asks_size(user) for user in node.users) > 1:
            raise followers.stopped(model, f"the output of {node.name} is used more than once")
        previous = node
        step = _read(node, modules, followers)
        if isinstance(step, _Passed):
            continue
        if isinstance(step, Layer):
            layers.append(replace(step, scale=scale, offset=offset))
            scale, offset = 1.0, 0.0
        elif isinstance(step, _Constant) and not layers:
            scale, offset = _AFFINE[step.operation](scale, offset, step.value)
        elif step is None or isinstance(step, _Constant) or not layers:
            raise followers.stopped(model, f"{node.name} ({node.target}) stops it")
        else:
            layers[-1] = replace(layers[-1], activations=(*layers[-1].activations, step))
    return _checked(model, layers, followers)


def _read(
    node: fx.Node, modules: dict[str, nn.Module], followers: Followers[Follower]
) -> Layer[Follower] | Follower | _Constant | _Passed | None:
    if node.op == "placeholder":
        return _Passed()
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.Conv2d | nn.Linear):
            return Layer(str(node.target), module)
        if isinstance(module, nn.Flatten | nn.Identity) or _is_idle(module):
            return _Passed()
        make = followers.modules.get(type(module))
        return make(module) if make else None
    if node.target in _RESHAPES:
        return _Passed()
    if node.target in followers.functions:
        return followers.functions[node.target](node)
    name = getattr(node.target, "__name__", str(node.target))
    if name in _AFFINE and len(node.args) == 2 and isinstance(node.args[1], int | float):
        return _Constant(name, float(node.args[1]))
    return None


def _is_idle(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout | nn.Dropout2d) and (not module.training or module.p == 0)


def _asks_size(node: fx.Node) -> bool:
    # x.view(x.size(0), -1) reads a size; no image passes there.
    if node.target == "size" or node.target is getattr:
        return True
    return node.target is operator.getitem and _asks_size(node.all_input_nodes[0])


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """Return what a call gives as an argument, by its place or its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _checked(
    model: nn.Module, layers: list[Layer[Follower]], followers: Followers[Follower]
) -> list[Layer[Follower]]:
    tied = twins(model)
    if not layers or not isinstance(layers[-1].module, nn.Linear) or layers[-1].activations:
        reason = "it does not end with a linear layer that gives the logits"
        raise followers.stopped(model, reason)
    for layer in layers:
        module, reason = layer.module, ""
        if module.bias is None and followers.biases:
            reason = "has no bias"
        elif not all(parameter.requires_grad for parameter in layer.module.parameters()):
            reason = "is frozen, so its gradient was not sent"
        elif any(name.rpartition(".")[0] == layer.name for name in (*tied, *tied.values())):
            reason = "shares its weight, so its gradient is a sum"
        elif isinstance(module, nn.Conv2d) and (
            module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
        ):
            reason = "has groups or a padding other than zeros"
        if reason:
            raise followers.stopped(model, f"{layer.name} {reason}")
    return layers
