"""Defences as Flower client mods, for apps that this package did not write."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor, nn

from fedveil.defenses.defense import Defense
from fedveil.defenses.protocol import Sanitizer
from fedveil.defenses.soteria import Soteria
from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator

_TRAIN = "train"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

Returned = Literal["weights", "gradient"]


def defense_mods(defense: Defense, *, returned: Returned = "weights") -> list[Mod]:
    """Return the mods that put a defence into any Flower client app.

    DP-SGD has none: it changes the training loop itself, which opacus does inside an app.

    Args:
        defense: Of ``parse_defense``.
        returned: What the app answers a train message with.

    Example:
        >>> app = ClientApp(mods=defense_mods(parse_defense("prune:share=0.9")))  # doctest: +SKIP
    """
    mods: list[Mod] = []
    if defense.sanitizer is not None:
        mods.append(sanitize_update(defense.sanitizer, returned=returned))
    if defense.soteria is not None:
        mods.append(perturb_representation(defense.soteria))
    if defense.transform is not None:
        mods.append(transform_inputs(defense.transform))
    return mods


def sanitize_update(sanitizer: Sanitizer, *, returned: Returned = "weights") -> Mod:
    """Return a mod that sanitises what a client answers a train message with.

    Batch statistics and tensors of integers pass as they are. Noise comes from a
    cryptographic stream under fresh bits, never from the message: whoever found its seed could
    subtract it.

    Args:
        sanitizer: For example ``Pruning(share=0.9)``.
        returned: ``weights``, of which the change since the message is the update, or ``gradient``.

    Raises:
        FedveilError: When the mod runs: the reply does not hold one record of arrays, or the
            message not one of the same names.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.partition(".")[0] != _TRAIN:
            return call_next(message, context)
        # Read first: an app may train the very tensors it received.
        received = _arrays(message) if returned == "weights" else []
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        answers = _arrays(reply)
        if len(answers) != 1:
            raise FedveilError(
                f"the reply holds {len(answers)} records of arrays; a sanitiser needs exactly one"
            )
        sent = _counterpart(received, answers[0]) if returned == "weights" else {}
        name = next(iter(reply.content.array_records))
        generator = SecureGenerator()
        reply.content[name] = ArrayRecord(_sanitized(sanitizer, sent, answers[0], generator))
        return reply

    return mod


def withhold_batch_statistics() -> Mod:
    """Return a mod under which batch statistics come back to the server as it sent them.

    Running means and variances that come back tell the mean and variance of a client's batches in
    every layer, whatever a sanitiser does to the weights. The server has to measure its own then,
    as ``SeededFedAvg(statistics=…)`` does of unlabelled images: w keeps those it began with if not.

    Source: that clients can keep them to themselves is of Li et al., "FedBN: Federated Learning on
    Non-IID Features via Local Batch Normalization", ICLR 2021, who do so for another reason.

    Example:
        >>> app = ClientApp(mods=[withhold_batch_statistics()])  # doctest: +SKIP
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.partition(".")[0] != _TRAIN:
            return call_next(message, context)
        received: dict[str, Tensor] = {}
        for sent in _arrays(message):
            received |= {k: v.clone() for k, v in sent.items() if _is_statistic(k)}
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        for name, record in list(reply.content.array_records.items()):
            answer = dict(record.to_torch_state_dict())
            missing = sorted(k for k in answer if _is_statistic(k) and k not in received)
            if missing:
                raise FedveilError(
                    f"the reply's {missing[0]} was not in the message, so there is nothing to "
                    "return in its place; send the model's whole state"
                )
            kept = {k: received.get(k, value) for k, value in answer.items()}
            reply.content[name] = ArrayRecord(kept)
        return reply

    return mod


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in _STATISTICS


def perturb_representation(soteria: Soteria) -> Mod:
    """Return a mod under which every model trains with Soteria's gradient.

    The same limits as of ``transform_inputs`` hold: code that calls no module is not touched.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.partition(".")[0] != _TRAIN:
            return call_next(message, context)
        with soteria.protecting():
            return call_next(message, context)

    return mod


def _arrays(message: Message) -> list[dict[str, Tensor]]:
    return [dict(r.to_torch_state_dict()) for r in message.content.array_records.values()]


def _counterpart(received: list[dict[str, Tensor]], answer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the received record that the answer is a change of."""
    alike = [sent for sent in received if sent.keys() == answer.keys()]
    if len(alike) != 1:
        raise FedveilError(
            f"{len(alike)} records of the message have the reply's names "
            f"({', '.join(sorted(answer)[:3])}, …); a sanitiser needs exactly one to compare with"
        )
    return alike[0]


def _sanitized(
    sanitizer: Sanitizer,
    sent: dict[str, Tensor],
    answer: dict[str, Tensor],
    generator: SecureGenerator,
) -> dict[str, Tensor]:
    update = {
        name: value - sent[name] if sent else value
        for name, value in answer.items()
        if value.is_floating_point() and not _is_statistic(name)
    }
    first = _one_of_twins(update, sent)
    clean = sanitizer({name: update[name] for name in dict.fromkeys(first.values())}, generator)
    changed = {name: sent[name] + clean[own] if sent else clean[own] for name, own in first.items()}
    return {**answer, **changed}


def _one_of_twins(update: dict[str, Tensor], sent: dict[str, Tensor]) -> dict[str, str]:
    """Return name to the first name of the same tensor: a tied weight is one, whatever its names.

    Noise drawn anew under each name would halve where a reader averages them. Messages keep no
    identity of tensors, so the same values before and after stand for it.
    """
    first: dict[str, str] = {}
    for name, value in update.items():
        twins = (
            own
            for own in dict.fromkeys(first.values())
            if torch.equal(update[own], value) and (not sent or torch.equal(sent[own], sent[name]))
        )
        first[name] = next(twins, name)
    return first


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


def _transformed(transform: nn.Module) -> AbstractContextManager[None]:
    return each_call_on_images(
        lambda _module, images: transform(images), apart_from=set(transform.modules())
    )


@contextmanager
def each_call_on_images(
    use: Callable[[nn.Module, Tensor], Tensor | None],
    *,
    apart_from: Collection[nn.Module] = (),
) -> Iterator[None]:
    """Let ``use`` see what the outermost call of any module is given, where that is images.

    Args:
        use: Given the module and its first argument, float [N, C, H, W]; what it returns takes
            the argument's place, unless that is None.
        apart_from: Modules whose calls count for nothing.
    """
    depth = 0

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal depth
        if module in apart_from:
            return None
        depth += 1
        if depth > 1 or not inputs or not _is_images(inputs[0]):
            return None
        used = use(module, inputs[0])
        return None if used is None else (used, *inputs[1:])

    def leave(module: nn.Module, _inputs: object, _output: object) -> None:
        nonlocal depth
        if module not in apart_from:
            depth -= 1

    before = nn.modules.module.register_module_forward_pre_hook(enter)  # type: ignore[arg-type]
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _is_images(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
