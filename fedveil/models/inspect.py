"""What a defence needs to know of a model it did not define."""

import torch
from torch import nn

from fedveil.errors import FedveilError

_FIRST_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_SENDABLE = frozenset({torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8}) | {
    *(torch.int8, torch.int16, torch.int32, torch.int64)
}
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)  # what all of them, lazy ones too, are made of


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether any layer keeps batch statistics."""
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


def batch_statistics_names(model: nn.Module) -> frozenset[str]:
    """Return what layers of batch normalisation keep of batches, by its name in the state."""
    return frozenset(
        f"{name}.{part}" if name else part
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS)
        for part, value in module.named_buffers(recurse=False)
        if isinstance(value, torch.Tensor)
    )


def twins(model: nn.Module) -> dict[str, str]:
    """Return the further names of each parameter that has several, to its first one.

    A tied weight is one tensor, whatever its names: what is done to it is done under all of them.
    """
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            found[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return found


def check_sendable(model: nn.Module) -> None:
    """Refuse a model whose state no message of Flower's can carry.

    Raises:
        FedveilError: Names the tensor, or what is none.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise FedveilError(
                f"model {type(model).__name__}: {name} is a {type(value).__name__}, no tensor, so "
                "no message can carry it; keep what get_extra_state returns in buffers"
            )
        if value.dtype not in _SENDABLE:
            raise FedveilError(
                f"model {type(model).__name__}: {name} is {value.dtype}, which no message can "
                "carry; make it float32 (.float()), and convert in the forward pass"
            )


def first_layer(model: nn.Module, shape: tuple[int, int, int]) -> str:
    """Return the qualified name of the layer the pixels reach first.

    That is the first convolution, patch embedding or linear layer in the order of execution, found
    by a forward pass, since the order of definition need not be the order of use.

    Args:
        model: Any module that takes float [N, C, H, W].
        shape: (C, H, W) of one image.

    Returns:
        A name for ``model.get_submodule``; empty when the model itself is such a layer.

    Raises:
        FedveilError: The forward pass uses no such layer.
    """
    reached: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: reached.append(name))
        for name, module in model.named_modules()
        if isinstance(module, _FIRST_LAYERS)
    ]
    try:
        _probe(model, shape)
    finally:
        for hook in hooks:
            hook.remove()
    if not reached:
        raise FedveilError(
            f"model {type(model).__name__}: its forward pass uses no convolution or linear layer, "
            "so there is no first layer to add noise to; name the parameters with --noise PATTERN"
        )
    return reached[0]


def output_layer(model: nn.Module, shape: tuple[int, int, int]) -> str:
    """Return the qualified name of the linear layer whose output is the logits.

    Args:
        model: Any module that takes float [N, C, H, W].
        shape: (C, H, W) of one image.

    Raises:
        FedveilError: The logits are not the output of one linear layer, unchanged.
    """
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        outputs[name] = output

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        logits = _probe(model, shape)
    finally:
        for hook in hooks:
            hook.remove()
    for name, output in outputs.items():
        if output is logits:
            return name
    raise FedveilError(
        f"model {type(model).__name__}: its logits are not the output of one linear layer, so they "
        "have no scale to set and no layer to put noise into; name other parameters with "
        "--noise PATTERN, and leave the scale as it is with --temperature=0"
    )


def _probe(model: nn.Module, shape: tuple[int, int, int]) -> torch.Tensor:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parameter = next(model.parameters())
            pixels = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
            logits: torch.Tensor = model(pixels)
            return logits
    finally:
        model.train(training)
