"""What each client was sent in each round, kept on the server and encrypted at rest.

Of copies that differ by their clients' fingerprints alone only the model they share is stored; the
fingerprints follow from the key.

A file a round, ``archive/000012.enc``: the round's tensors in the safetensors format, sealed under
a key derived from the run's noise key and bound to the round, so that no file can stand in for
another.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedveil.copies.fingerprint import Fingerprint
from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.files import write_atomically
from fedveil.sealing import DamagedError, OtherKeyError, Seal, UnknownFormatError
from fedveil.types import Copy, Weights

_FORMAT = b"FVARCH1\n"
_NAME = re.compile(r"(\d{6,})\.enc")


@dataclass(frozen=True)
class Entry:
    """What one round sent to whom.

    Attributes:
        round: The round, from 1.
        copies: The distinct models, before any fingerprint.
        assignment: Which of them each client, named by its partition, was sent.
        fingerprint: What was added to each client's; ``None`` where nothing was.
    """

    round: int
    copies: tuple[Weights, ...]
    assignment: Mapping[int, int]
    fingerprint: Fingerprint | None = None

    def received(self, client: int) -> Copy:
        """Return what a client of this round was sent."""
        weights = self.copies[self.assignment[client]]
        if self.fingerprint:
            weights = self.fingerprint.apply(weights, round_number=self.round, client=client)
        return Copy(self.round, client, weights)


class Archive:
    """The archive of one run.

    Args:
        folder: Folder of the archive; it exists.
        key: The run's secret key, from which the key of the archive is derived.
    """

    def __init__(self, folder: Path, key: NoiseKey) -> None:
        self.folder = folder
        self._key = key
        self._seal = Seal(key.secret, form=_FORMAT, purpose="archive")

    @classmethod
    def create(cls, directory: Path, key: NoiseKey) -> "Archive":
        """Return the archive in a run's directory, made where there is none yet.

        Raises:
            FedveilError: It cannot be made.
        """
        folder = directory / "archive"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise FedveilError(f"{folder} could not be made: {error.strerror}") from None
        return cls(folder, key)

    @classmethod
    def open(cls, directory: Path, key: NoiseKey) -> "Archive":
        """Return the archive in the directory of an earlier run.

        Raises:
            FedveilError: The run kept none.
        """
        if not (directory / "archive").is_dir():
            raise FedveilError(
                f"{directory} holds no archive of what its clients were sent; it is kept by "
                "fedveil train unless --no-archive is given"
            )
        return cls(directory / "archive", key)

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds whose models left the server, in order.

        The last may be one that was cut short: its models left, and nothing came back. A resumed
        run sends them again, the same ones, and writes the entry anew.
        """
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return tuple(sorted(int(name[1]) for name in names if name))

    def received(self, client: int) -> Iterator[Copy]:
        """Yield the models a client was sent, round by round.

        Args:
            client: The client's partition.

        Raises:
            FedveilError: A file is damaged, or of another key or round.
        """
        for entry in self:
            if client in entry.assignment:
                yield entry.received(client)

    def __iter__(self) -> Iterator[Entry]:
        """Yield what each round sent; raises as ``read`` does."""
        return map(self.read, self.rounds)

    def write(self, entry: Entry) -> None:
        """Write a round down, before its models leave the server.

        Raises:
            FedveilError: It could not be written; an earlier file is left whole.
        """
        path = self._path(entry.round)
        sealed = self._seal.close(_packed(entry), place=_place(entry.round))
        try:
            write_atomically(path, sealed, mode=0o600)
        except OSError as error:
            raise FedveilError(
                f"{path} could not be written: {error.strerror}; make room or mend the "
                "permissions, then fedveil train --resume; --no-archive of a new run does without"
            ) from error

    def read(self, number: int) -> Entry:
        """Return what one round sent.

        Raises:
            FedveilError: The file is missing or damaged, or of another key or round.
        """
        path = self._path(number)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise FedveilError(f"{path} cannot be read: {error.strerror}") from None
        try:
            return _unpacked(self._seal.open(content, place=_place(number)), self._key)
        except UnknownFormatError:
            raise FedveilError(
                f"{path} is no file of an archive, or its beginning is damaged"
            ) from None
        except OtherKeyError:
            raise FedveilError(
                f"{path} was written with another key; the run's own noise.key opens it"
            ) from None
        except (DamagedError, ValueError, KeyError, TypeError, SafetensorError):
            raise FedveilError(
                f"{path} is damaged, or belongs to another round; restore it from a copy"
            ) from None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.enc"


def _place(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _packed(entry: Entry) -> bytes:
    """Return the round in the safetensors format, tensors that copies share stored once."""
    stored: dict[str, Tensor] = {}
    copies = [{name: _store(stored, value) for name, value in c.items()} for c in entry.copies]
    described = {
        "round": entry.round,
        "copies": copies,
        "assignment": sorted(entry.assignment.items()),
        "fingerprint": _described(entry.fingerprint),
    }
    return save(stored, metadata={"entry": json.dumps(described)})


def _described(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
    if fingerprint is None:
        return None
    return {
        "strength": fingerprint.strength,
        "layers": fingerprint.layers,
        "run": fingerprint.run,
    }


def _store(stored: dict[str, Tensor], value: Tensor) -> str:
    value = value.detach().cpu().contiguous()
    digest = sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.numpy().tobytes())
    name = digest.hexdigest()
    # A clone, because safetensors refuses tensors that share one storage.
    stored.setdefault(name, value.clone())
    return name


def _unpacked(content: bytes, key: NoiseKey) -> Entry:
    length = int.from_bytes(content[:8], "little")
    described = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["entry"])
    stored, mark = load(content), described["fingerprint"]
    return Entry(
        round=int(described["round"]),
        copies=tuple(
            {name: stored[digest] for name, digest in copy.items()} for copy in described["copies"]
        ),
        assignment={int(client): int(copy) for client, copy in described["assignment"]},
        fingerprint=mark
        and Fingerprint(
            key, float(mark["strength"]), tuple(map(tuple, mark["layers"])), str(mark["run"])
        ),
    )
