"""A client's part of SecAgg+, and the arithmetic both sides share.

Keys, shares and their secrecy are Flower's own mod; only the third of the four stages is not. There
that mod reads the records of Flower's legacy clients, rounds at random, and stretches a mask from
32 bits of its seed by the Mersenne Twister (flwrlabs/flower#7522), which whoever holds the masked
vector can search; here a mask is the key stream of a cipher under the whole seed.
"""

import json
import math
from base64 import urlsafe_b64decode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    check_configs,
    check_stage,
    secaggplus_mod,
)
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import (
    RECORD_KEY_CONFIGS,
    RECORD_KEY_STATE,
    Key,
    Stage,
)
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_separate
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from numpy.typing import NDArray

from fedveil.errors import FedveilError
from fedveil.sealing import derive_key
from fedveil.wording import quantity

MASKED = "masked"
"""Name of the one array of a masked answer, int32 [D + 1]: the change, and the loss."""

MOST_EXAMPLES = "most_examples"
"""Key of the first stage's record: for how many images a client counts at most."""

ROUND = "round"
"""Key of the first stage's record: the round."""

ROSTER = "roster"
"""Record of the second stage: under ``members`` the digest of each client's node and keys."""

_STORY = "fedveil.secagg"

INSISTS = "require-secure-aggregation"
"""Key of a node config: this node answers no training but under secure aggregation."""

WORDS = "words"
"""Name of the one array of an answer whose whole numbers are summed as they are, int64 [L]."""

STATISTICS = "statistics"
"""Action of a train message that is answered by ``WORDS``."""

ANSWERS = "answers"
"""Action of a train message that is answered by ``WORDS``, too: what the trained model answers."""

SUMMED = ("train", f"train.{STATISTICS}", f"train.{ANSWERS}")
"""Kinds of messages that may ask for an answer in a sum; others are answered in the clear."""

Floats = NDArray[np.float64]
Words = NDArray[np.uint32] | NDArray[np.uint64]
Tensors = Mapping[str, NDArray[Any]]

FEWEST = 3
"""Clients of a sum: one of two would be no secret between the two."""

_MODULUS = 2**32
_LARGEST_LOSS = 1024.0
_LARGEST_LIMIT = 1e6


@dataclass(frozen=True)
class FixedPoint:
    """Real numbers as integers modulo 2³², such that a weighted mean of them comes out of a sum.

    Client k sends wₖ·xₖ rounded to a multiple of ``step``, where its weight wₖ is its part of the
    round's images. Since the weights add up to 1 at most, no sum leaves the range, and the mean of
    K clients whose weights add up to W is off by K·step/(2·W) at most: for 10 clients and a limit
    of 16, 3.7e-8. Rounding is to nearest, without a draw: the same clients give the same bits.

    Attributes:
        limit: Largest |x|.
        clients: K.
    """

    limit: float
    clients: int

    @property
    def step(self) -> float:
        """What one unit of the integers is worth; half a unit a client is kept for rounding."""
        return self.limit / (_MODULUS // 2 - self.clients)

    def encode(self, weighted: Floats) -> Words:
        """Return weighted numbers as integers, uint32 of the same shape."""
        return np.rint(weighted / self.step).astype(np.int64).astype(np.uint32)

    def decode(self, total: NDArray[np.uint32]) -> Floats:
        """Return what a sum of such integers stands for, float64 of the same shape."""
        return total.view(np.int32).astype(np.float64) * self.step

    def error(self, weight: float) -> float:
        """Return the bound on the error of a mean of clients whose weights add up to ``weight``."""
        return self.clients * self.step / (2 * weight)


def mask(seed: bytes, length: int, word: str = "<u4") -> Words:
    """Return the mask of a seed: the key stream of AES-256 in counter mode, uint32 [length].

    No seed serves twice, so the counter may start at 0.

    Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    CCS 2017, section 3 (a PRG by AES in counter mode).

    Args:
        seed: 32 bytes, or those in URL-safe base 64, as Flower gives the key two clients share.
        length: Number of words.
        word: ``<u4``, or ``<u8`` for uint64.
    """
    key = seed if len(seed) == 32 else urlsafe_b64decode(seed)
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(int(word[-1]) * length)), dtype=word)


