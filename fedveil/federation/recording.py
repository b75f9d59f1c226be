"""Recorders for any Flower app: what went to a client and what came back, for an audit.

They are off unless ``FEDVEIL_RECORD_KEY_FILE`` names a key, under which everything is encrypted,
and loud while they are on: whoever has the key can attack what was recorded.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from logging import INFO, WARNING
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedveil.defenses.mods import each_call_on_images
from fedveil.federation.passing_grid import PassingGrid
from fedveil.federation.replies import WEIGHT_KEY
from fedveil.runs.recordings import RECORD_KEY_FILE, Exchange, recording_key, write_exchange

_TRAIN = "train"
_ROUND = "server-round"


def record_messages(
    directory: str | Path, *, images: bool = False, weighted_by_key: str = WEIGHT_KEY
) -> Mod:
    """Return a mod that records what a ClientApp is sent for training and what it returns.

    Put it first among the mods, so that it sees what leaves the client.

    Args:
        directory: Where to; a file for each round and client.
        images: Whether what the model was given is recorded, too, which is what an audit scores
            reconstructions by. Images are seen where a module is called with them, float
            [N, C, H, W].
        weighted_by_key: Name of the metric that counts the images.

    Example:
        >>> app = ClientApp(mods=[record_messages("recorded", images=True)])  # doctest: +SKIP
    """
    said = _Said(f"client messages, to {directory}")

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        key = recording_key()
        if not said.whether(key is not None) or not _trains(message) or key is None:
            return call_next(message, context)
        # Read first: an app may train the very tensors it received.
        sent = _arrays(message)
        with _noted(enabled=images) as seen:
            reply = call_next(message, context)
        client = int(context.node_config.get("partition-id", context.node_id))
        found = _exchange(message, sent, reply, client, weighted_by_key)
        if found is not None:
            met = _distinct(seen) if images else None
            written = write_exchange(Path(directory), replace(found, images=met), key)
            log(WARNING, "RECORDED %s: its images can be rebuilt from it", written)
        return reply

    return mod


class RecordingGrid(PassingGrid):
    """A grid that records what one client is sent and returns, whatever the strategy.

    Args:
        inner: The grid that Flower gave the ServerApp.
        directory: Where to.
        node: Flower's id of the client; None for the first that a train message goes to.
        weighted_by_key: Name of the metric that counts the images.

    Example:
        >>> strategy.start(RecordingGrid(grid, "recorded"), …)  # doctest: +SKIP
    """

    def __init__(
        self,
        inner: Grid,
        directory: str | Path,
        *,
        node: int | None = None,
        weighted_by_key: str = WEIGHT_KEY,
    ) -> None:
        super().__init__(inner)
        self.directory = Path(directory)
        self.node = node
        self.weight = weighted_by_key
        self._said = _Said(f"messages of one client, to {directory}")
        self._asked: dict[str, tuple[Message, list[dict[str, Tensor]]]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push, and remember what the watched client was asked."""
        pushed = list(messages)
        numbers = list(self.inner.push_messages(pushed))
        for number, message in zip(numbers, pushed, strict=True):
            self._remember(number, message)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull, and record what the watched client answered."""
        replies = list(self.inner.pull_messages(message_ids))
        for reply in replies:
            asked = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None:
                self._write(*asked, reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send and receive, and record the watched client's exchange."""
        sent = list(messages)
        watched = next((message for message in sent if self._watches(message)), None)
        arrays = [] if watched is None else _arrays(watched)
        replies = list(self.inner.send_and_receive(sent, timeout=timeout))
        if watched is not None:
            node = watched.metadata.dst_node_id
            for reply in replies:
                if reply.metadata.src_node_id == node:
                    self._write(watched, arrays, reply)
        return replies

    def _watches(self, message: Message) -> bool:
        if not _trains(message) or not self._said.whether(recording_key() is not None):
            return False
        if self.node is None:
            self.node = message.metadata.dst_node_id
        return message.metadata.dst_node_id == self.node

    def _remember(self, number: str, message: Message) -> None:
        if number and self._watches(message):
            self._asked[number] = (message, _arrays(message))

    def _write(self, message: Message, sent: list[dict[str, Tensor]], reply: Message) -> None:
        key = recording_key()
        found = _exchange(message, sent, reply, message.metadata.dst_node_id, self.weight)
        if key is not None and found is not None:
            written = write_exchange(self.directory, found, key)
            log(WARNING, "RECORDED %s: its images can be rebuilt from it", written)


@dataclass
class _Said:
    """Says once whether a recorder is on."""

    what: str
    last: bool | None = field(default=None)

    def whether(self, on: bool) -> bool:
        if on != self.last:
            words = "on" if on else f"off: {RECORD_KEY_FILE} names no key"
            log(WARNING if on else INFO, "recording %s is %s", self.what, words)
            self.last = on
        return on


def _trains(message: Message) -> bool:
    return message.metadata.message_type.partition(".")[0] == _TRAIN


def _arrays(message: Message) -> list[dict[str, Tensor]]:
    return [
        {name: value.clone() for name, value in record.to_torch_state_dict().items()}
        for record in message.content.array_records.values()
    ]


def _exchange(
    message: Message, sent: list[dict[str, Tensor]], reply: Message, client: int, weight: str
) -> Exchange | None:
    """Return the exchange; None, and a warning, where the reply answers no model with another."""
    if reply.has_error():
        return None
    returned = _arrays(reply)
    pairs = [(one, other) for one in sent for other in returned if one.keys() == other.keys()]
    counts = [record.get(weight) for record in reply.content.metric_records.values()]
    count = next((value for value in counts if isinstance(value, int | float)), None)
    if len(pairs) != 1 or count is None or int(count) < 1:
        log(
            WARNING,
            "not recorded: client %d returned %d records of arrays under the names it was sent and "
            "%s images (%s); one and a count are needed",
            client,
            len(pairs),
            count,
            weight,
        )
        return None
    return Exchange(_round(message), client, *pairs[0], int(count))


def _round(message: Message) -> int:
    records: Iterable[ConfigRecord] = message.content.config_records.values()
    numbers = [record[_ROUND] for record in records if isinstance(record.get(_ROUND), int)]
    return int(numbers[0]) if numbers else 0  # type: ignore[arg-type]


@contextmanager
def _noted(*, enabled: bool) -> Iterator[list[Tensor]]:
    """Yield a list that fills with every batch of images that a model is called with."""
    seen: list[Tensor] = []
    if not enabled:
        yield seen
        return

    def note(module: nn.Module, images: Tensor) -> None:
        if module.training and torch.is_grad_enabled():  # and no evaluation on the way
            seen.append(images.detach().clone())

    with each_call_on_images(note):
        yield seen


def _distinct(seen: list[Tensor]) -> Tensor | None:
    """Return every image once, in the order in which the model met them first."""
    if not seen:
        return None
    images = torch.cat(seen)
    known: dict[bytes, Tensor] = {}
    for image in images:
        known.setdefault(image.numpy().tobytes(), image)
    return torch.stack(list(known.values()))
