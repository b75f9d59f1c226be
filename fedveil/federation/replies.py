"""What a client sends back, checked before it can enter a mean."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from fedveil.federation.roster import Client, Refusal

WEIGHT_KEY = "num-examples"
"""Metric by which answers are weighed, unless an app names another."""

_HEADER = 4096  # more than numpy writes before an array's numbers
# Of a client that did not say how many images it has.
_MOST_EXAMPLES = 10_000_000
_LARGEST_LOSS = 1e9


@dataclass(frozen=True)
class Update:
    """A checked reply.

    Attributes:
        client: Who sent it.
        weights: The model it returned, by name.
        examples: Number of images it trained on, its weight in the mean; or what the app weighs by.
        loss: Mean training loss it reports; None where it tells none, as under DP-SGD.
        metrics: What else it says of itself, by name.
        content: The whole answer; None where the server never saw one.
    """

    client: Client
    weights: Mapping[str, Tensor]
    examples: float
    loss: float | None
    metrics: Mapping[str, int | float | list[int] | list[float]] = field(default_factory=dict)
    content: RecordDict | None = field(default=None, repr=False, compare=False)


def read_replies(
    replies: Iterable[Message],
    *,
    asked: Mapping[int, Client],
    expected: Mapping[str, Tensor],
    round_number: int,
    weight: str = WEIGHT_KEY,
) -> tuple[list[Update], list[Refusal]]:
    """Sort the replies of a round into usable updates and refusals.

    Args:
        replies: Replies in any order.
        asked: The clients of the round by node id.
        expected: Gives the names, shapes and dtypes a reply must have.
        round_number: The round; a reply that names another is stale.
        weight: Metric by which answers are weighed: images, or what the app counts in their place.

    Returns:
        The updates in the order of the clients' partitions, so that sums do not depend on who
        answered first; and the refusals.
    """
    updates: dict[int, Update] = {}
    refusals: list[Refusal] = []
    for reply in replies:
        node = reply.metadata.src_node_id
        read = _read(reply, asked.get(node), expected, round_number, weight)
        if isinstance(read, str):
            refusals.append(Refusal(node, read))
        elif node in updates:
            refusals.append(Refusal(node, "it answered twice"))
        else:
            updates[node] = read
    return sorted(updates.values(), key=lambda update: update.client.partition), refusals


def _read(
    reply: Message,
    client: Client | None,
    expected: Mapping[str, Tensor],
    round_number: int,
    weight: str,
) -> Update | str:
    if reply.has_error():
        return reply.error.reason or f"error {reply.error.code}"
    if client is None:
        return "it was not asked this round"
    arrays, metrics = reply.content.array_records, reply.content.metric_records
    if len(arrays) != 1 or len(metrics) != 1:
        return "it must send one ArrayRecord and one MetricRecord"
    metric = next(iter(metrics.values()))
    if metric.get("server-round", round_number) != round_number:
        return f"its answer is for round {metric.get('server-round')}, not {round_number}"
    examples, loss = metric.get(weight), metric.get("loss")
    counts = weight == WEIGHT_KEY
    most = client.examples if counts and client.examples is not None else _MOST_EXAMPLES
    if not _is_weight(examples, whole=counts) or not 0 < examples <= most:  # type: ignore[operator]
        allowed = f"1 to {most}" if counts else f"a number above 0, at most {most}"
        return f"{weight} is {examples!r}; allowed: {allowed}"
    if loss is not None and not _is_loss(loss):
        return (
            f"its loss is {loss!r}; allowed: a finite number up to {_LARGEST_LOSS:g}, or none; "
            "where training diverged, lower --learning-rate, or give --clip 1"
        )
    sent = next(iter(arrays.values()))
    if large := _too_large(sent, expected):
        return large
    try:
        weights = sent.to_torch_state_dict()
    except Exception as error:  # whatever numpy makes of bytes that a stranger chose
        return f"its arrays cannot be read ({type(error).__name__})"
    told = None if loss is None else float(loss)  # type: ignore[arg-type]
    return _fault(weights, expected) or Update(
        client,
        weights,
        examples,  # type: ignore[arg-type]
        told,
        metrics=dict(metric),
        content=reply.content,
    )


def _is_weight(value: object, *, whole: bool) -> bool:
    if type(value) is int:
        return True
    return not whole and type(value) is float and math.isfinite(value)


def _is_loss(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) <= _LARGEST_LOSS


def _too_large(arrays: ArrayRecord, expected: Mapping[str, Tensor]) -> str | None:
    """Say so where an answer holds more bytes than the model, before any of them is unpacked."""
    size = sum(len(array.data) for array in arrays.values())
    most = sum(value.nbytes + _HEADER for value in expected.values())
    return f"it holds {size} bytes; the model has {most} at most" if size > most else None


def _fault(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())
        return f"tensor names differ from what was asked for: {', '.join(odd[:3])}"
    for name, value in weights.items():
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
            return (
                f"{name} is {value.dtype} {tuple(value.shape)}, "
                f"not {expected[name].dtype} {tuple(expected[name].shape)}"
            )
        if odd_place := _not_finite(value, expected[name]):
            return f"{name} holds {odd_place}"
        if name.rpartition(".")[2] == "running_var" and bool((value < 0).any()):
            return f"{name} is a variance and holds {float(value.min()):g}; allowed: 0 or more"
    return None


def _not_finite(value: Tensor, expected: Tensor) -> str | None:
    """Say so where a number is not finite that was finite when it was sent."""
    if not value.is_floating_point():
        return None
    # A model may hold infinities of its own, an attention mask's: they come back as they went.
    if bool((torch.isfinite(value) | (value == expected)).all()):
        return None
    return "NaN or infinity: its training diverged; lower --learning-rate, or give --clip 1"