def pairwise_mask(
    own_private: bytes, other_public: bytes, story: bytes, length: int, word: str = "<u4"
) -> Words:
    """Return the mask that two clients share, from one's private and the other's public key.

    It depends on what the two were told, so that masks of clients that a server told different
    things do not cancel, and their sum stays hidden.

    Args:
        own_private: Of either of the two, PEM.
        other_public: Of the other one, PEM.
        story: As ``story_of`` returns it.
        length: Number of words.
        word: As of ``mask``.
    """
    private, public = bytes_to_private_key(own_private), bytes_to_public_key(other_public)
    shared = urlsafe_b64decode(generate_shared_key(private, public))
    return mask(derive_key(shared, f"secagg mask v2 {story.hex()}"), length, word)


@dataclass(frozen=True)
class Sum:
    """The sum that a client's answer will be part of, as all of its clients were told.

    Attributes:
        clients: How many it is of.
        images: How many images they have.
    """

    clients: int
    images: int


def announced_sum(message: Message, context: Context) -> Sum | None:
    """Return the sum that the answer to a message goes into; None where it will be seen alone."""
    if RECORD_KEY_CONFIGS not in message.content.config_records:
        return None
    told = context.state.config_records[_STORY]
    images = int(cast("float", told[Key.MAX_WEIGHT]))
    return Sum(cast("int", told[Key.SAMPLE_NUMBER]), images)


def member(node: int, keys: tuple[bytes, bytes]) -> bytes:
    """Return the digest of a client in a round's roster: of its node and public keys."""
    parts = (str(node).encode(), *keys)
    return sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()


def story_of(setup: ConfigRecord, roster: Sequence[bytes]) -> bytes:
    """Return the SHA-256 digest of what a round's clients were told.

    Args:
        setup: The record of the first stage; the name of the stage does not count.
        roster: As ``member`` makes it of each client of the round.
    """
    told = {key: value for key, value in setup.items() if key != Key.STAGE}
    content = json.dumps(told, sort_keys=True).encode() + b"".join(sorted(roster))
    return sha256(content).digest()


def floating(tensors: Tensors) -> list[str]:
    """Return the names of the tensors a vector holds, in its order; counters stay as sent."""
    return sorted(name for name, x in tensors.items() if np.issubdtype(x.dtype, np.floating))


def secure_aggregation_mod(
    message: Message, context: Context, call_next: ClientAppCallable
) -> Message:
    """Answer the four stages of SecAgg+; train in the third, and return the change masked.

    Comes before every mod that changes an update, so that what leaves is masked last. Whatever
    other record an app's answer holds stays on the client. An answer of ``WORDS`` alone is summed
    as it is, modulo 2⁶⁴, and any other as a weighted change of what was sent.

    Source: Bonawitz et al. 2017, figure 4, against a server that follows the protocol; Bell et al.,
    "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020, section 3.

    Raises:
        FedveilError: The server asks for what would let it see this client's change; or the change
            cannot be summed; or this node takes no message without secure aggregation.
    """
    record = message.content.config_records.get(RECORD_KEY_CONFIGS)
    if message.metadata.message_type not in SUMMED or record is None:
        _check_permitted(message, context)
        return call_next(message, context)
    stage = str(record.get(Key.STAGE))
    if stage == Stage.COLLECT_MASKED_VECTORS:
        return _collect(message, context, record, call_next)
    if stage == Stage.SETUP:
        _check_setup(record)
        # Of a round this client did not see the end of.
        _forget(context)
        told = {key: value for key, value in record.items() if key != Key.STAGE}
        context.state.config_records[_STORY] = ConfigRecord(told)
    if stage == Stage.SHARE_KEYS:
        _note_roster(message, context, record)
    if stage == Stage.UNMASK:
        _check_unmask(record)
    reply = secaggplus_mod(message, context, call_next)
    if stage == Stage.UNMASK:
        # Whoever takes this node over later finds no key of a round that is over.
        _forget(context)
    return reply


def _forget(context: Context) -> None:
    for key in (RECORD_KEY_STATE, _STORY):
        if key in context.state:
            del context.state[key]


def _note_roster(message: Message, context: Context, record: ConfigRecord) -> None:
    """Keep the digest of what this client was told; each neighbour must be in the roster."""
    roster = message.content.config_records.get(ROSTER)
    members = roster.get("members") if roster else None
    if not isinstance(members, list) or not all(isinstance(one, bytes) for one in members):
        raise FedveilError("the server names no roster of the round; it must be of this version")
    listed = cast("list[bytes]", members)
    if len(set(listed)) != len(listed) or len(listed) < FEWEST:
        raise FedveilError(
            f"the round's roster has {len(set(listed))} clients in {len(listed)} places; allowed: "
            f"{FEWEST} and more, each once"
        )
    for node, keys in record.items():
        if node == Key.STAGE:
            continue
        pair = cast("list[bytes]", keys)
        if member(int(node), (pair[0], pair[1])) not in listed:
            raise FedveilError(f"node {node}'s keys are not those of the round's roster")
    setup = context.state.config_records[_STORY]
    setup["digest"] = story_of(setup, listed)


