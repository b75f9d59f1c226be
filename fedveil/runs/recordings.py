"""Exchanges between a server and its clients on disk, encrypted: what an audit of any app reads."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedveil.errors import FedveilError
from fedveil.files import write_atomically
from fedveil.sealing import DamagedError, OperatorKey, OtherKeyError, Seal, UnknownFormatError

RECORD_KEY_FILE = "FEDVEIL_RECORD_KEY_FILE"
"""Environment variable with the path of the key; while it is not set, nothing is recorded."""

_FORM, _PURPOSE = b"fvrecrd1", "recorded exchange"
_NAME = re.compile(r"round-(?P<round>\d{6})-client-(?P<client>\d+)\.rec\.enc")
_SENT, _RETURNED, _IMAGES, _ABOUT = "sent/", "returned/", "images", "about"


@dataclass(frozen=True)
class Exchange:
    """One round between the server and one client.

    Attributes:
        server_round: The round, from 1.
        client: Number of the client: its partition, or Flower's node id.
        sent: The model that went out, by name.
        returned: The model that came back, under the same names.
        examples: How many images it was trained on, as the client says.
        images: Float or uint8 [M, C, H, W], what the client's model was given, in the order in
            which it first met them; None where only messages were recorded.
    """

    server_round: int
    client: int
    sent: Mapping[str, Tensor]
    returned: Mapping[str, Tensor]
    examples: int
    images: Tensor | None = None


def recording_key() -> OperatorKey | None:
    """Return the key that recordings are encrypted under; None: nothing is to be recorded.

    Raises:
        FedveilError: The variable names no key.
    """
    named = os.environ.get(RECORD_KEY_FILE)
    return OperatorKey.read(Path(named), option=RECORD_KEY_FILE) if named else None


def write_exchange(directory: Path, exchange: Exchange, key: OperatorKey) -> Path:
    """Encrypt an exchange into ``directory``, which is made where it is not there, mode 0700.

    Raises:
        FedveilError: It cannot be written.
    """
    tensors = {_SENT + name: value for name, value in exchange.sent.items()}
    tensors |= {_RETURNED + name: value for name, value in exchange.returned.items()}
    if exchange.images is not None:
        tensors[_IMAGES] = exchange.images
    about = {
        "round": exchange.server_round,
        "client": exchange.client,
        "examples": exchange.examples,
    }
    own = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    content = save(own, metadata={_ABOUT: json.dumps(about)})
    path = directory / f"round-{exchange.server_round:06}-client-{exchange.client}.rec.enc"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, _seal(key).close(content, place=path.name.encode()), mode=0o600)
    except OSError as error:
        raise FedveilError(
            f"{path} could not be written: {error.strerror}; make room, mend the permissions or "
            "record elsewhere"
        ) from None
    return path


def read_exchanges(directory: Path, key: OperatorKey) -> tuple[Exchange, ...]:
    """Return what was recorded in ``directory``, by round and client.

    Raises:
        FedveilError: It holds no recording, one under another key, or a damaged one.
    """
    try:
        files = sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    except OSError as error:
        raise FedveilError(f"--recorded {directory} cannot be read: {error.strerror}") from None
    if not files:
        raise FedveilError(
            f"--recorded {directory} holds no recording: put record_messages({str(directory)!r}) "
            f"first among the ClientApp's mods, and the path of a key into {RECORD_KEY_FILE}"
        )
    return tuple(_read(path, key) for path in files)


def _seal(key: OperatorKey) -> Seal:
    return Seal(key.secret, form=_FORM, purpose=_PURPOSE)


def _read(path: Path, key: OperatorKey) -> Exchange:
    try:
        content = _seal(key).open(path.read_bytes(), place=path.name.encode())
        tensors, about = load(content), _about(content)
    except OtherKeyError:
        raise FedveilError(
            f"{path} was recorded under another key than {key.path}; name that one in "
            f"{RECORD_KEY_FILE}"
        ) from None
    except (DamagedError, UnknownFormatError, SafetensorError, ValueError):
        raise FedveilError(f"{path} is damaged, or no recording; leave it out") from None
    except OSError as error:
        raise FedveilError(f"{path} cannot be read: {error.strerror}") from None
    return Exchange(
        about["round"],
        about["client"],
        _part(tensors, _SENT),
        _part(tensors, _RETURNED),
        about["examples"],
        tensors.get(_IMAGES),
    )


def _about(content: bytes) -> dict[str, int]:
    length = int.from_bytes(content[:8], "little")
    told: dict[str, int] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_ABOUT])
    return told


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
