"""The server's part of SecAgg+ on Flower's Message API: four stages, of which it learns a sum."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from logging import WARNING
from random import SystemRandom
from typing import TypeVar, cast

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.serverapp import Grid
from flwr.supercore.primitives.asymmetric import bytes_to_public_key
from torch import Tensor

from fedveil.errors import FedveilError
from fedveil.federation.replies import Update, read_replies
from fedveil.federation.roster import Client, Refusal
from fedveil.federation.secagg.client import (
    FEWEST,
    MASKED,
    MOST_EXAMPLES,
    ROSTER,
    ROUND,
    FixedPoint,
    Floats,
    Words,
    floating,
    mask,
    mean_loss,
    member,
    pairwise_mask,
    story_of,
)
from fedveil.types import Weights

Keys = tuple[bytes, bytes]
Read = TypeVar("Read")

_MODULUS = 2**32
_NAMED = 3  # reasons for which clients are not in a sum


@dataclass(frozen=True)
class SecureAggregation:
    """SecAgg+: the server learns the sum of a round's changes, and of no smaller group's.

    Every client hides its change under a mask of its own, and under one that it shares with each
    of its neighbours and that cancels in the sum. The keys of both are shared out among the
    neighbours, so that the masks of a client that stays away can be undone without it.

    Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    CCS 2017, figure 4, for a server that follows the protocol; with fewer ``shares`` than clients,
    the neighbourhoods of Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic
    Overhead", CCS 2020, section 3.

    Attributes:
        threshold: Part of a neighbourhood, above a half, whose shares undo a mask; at least three
            clients. As many must stay to the end, and fewer can undo none even together with the
            server.
        shares: Clients in a neighbourhood, odd, each with itself; ``None``: all of the round's.
        largest_change: Limit on what a round may change of a weight; a client whose training went
            further takes no part in the sum.
        timeout: Seconds to wait for the answers of a stage.
    """

    threshold: float = 0.6
    shares: int | None = None
    largest_change: float = 16.0
    timeout: float = 3_600.0

    def agree(
        self,
        grid: Grid,
        clients: Sequence[Client],
        round_number: int,
        *,
        most_examples: int | None = None,
    ) -> "Agreement":
        """Run the first two stages: the clients tell their public keys and share out the others.

        Args:
            grid: Connected grid.
            clients: Those of the round, at least three, each with its number of images.
            round_number: The round.
            most_examples: For how many images a client counts at most; None for as many as the
                one that says it has most.

        Returns:
            What the clients that are still there have agreed on.

        Raises:
            FedveilError: Too few clients were asked, or are left.
        """
        _check_clients(clients)
        count = min(self.shares or len(clients), len(clients))
        neighbours = neighbourhoods([client.node for client in clients], count)
        needed = max(math.ceil(self.threshold * count - 1e-9), FEWEST)
        stages = Stages(grid, round_number, needed, neighbours, self.timeout)
        most = most_examples or max(client.examples or 1 for client in clients)
        images = sum(min(client.examples or 0, most) for client in clients)
        setup = self._setup(round_number, len(clients), count, needed, images, most)
        told, refused = stages.ask(Stage.SETUP, dict.fromkeys(neighbours, setup), _read_public_keys)
        stages.check("told their public keys", told.keys(), told, refused)
        public = {node: _public_keys(neighbours[node] & told.keys(), told) for node in told}
        roster = [member(node, keys) for node, keys in told.items()]
        listed = {ROSTER: ConfigRecord({"members": roster})}
        shared, silent = stages.ask(Stage.SHARE_KEYS, public, _read_letters, beside=listed)
        stages.check("shared out their keys", shared.keys(), shared, refused + silent)
        return Agreement(
            stages=stages,
            clients=tuple(client for client in clients if client.node in shared),
            keys=told,
            letters={node: _addressed_to(node, shared) for node in shared},
            refused=tuple(refused + silent),
            images=images,
            most=most,
            story=story_of(setup, roster),
            code=FixedPoint(self.largest_change, len(clients)),
        )

    def _setup(
        self, round_number: int, clients: int, shares: int, needed: int, images: int, most: int
    ) -> ConfigRecord:
        return ConfigRecord(
            {
                ROUND: round_number,
                MOST_EXAMPLES: most,
                Key.SAMPLE_NUMBER: clients,
                Key.SHARE_NUMBER: shares,
                Key.THRESHOLD: needed,
                Key.CLIPPING_RANGE: float(self.largest_change),
                Key.TARGET_RANGE: _MODULUS,
                Key.MOD_RANGE: _MODULUS,
                Key.MAX_WEIGHT: float(images),
            }
        )


@dataclass(frozen=True)
class Stages:
    """How a round's stages are asked for, and when they are given up.

    Attributes:
        grid: Connected grid.
        round_number: The round.
        needed: Clients of a neighbourhood that must be left after each stage.
        neighbours: Nodes of each node's neighbourhood, with itself.
        timeout: Seconds to wait for the answers of a stage.
    """

    grid: Grid
    round_number: int
    needed: int
    neighbours: Mapping[int, frozenset[int]]
    timeout: float

    def ask(
        self,
        stage: str,
        records: Mapping[int, ConfigRecord],
        read: Callable[[ConfigRecord], Read],
        *,
        beside: Mapping[str, ConfigRecord] | None = None,
    ) -> tuple[dict[int, Read], list[Refusal]]:
        """Send each node its record of a stage, and ``beside`` to all of them.

        Returns:
            What ``read`` makes of the answers by node, and who has none that can be read.
        """
        messages = [
            Message(
                content=RecordDict({RECORD_KEY_CONFIGS: at_stage(stage, record), **(beside or {})}),
                message_type=MessageType.TRAIN,
                dst_node_id=node,
                group_id=str(self.round_number),
            )
            for node, record in records.items()
        ]
        answers: dict[int, Read] = {}
        reasons = dict.fromkeys(records, "no answer in time")
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            node = reply.metadata.src_node_id
            try:
                answers[node] = read(_record(reply))
            except FedveilError as error:
                reasons[node] = str(error)
        refused = [Refusal(node, why) for node, why in reasons.items() if node not in answers]
        return answers, refused

    def check(
        self, done: str, left: Set[int], holders: Iterable[int], refused: Sequence[Refusal]
    ) -> None:
        """Stop where too few are left of the neighbourhood of any of ``holders`` of a mask.

        Raises:
            FedveilError: Says how many are left, how many it takes, and why the others are not.
        """
        there = min((len(self.neighbours[node] & left) for node in holders), default=0)
        if there >= self.needed:
            return
        asked = max(map(len, self.neighbours.values()))
        reasons = "; ".join(f"node {refusal.node}: {refusal.reason}" for refusal in refused)
        raise FedveilError(
            f"round {self.round_number}: only {there} of {asked} clients that hold each other's "
            f"key shares {done}, and it takes {self.needed} of them to undo the masks ({reasons}); "
            "mend them and go on with fedveil train --resume, or train anew with a lower "
            "--reconstruction-threshold"
        )


@dataclass(frozen=True)
class Agreement:
    """What a round's clients agreed on before any of them was sent a model.

    Attributes:
        stages: How the last stage is asked for.
        clients: Those that shared out their keys, in the order in which they were chosen.
        keys: Public keys by node.
        letters: For each node the encrypted key shares that its neighbours sent it; they belong
            into its message, as the record ``RECORD_KEY_CONFIGS``.
        refused: Who dropped out so far, and why.
        images: Images of all clients of the round, as they count.
        most: For how many images a client counts at most.
        story: Digest of what every client was told, which their common masks depend on.
        code: How numbers are summed.
    """

    stages: Stages
    clients: tuple[Client, ...]
    keys: Mapping[int, Keys]
    letters: Mapping[int, ConfigRecord]
    refused: tuple[Refusal, ...]
    images: int
    most: int
    story: bytes
    code: FixedPoint

    def mean(
        self, replies: Iterable[Message], received: Mapping[Client, Weights]
    ) -> tuple[list[Update], list[Refusal]]:
        """Run the last stage and return the mean of what the clients changed.

        Each client that is in the sum is credited with the mean change: what it was sent, plus
        Σ nₖ(rₖ - sₖ)/Σ nₖ, in float64. Any strategy that is linear in the changes makes of these
        exactly what it makes of the true answers, so whatever noise was in a copy s leaves with it.

        Args:
            replies: Of the third stage, in any order.
            received: The copy each client was sent.

        Returns:
            The credited answers, in the order of the clients' partitions; and who dropped out.

        Raises:
            FedveilError: Too few clients are left to undo the masks, or their shares are wrong.
        """
        layout = VectorLayout.of(next(iter(received.values())))
        vectors, refused = read_replies(
            replies,
            asked={client.node: client for client in self.clients},
            expected={MASKED: torch.zeros(layout.length, dtype=torch.int32)},
            round_number=self.stages.round_number,
        )
        total = np.zeros(layout.length, dtype=np.uint32)
        for vector in vectors:
            total += vector.weights[MASKED].numpy().view(np.uint32)
        refused = self._unmask(total, {vector.client.node for vector in vectors}, refused)
        weight = sum(min(vector.examples, self.most) for vector in vectors) / self.images
        mean = self.code.decode(total) / weight
        return layout.credited(self.code, mean, vectors, received), refused

    def total(
        self,
        replies: Iterable[Message],
        length: int,
        *,
        least_images: int = 0,
        least_clients: int = 0,
    ) -> tuple[Tensor, list[Update], list[Refusal]]:
        """Run the last stage and return the sum of the clients' words, modulo 2⁶⁴.

        Answers are added as they come, and no two of them are held at once.

        Args:
            replies: Of the third stage, in any order.
            length: How many words each must have.
            least_images: Of how many images a sum is made known at least.
            least_clients: And of how many clients.

        Returns:
            int64 [length]; who is in it, without weights, in the order of the clients' partitions;
            and who dropped out.

        Raises:
            FedveilError: As ``mean``; or too few images are left, and the sum stays hidden.
        """
        asked = {client.node: client for client in self.clients}
        expected = {MASKED: torch.zeros((), dtype=torch.int64).expand(length)}
        total = np.zeros(length, dtype=np.uint64)
        summed: dict[int, Update] = {}
        refused: list[Refusal] = []
        for reply in replies:
            updates, wrong = read_replies(
                [reply],
                asked=asked,
                expected=expected,
                round_number=self.stages.round_number,
            )
            refused += wrong
            for update in updates:
                if update.client.node in summed:
                    refused.append(Refusal(update.client.node, "it answered twice"))
                    continue
                total += update.weights[MASKED].numpy().view(np.uint64)
                summed[update.client.node] = replace(update, weights={}, content=None)
        images = sum(int(update.examples) for update in summed.values())
        if images < least_images or len(summed) < least_clients:
            reasons = "; ".join(sorted({refusal.reason for refusal in refused})[:_NAMED])
            raise FedveilError(
                f"round {self.stages.round_number}: {images} images of {len(summed)} clients are "
                f"left in the sum, which would show single ones; it takes {least_images} of "
                f"{least_clients or FEWEST}, and the sum stays hidden "
                f"({reasons or 'nobody else answered'}); go on with fedveil train --resume when "
                "more clients are there"
            )
        refused = self._unmask(total, set(summed), refused)
        ordered = sorted(summed.values(), key=lambda update: update.client.partition)
        return torch.from_numpy(total.view(np.int64)), ordered, refused

    def _unmask(self, total: Words, present: Set[int], refused: list[Refusal]) -> list[Refusal]:
        """Take every mask out of ``total``, in place; return all who dropped out."""
        refused = [*self.refused, *refused, *self._silent(present, refused)]
        holders = [client.node for client in self.clients]
        self.stages.check("sent what they changed", present, holders, refused)
        for covering in self._masks(self._shares(present, refused), present, total):
            total -= covering
        return refused

    def _silent(self, present: Set[int], refused: Sequence[Refusal]) -> list[Refusal]:
        heard = present | {refusal.node for refusal in refused}
        nodes = [client.node for client in self.clients if client.node not in heard]
        return [Refusal(node, "no answer in time") for node in nodes]

    def _shares(self, present: Set[int], refused: Sequence[Refusal]) -> dict[int, list[bytes]]:
        """Ask for the shares of present nodes' own masks and of gone nodes' keys, never of both."""
        gone = {client.node for client in self.clients} - present
        asked = {
            node: ConfigRecord(
                {
                    Key.ACTIVE_NODE_ID_LIST: sorted(self.stages.neighbours[node] & present),
                    Key.DEAD_NODE_ID_LIST: sorted(self.stages.neighbours[node] & gone),
                }
            )
            for node in present
        }
        answers, silent = self.stages.ask(Stage.UNMASK, asked, _read_shares)
        for refusal in silent:
            log(WARNING, "node %d kept its key shares back: %s", refusal.node, refusal.reason)
        holders = [client.node for client in self.clients]
        self.stages.check("gave key shares back", answers.keys(), holders, [*refused, *silent])
        return {
            node: [answer[node] for answer in answers.values() if node in answer]
            for node in holders
        }

    def _masks(
        self, shares: Mapping[int, Sequence[bytes]], present: Set[int], total: Words
    ) -> Iterator[Words]:
        """Yield what is left in the sum beside the changes: own masks, and those of a gone half."""
        length, word = len(total), f"<u{total.itemsize}"
        for node, held in shares.items():
            try:
                secret = combine_shares(list(held[: self.stages.needed]))
                if node in present:
                    yield mask(secret, length, word)
                    continue
                for other in self.stages.neighbours[node] & present:
                    shared = pairwise_mask(secret, self.keys[other][0], self.story, length, word)
                    yield shared if other > node else -shared
            except (ValueError, IndexError):
                raise FedveilError(
                    f"round {self.stages.round_number}: the key shares of node {node} do not fit "
                    "together, so a client gave a wrong one; go on with fedveil train --resume, "
                    "without that client if it happens again"
                ) from None


@dataclass(frozen=True)
class VectorLayout:
    """Where a model's tensors lie in a vector: those of floating point, by name; then the loss.

    Attributes:
        shapes: Shapes by name, in the vector's order.
    """

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, model: Weights) -> "VectorLayout":
        """Return the layout of a model's state."""
        names = floating({name: value.numpy() for name, value in model.items()})
        return cls({name: model[name].shape for name in names})

    @property
    def length(self) -> int:
        """D + 1."""
        return sum(shape.numel() for shape in self.shapes.values()) + 1

    def credited(
        self,
        code: FixedPoint,
        mean: Floats,
        vectors: Sequence[Update],
        received: Mapping[Client, Weights],
    ) -> list[Update]:
        """Return, for each client, the copy it was sent plus the mean change, in float64."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = torch.split(torch.from_numpy(mean[:-1]), sizes)
        changes = {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        loss = mean_loss(float(mean[-1]), code.limit)
        return [
            Update(
                vector.client,
                {
                    name: value.double() + changes[name] if name in changes else value
                    for name, value in received[vector.client].items()
                },
                vector.examples,
                loss,
            )
            for vector in vectors
        ]


def neighbourhoods(nodes: Sequence[int], shares: int) -> dict[int, frozenset[int]]:
    """Return whose key shares each node holds: a ring in random order, and everybody near on it.

    Source: Bell et al. 2020, section 3 (a Harary graph over a random order of the clients).

    Args:
        nodes: The round's nodes.
        shares: Size of a neighbourhood, the node itself with it; odd, or all of the nodes.

    Raises:
        ValueError: ``shares`` is even, and less than all.
    """
    if shares % 2 == 0 and shares < len(nodes):
        raise ValueError(f"shares = {shares}: a neighbourhood has as many nodes on either side")
    ring = list(nodes)
    # Who could foretell it could put its own clients around another's.
    SystemRandom().shuffle(ring)
    half = shares // 2
    return {
        node: frozenset(ring[(place + i) % len(ring)] for i in range(-half, half + 1))
        for place, node in enumerate(ring)
    }


def at_stage(stage: str, record: ConfigRecord) -> ConfigRecord:
    """Return a copy of a record that says which stage it is for."""
    return ConfigRecord({**record, Key.STAGE: stage})


def check_round_size(clients: int) -> None:
    """Refuse rounds whose sum would hide nothing.

    Raises:
        FedveilError: Fewer than three clients.
    """
    if clients < FEWEST:
        raise FedveilError(
            f"{clients} clients a round are too few for secure aggregation: of a sum of two, each "
            f"knows the other's part; take at least {FEWEST}, by --clients or --fraction"
        )


def _check_clients(clients: Sequence[Client]) -> None:
    check_round_size(len(clients))
    for client in clients:
        if client.examples is None:
            raise FedveilError(
                f"node {client.node} does not say how many images it has, which secure aggregation "
                "has to know; its app must answer Flower's query"
            )


def _record(reply: Message) -> ConfigRecord:
    if reply.has_error():
        raise FedveilError(reply.error.reason or f"error {reply.error.code}")
    record = reply.content.config_records.get(RECORD_KEY_CONFIGS)
    if record is None:
        raise FedveilError("its answer holds nothing of SecAgg+; its app must have the mod for it")
    return record


def _read_public_keys(record: ConfigRecord) -> Keys:
    keys = tuple(record.get(key) for key in (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2))
    # One that cannot be read would stop every neighbour, and not the one that sent it.
    if not all(_is_public_key(key) for key in keys):
        raise FedveilError("its public keys cannot be read")
    return cast("Keys", keys)


def _is_public_key(value: object) -> bool:
    try:
        key = bytes_to_public_key(value) if isinstance(value, bytes) else None
    except ValueError:
        return False
    return isinstance(key, EllipticCurvePublicKey) and key.curve.name == "secp384r1"


def _public_keys(nodes: Iterable[int], keys: Mapping[int, Keys]) -> ConfigRecord:
    return ConfigRecord({str(node): list(keys[node]) for node in nodes})


def _read_letters(record: ConfigRecord) -> dict[int, bytes]:
    return _pairs(record, Key.DESTINATION_LIST, Key.CIPHERTEXT_LIST)


def _read_shares(record: ConfigRecord) -> dict[int, bytes]:
    return _pairs(record, Key.NODE_ID_LIST, Key.SHARE_LIST)


def _pairs(record: ConfigRecord, nodes: str, contents: str) -> dict[int, bytes]:
    left, right = record.get(nodes), record.get(contents)
    if not (isinstance(left, list) and isinstance(right, list) and len(left) == len(right)):
        raise FedveilError(f"its answer has no lists {nodes!r} and {contents!r} of one length")
    if not all(isinstance(content, bytes) for content in right):
        raise FedveilError(f"its answer's {contents!r} are not all bytes")
    return dict(zip(cast("list[int]", left), cast("list[bytes]", right), strict=True))


def _addressed_to(node: int, letters: Mapping[int, Mapping[int, bytes]]) -> ConfigRecord:
    came = {source: sent[node] for source, sent in letters.items() if node in sent}
    record = ConfigRecord({Key.SOURCE_LIST: list(came), Key.CIPHERTEXT_LIST: list(came.values())})
    return at_stage(Stage.COLLECT_MASKED_VECTORS, record)
