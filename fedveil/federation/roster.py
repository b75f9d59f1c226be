"""Which client sits behind which node.

Flower's node ids are random and a node's ``partition-id`` is known to the client alone, so one
query round asks every node before the first training round.
"""

import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedveil.errors import FedveilError
from fedveil.wording import quantity

_MOST_CLIENTS = 1_000_000
_MOST_EXAMPLES = 2**53  # up to which a float64 counts exactly


@dataclass(frozen=True)
class Refusal:
    """An answer that is left out, and why."""

    node: int
    reason: str


@dataclass(frozen=True)
class Sampling:
    """How each round chooses its clients.

    Attributes:
        fraction: C, the fraction of the clients that takes part in a round.
        seed: Same seed, same clients.
        min_clients: Clients to wait for before the first round.
        timeout: Seconds to wait for them, and for their answers to the first query.
        min_train: Clients that take part in a round at least.
    """

    fraction: float = 1.0
    seed: int = 0
    min_clients: int = 2
    timeout: float = 3_600.0
    min_train: int = 1


@dataclass(frozen=True)
class Client:
    """A client of the federation.

    Attributes:
        partition: Number of its share of the data, from 0; stays the same between runs.
        node: Flower's node id; changes from run to run.
        examples: How many images it says it has; ``None`` where its app answers no query.
    """

    partition: int
    node: int
    examples: int | None


def query_roster(
    grid: Grid,
    config: ConfigRecord,
    *,
    min_clients: int,
    timeout: float,
    key: str = "config",
) -> tuple[Client, ...]:
    """Wait until enough nodes are connected, and ask every node who it is.

    Args:
        grid: Connected grid.
        config: What the clients need to find their data; the same as for training.
        min_clients: How many nodes to wait for.
        timeout: Seconds to wait for the nodes, and again for their answers.
        key: Name of the record that ``config`` travels in.

    Returns:
        The clients that answered, in the order of their partitions. Where no node answers a query
        but all say so, as ordinary Flower apps do that register none, all nodes, numbered in the
        order of their ids.

    Raises:
        FedveilError: Too few nodes came, or no answer was usable.
    """
    _wait_for_nodes(grid, min_clients, timeout)
    log(
        INFO,
        "asking every client how many images it has; one without a query function answers "
        "with an error, which does no harm",
    )
    content = RecordDict({key: config})
    messages = [
        Message(content=content, message_type=MessageType.QUERY, dst_node_id=node)
        for node in grid.get_node_ids()
    ]
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    clients, refusals = _read(replies)
    for refusal in refusals:
        log(WARNING, "node %d takes no part: %s", refusal.node, refusal.reason)
    if clients:
        _name_missing(messages, replies)
    if not clients and replies and all(_has_no_query(reply) for reply in replies):
        nodes = sorted(message.metadata.dst_node_id for message in messages)
        return tuple(Client(number, node, None) for number, node in enumerate(nodes))
    if not clients:
        reasons = {str(reply.error.reason) for reply in replies if reply.has_error()}
        reasons |= {f"node {refusal.node}: {refusal.reason}" for refusal in refusals}
        raise FedveilError(
            f"none of {quantity(len(messages), 'client')} gave a usable answer to the first query"
            + (f": {'; '.join(sorted(reasons))}" if reasons else f" within {timeout:g} seconds")
        )
    return tuple(sorted(clients, key=lambda client: client.partition))


def _read(replies: Iterable[Message]) -> tuple[list[Client], list[Refusal]]:
    """Sort the first answers into clients and nodes that take no part.

    Of two that claim one partition nobody can tell whose it is, so neither takes part.
    """
    clients: list[Client] = []
    refusals: list[Refusal] = []
    for reply in replies:
        if reply.has_error():
            continue
        read = _client(reply)
        if isinstance(read, str):
            refusals.append(Refusal(reply.metadata.src_node_id, read))
        else:
            clients.append(read)
    claims = Counter(client.partition for client in clients)
    refusals += [
        Refusal(client.node, f"{claims[client.partition]} nodes claim partition {client.partition}")
        for client in clients
        if claims[client.partition] > 1
    ]
    return [client for client in clients if claims[client.partition] == 1], refusals


