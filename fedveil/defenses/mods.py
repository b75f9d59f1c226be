"""Defences as Flower client mods, for apps that this package did not write."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor, nn

_TRAIN = "train"


def transform_inputs(transform: nn.Module) -> Mod:
    """Return a mod under which every model trains on transformed images.

    While a train message is handled, whatever float tensor [N, C, H, W] is the first argument of
    the outermost call of a module passes through ``transform`` first. Evaluation sees the images
    as they are.

    What this does not do: it cannot bind an app that means to evade it. Code that calls
    ``model.forward`` or functions without a module, reads images in another process, or returns
    something else than what it trained, is not touched. A site that trusts no app gives it a
    transformed copy of its images instead (``fedveil transform``). A module that is not the model
    but is called on images first (an augmentation, a normalisation) counts as the outermost call;
    for ``BlockDCT`` a normalisation with a constant for each channel makes no difference, since
    the transformation is linear and keeps the mean of a block, so the two commute. A tensor that
    was transformed is not transformed again; what a module makes of it is a new tensor and is.

    Args:
        transform: For example ``BlockDCT(keep=21)``.

    Example:
        >>> app = ClientApp(mods=[transform_inputs(BlockDCT(keep=21))])  # doctest: +SKIP
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.partition(".")[0] != _TRAIN:
            return call_next(message, context)
        with _transformed(transform):
            return call_next(message, context)

    return mod


@contextmanager
def _transformed(transform: nn.Module) -> Iterator[None]:
    own = set(transform.modules())
    depth = 0

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal depth
        if module in own:
            return None
        depth += 1
        if depth > 1 or not inputs or not _is_images(inputs[0]):
            return None
        return transform(inputs[0]), *inputs[1:]

    def leave(module: nn.Module, _inputs: object, _output: object) -> None:
        nonlocal depth
        if module not in own:
            depth -= 1

    before = nn.modules.module.register_module_forward_pre_hook(enter)  # type: ignore[arg-type]
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _is_images(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and torch.is_floating_point(value)