def _check_permitted(message: Message, context: Context) -> None:
    is_training = message.metadata.message_type.partition(".")[0] == "train"
    if is_training and context.node_config.get(INSISTS):
        raise FedveilError(
            f"this node's config has {INSISTS}, and the server asked for an update of its own; "
            "train with --secure-aggregation"
        )


def _check_setup(record: ConfigRecord) -> None:
    shares, threshold = record.get(Key.SHARE_NUMBER), record.get(Key.THRESHOLD)
    if not (isinstance(shares, int) and isinstance(threshold, int) and threshold >= FEWEST):
        raise FedveilError(
            f"{threshold!r} clients would do for a sum; hiding an update takes at least {FEWEST}"
        )
    images, clients = record.get(Key.MAX_WEIGHT), record.get(Key.SAMPLE_NUMBER)
    most = record.get(MOST_EXAMPLES)
    whole = all(type(value) is int and value > 0 for value in (clients, most))
    if not whole or type(images) is not float or not 0 < images <= clients * most:  # type: ignore[operator]
        raise FedveilError(
            f"the round is said to hold {images!r} images of {clients!r} clients with {most!r} at "
            "most; with more than that every other client would be rounded to nothing"
        )
    limit = record.get(Key.CLIPPING_RANGE)
    if type(limit) is not float or not 0 < limit <= _LARGEST_LIMIT:
        raise FedveilError(f"a change of {limit!r} is to be summed; allowed: to {_LARGEST_LIMIT:g}")
    # With less, a server could tell one half that a client is gone, and the other that it is not.
    if 2 * threshold <= shares:
        raise FedveilError(
            f"{threshold} of {shares} key shares would undo a mask; it must take more than half"
        )


def _check_unmask(record: ConfigRecord) -> None:
    keys = (Key.ACTIVE_NODE_ID_LIST, Key.DEAD_NODE_ID_LIST)
    named = Counter(node for key in keys for node in cast("list[int]", record[key]))
    if twice := sorted(node for node, times in named.items() if times > 1):
        raise FedveilError(
            f"the server names nodes {twice} twice among those present and gone; an answer could "
            "undo both masks of a client, or leave one alone in the sum"
        )


def _collect(
    message: Message, context: Context, record: ConfigRecord, call_next: ClientAppCallable
) -> Message:
    state = SecAggPlusState(**dict(context.state.config_records.get(RECORD_KEY_STATE) or {}))
    check_stage(state.current_stage, record)
    check_configs(Stage.COLLECT_MASKED_VECTORS, record)
    state.current_stage = Stage.COLLECT_MASKED_VECTORS
    partners = _take_shares(state, record)
    # Read first: an app may overwrite the very record it received.
    sent = _arrays(message, among_others=True)
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    metrics = _metrics(reply)
    told = context.state.config_records[_STORY]
    returned, most = _arrays(reply), cast("int", told[MOST_EXAMPLES])
    if (words := _whole(returned)) is None:
        code = FixedPoint(state.clipping_range, state.sample_num)
        words = code.encode(_weighted(state, sent, returned, metrics, most=most))
    masked = _masked(state, partners, cast("bytes", told["digest"]), words)
    context.state.config_records[RECORD_KEY_STATE] = ConfigRecord(state.to_dict())
    said = {key: metrics[key] for key in ("num-examples", "server-round") if key in metrics}
    content = RecordDict(
        {
            "arrays": ArrayRecord({MASKED: Array(masked.view(f"i{masked.itemsize}"))}),
            "metrics": MetricRecord(said),
        }
    )
    return Message(content, reply_to=message)


