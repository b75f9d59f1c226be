"""A network as the chain of layers that a closed-form recovery walks backwards."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedveil.errors import InapplicableAttackError
from fedveil.models.inspect import twins

Unary = Callable[[Tensor], Tensor]

_UNKNOWN = "unknown"
_EDGE = 1e-12  # keeps the inverse of a saturated activation finite


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
class Layer:
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
    activations: tuple[Activation, ...] = ()
    scale: float = 1.0
    offset: float = 0.0


_Step = Layer | Activation | tuple[str, float] | str | None


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

_ACTIVATION_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.Sigmoid: lambda _: _SIGMOID,
    nn.Tanh: lambda _: _TANH,
    nn.LeakyReLU: lambda module: _leaky(module.negative_slope),
}
_ACTIVATION_FUNCTIONS: dict[object, Activation] = {
    torch.sigmoid: _SIGMOID,
    torch.tanh: _TANH,
    "sigmoid": _SIGMOID,
    "tanh": _TANH,
}
_RESHAPES: set[object] = {torch.flatten, "flatten", "reshape", "view"}
_AFFINE: dict[object, Callable[[float, float, float], tuple[float, float]]] = {
    "add": lambda scale, offset, c: (scale, offset + c),
    "sub": lambda scale, offset, c: (scale, offset - c),
    "mul": lambda scale, offset, c: (scale * c, offset * c),
    "div": lambda scale, offset, c: (scale / c, offset / c),
}


def trace_chain(model: nn.Module) -> list[Layer]:
    """Return the model's layers in the order of execution.

    Args:
        model: A chain of convolutions and linear layers with biases, each followed by invertible
            activations (sigmoid, tanh, leaky ReLU); constants may be added to and multiplied with
            the pixels; flattening is allowed between layers.

    Raises:
        FedveilError: The model is no such chain; the sentence names what stops it.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # tracing runs the user's own code
        raise _stopped(model, f"its forward pass cannot be traced ({error})") from error
    modules = dict(model.named_modules())
    layers: list[Layer] = []
    scale, offset = 1.0, 0.0
    previous: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "output" or _asks_size(node):
            continue
        if previous is not None and previous not in node.all_input_nodes:
            raise _stopped(model, f"{node.name} does not follow {previous.name}: it is no chain")
        if sum(not _asks_size(user) for user in node.users) > 1:
            raise _stopped(model, f"the output of {node.name} is used more than once")
        previous = node
        step = _read(node, modules)
        if isinstance(step, Layer):
            layers.append(replace(step, scale=scale, offset=offset))
            scale, offset = 1.0, 0.0
        elif isinstance(step, Activation) and layers:
            layers[-1] = replace(layers[-1], activations=(*layers[-1].activations, step))
        elif isinstance(step, tuple) and not layers:
            scale, offset = _AFFINE[step[0]](scale, offset, step[1])
        elif step is not None:
            raise _stopped(model, f"{node.name} ({node.target}) stops it")
    return _checked(model, layers)


def _read(node: fx.Node, modules: dict[str, nn.Module]) -> _Step:
    if node.op == "placeholder":
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.Conv2d | nn.Linear):
            return Layer(str(node.target), module)
        if isinstance(module, nn.Flatten | nn.Identity):
            return None
        make = _ACTIVATION_MODULES.get(type(module))
        return make(module) if make else _UNKNOWN
    if node.target in _RESHAPES:
        return None
    if node.target in _ACTIVATION_FUNCTIONS:
        return _ACTIVATION_FUNCTIONS[node.target]
    if node.target is F.leaky_relu:
        return _leaky(float(_argument(node, 1, "negative_slope", 0.01)))
    name = getattr(node.target, "__name__", str(node.target))
    if name in _AFFINE and len(node.args) == 2 and isinstance(node.args[1], int | float):
        return name, float(node.args[1])
    return _UNKNOWN


def _asks_size(node: fx.Node) -> bool:
    # x.view(x.size(0), -1) reads a size; no image passes there.
    if node.target == "size" or node.target is getattr:
        return True
    return node.target is operator.getitem and _asks_size(node.all_input_nodes[0])


def _argument(node: fx.Node, place: int, name: str, default: float) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _checked(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    tied = twins(model)
    if not layers or not isinstance(layers[-1].module, nn.Linear) or layers[-1].activations:
        raise _stopped(model, "it does not end with a linear layer that gives the logits")
    for layer in layers:
        module = layer.module
        if module.bias is None:
            raise _stopped(model, f"{layer.name} has no bias")
        if not all(parameter.requires_grad for parameter in layer.module.parameters()):
            raise _stopped(model, f"{layer.name} is frozen, so its gradient was not sent")
        if any(name.rpartition(".")[0] == layer.name for name in (*tied, *tied.values())):
            raise _stopped(model, f"{layer.name} shares its weight, so its gradient is a sum")
        if isinstance(module, nn.Conv2d) and (
            module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
        ):
            raise _stopped(model, f"{layer.name} has groups or a padding other than zeros")
    return layers


def _stopped(model: nn.Module, reason: str) -> InapplicableAttackError:
    return InapplicableAttackError(
        f"model {type(model).__name__}: the closed-form attack rgap does not apply, {reason}; "
        "use --attack lm, which needs no closed form"
    )
