"""A model's parameters, layer by layer."""

from torch import nn

from fedveil.attacks.theft.descent import parameter_names

_MOST = 8


def layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Group a model's parameters by layer, or by block where there are more than eight layers.

    Returns:
        Name of the layer or block to the names of its parameters, in the model's order.
    """
    names = parameter_names(model)
    depth = max(name.count(".") for name in names)
    groups = _grouped(names, depth)
    while len(groups) > _MOST and depth > 1:
        depth -= 1
        groups = _grouped(names, depth)
    return groups


def _grouped(names: tuple[str, ...], depth: int) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        module = name.split(".")[:-1]
        groups.setdefault(".".join(module[:depth]) or name, []).append(name)
    return {layer: tuple(members) for layer, members in groups.items()}
