"""A mod of this app's own, as Flower's example has one."""

import time

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable


def timing_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Add how long the client took to what it says of itself."""
    started = time.perf_counter()
    reply = call_next(message, context)
    if not reply.has_error():
        for metrics in reply.content.metric_records.values():
            metrics["seconds"] = time.perf_counter() - started
    return reply
