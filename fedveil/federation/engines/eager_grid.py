"""A grid that looks for replies often enough not to be what a round waits for."""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message

from fedveil.federation.passing_grid import PassingGrid

_SHORTEST = 0.1
_LONGEST = 2.0
# Looking costs the SuperLink a query; the longer a round has taken, the rarer a look need be.
_SHARE_OF_THE_WAIT = 0.05


class EagerGrid(PassingGrid):
    """Flower's grid with short waits between two looks for replies.

    Flower 1.41's own ``send_and_receive`` sleeps three seconds between two looks, whatever the
    clients do. Pushing and pulling are public parts of the Grid interface, and the wait between
    them is left to the caller.

    Args:
        inner: The grid that Flower gave the ServerApp.
    """

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push the messages and pull their replies, for ``timeout`` seconds at most.

        A reply by which the SuperLink says that a node is gone has the node's number, as its own
        replies have.
        """
        pushed = list(messages)
        waiting = {
            number: message.metadata.dst_node_id
            for number, message in zip(self.push_messages(pushed), pushed, strict=True)
            if number
        }
        replies: list[Message] = []
        for _ in _looks(timeout):
            for reply in list(self.pull_messages(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if reply.has_error() and node is not None:
                    # Flower signs it as the SuperLink's own, and offers no setter.
                    reply.metadata.__dict__["_src_node_id"] = node
                replies.append(reply)
            if not waiting:
                break
        return replies


def _looks(timeout: float | None) -> Iterator[None]:
    """Yield whenever it is time to look; the last time when ``timeout`` is over."""
    started = time.monotonic()
    while True:
        yield
        elapsed = time.monotonic() - started
        if timeout is not None and elapsed >= timeout:
            return
        wait = min(max(_SHORTEST, _SHARE_OF_THE_WAIT * elapsed), _LONGEST)
        time.sleep(wait if timeout is None else min(wait, timeout - elapsed))