def _take_shares(state: SecAggPlusState, record: ConfigRecord) -> list[int]:
    """Keep the shares of the neighbours' keys that came; return the neighbours they are from."""
    sources = cast("list[int]", record[Key.SOURCE_LIST])
    letters = cast("list[bytes]", record[Key.CIPHERTEXT_LIST])
    if (left := len({*sources, state.nid})) < state.threshold:
        raise FedveilError(f"{left} clients are left to share masks; {state.threshold} must")
    for source, letter in zip(sources, letters, strict=True):
        plain = share_keys_plaintext_separate(decrypt(state.ss2_dict[source], letter))
        author, addressee, seed_share, key_share = plain
        if (author, addressee) != (source, state.nid):
            raise FedveilError(
                f"key shares from node {source} to node {state.nid} are in truth from {author} to "
                f"{addressee}"
            )
        state.rd_seed_share_dict[source] = seed_share
        state.sk1_share_dict[source] = key_share
    return sources


def _arrays(message: Message, *, among_others: bool = False) -> dict[str, NDArray[Any]]:
    """Return the one record of arrays; or the model's, where others may come with it."""
    named = message.content.array_records
    model = named.get("arrays") if among_others else None
    records = list(named.values()) if model is None else [model]
    if len(records) != 1:
        raise FedveilError(f"{len(records)} records of arrays; secure aggregation sums exactly one")
    return {name: array.numpy() for name, array in records[0].items()}


def _whole(returned: Tensors) -> Words | None:
    """Return the words of an answer that consists of nothing else."""
    words = returned.get(WORDS)
    if len(returned) != 1 or words is None or words.dtype != np.int64:
        return None
    return words.view(np.uint64)


def _metrics(reply: Message) -> MetricRecord:
    records = list(reply.content.metric_records.values())
    if len(records) != 1:
        raise FedveilError(f"{len(records)} records of metrics; secure aggregation takes one")
    return records[0]


def _weighted(
    state: SecAggPlusState,
    sent: Tensors,
    returned: Tensors,
    metrics: MetricRecord,
    *,
    most: int,
) -> Floats:
    """Return what this client adds to the round's means: its change and its loss, float64 [D + 1].

    Raises:
        FedveilError: The answer is no change of what was sent, is not finite, or is too large.
    """
    shapes = [{name: value.shape for name, value in arrays.items()} for arrays in (sent, returned)]
    if shapes[0] != shapes[1]:
        raise FedveilError("the app's answer has other tensors than the model it was sent")
    parts = [
        _change(returned[name].astype(np.float64), sent[name].astype(np.float64)).ravel()
        for name in floating(sent)
    ]
    change = np.concatenate(parts)
    largest = float(np.abs(change).max(initial=0.0))
    # What is wrong with an update is all that may be told of it, and not by how much.
    if not math.isfinite(largest):
        raise FedveilError("the update holds NaN or infinity, so it was not sent")
    if largest > state.clipping_range:
        raise FedveilError(
            f"the update changes a weight by more than {state.clipping_range:g}, so it was not "
            "sent; raise --largest-change or lower --learning-rate"
        )
    loss = np.nan_to_num(float(metrics.get("loss", 0.0)), nan=_LARGEST_LOSS)  # type: ignore[arg-type]
    scaled = np.clip(loss, 0.0, _LARGEST_LOSS) * state.clipping_range / _LARGEST_LOSS
    return np.append(change, scaled) * _weight(metrics, state.max_weight, most)


def _change(returned: Floats, sent: Floats) -> Floats:
    # Infinities of the model's own have no difference, and no change either.
    same = returned == sent
    return np.subtract(returned, sent, out=np.zeros_like(sent), where=~same)


def _weight(metrics: MetricRecord, total: float, most: int) -> float:
    examples = metrics.get("num-examples")
    if type(examples) is not int or examples < 1:
        raise FedveilError(f"num-examples is {examples!r}; allowed: 1 and more")
    counted = min(examples, most)
    if counted > total:
        raise FedveilError(
            f"this client counts for {quantity(counted, 'image')}, and the round is said to "
            f"hold {total:g}"
        )
    return counted / total


def _masked(state: SecAggPlusState, partners: list[int], story: bytes, words: Words) -> Words:
    word, length = f"<u{words.itemsize}", len(words)
    total: Words = words + mask(state.rd_seed, length, word)
    for node in partners:
        public = state.public_keys_dict[node][0]
        shared = pairwise_mask(state.sk1, public, story, length, word)
        total = total + shared if state.nid > node else total - shared
    return total


def mean_loss(scaled: float, limit: float) -> float:
    """Return the loss that the last number of a mean of vectors stands for.

    Args:
        scaled: The number, in [0, limit].
        limit: Of the ``FixedPoint`` the mean was taken in.
    """
    return scaled * _LARGEST_LOSS / limit