def _name_missing(messages: Sequence[Message], replies: Sequence[Message]) -> None:
    reasons = {
        reply.metadata.src_node_id: str(reply.error.reason)
        for reply in replies
        if reply.has_error()
    }
    answered = {reply.metadata.src_node_id for reply in replies} - reasons.keys()
    for message in messages:
        node = message.metadata.dst_node_id
        if node not in answered:
            log(WARNING, "node %d takes no part: %s", node, reasons.get(node, "no answer in time"))


def _has_no_query(reply: Message) -> bool:
    # Flower's own words for a message type without a registered function.
    return reply.has_error() and "No query function registered" in str(reply.error.reason)


def _wait_for_nodes(grid: Grid, min_clients: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while (connected := len(list(grid.get_node_ids()))) < min_clients:
        if time.monotonic() > deadline:
            raise FedveilError(
                f"{connected} of {quantity(min_clients, 'client')} connected within {timeout:g} "
                "seconds; start the others, or ask for fewer with --clients"
            )
        time.sleep(0.05)


def _client(reply: Message) -> Client | str:
    """Return who a node is, or what is wrong with what it says."""
    records = list(reply.content.metric_records.values())
    if len(records) != 1:
        return f"its first answer holds {len(records)} records of metrics; allowed: one"
    partition, examples = (records[0].get(key) for key in ("partition-id", "num-examples"))
    for key, value, least, most in (
        ("partition-id", partition, 0, _MOST_CLIENTS - 1),
        ("num-examples", examples, 1, _MOST_EXAMPLES),
    ):
        if type(value) is not int or not least <= value <= most:
            return f"its {key} is {value!r}; allowed: a whole number from {least} to {most}"
    assert type(partition) is int
    assert type(examples) is int
    return Client(partition, reply.metadata.src_node_id, examples)


def sample_clients(
    clients: Sequence[Client], *, fraction: float, seed: int, round_number: int, least: int = 1
) -> list[Client]:
    """Return max(⌊C·K⌋, ``least``) clients in random order; the same for the same seed and round.

    Source: McMahan et al. 2017, Algorithm 1.

    Raises:
        FedveilError: There are fewer than ``least``.
    """
    if len(clients) < least:
        raise FedveilError(
            f"the roster has {quantity(len(clients), 'client')}, and min_train_nodes={least} asks "
            "for more in every round: start the others, or lower it"
        )
    generator = random.Random(f"fedveil sampling {seed} {round_number}")
    return generator.sample(list(clients), max(round_size(len(clients), fraction), least))


def choose_unheard(
    clients: Sequence[Client], heard: Set[int], sampling: Sampling, round_number: int
) -> list[Client]:
    """Return clients that were not heard yet, as many as ``fraction`` is of all.

    Args:
        clients: All that take part.
        heard: Partitions of those that were.
        sampling: How a round chooses.
        round_number: The round.

    Raises:
        FedveilError: There are none.
    """
    left = [client for client in clients if client.partition not in heard]
    if not left:
        raise FedveilError(
            f"round {round_number}: every one of {quantity(len(clients), 'client')} is in the sum "
            "already, and each is asked once; add rounds when more have joined"
        )
    count = min(round_size(len(clients), sampling.fraction), len(left))
    return sample_clients(
        left,
        fraction=count / len(left),
        seed=sampling.seed,
        round_number=round_number,
        least=min(sampling.min_train, len(left)),
    )


def round_size(clients: int, fraction: float) -> int:
    """Return how many of ``clients`` clients take part in a round: max(⌊C·K⌋, 1)."""
    return max(int(fraction * clients + 1e-9), 1)
