"""Content encrypted at rest, and the operator's key that it is encrypted under.

``FEDVEIL_KEY_FILE`` names the file of the key. It stays with the operator: a run's directory holds
its own noise key sealed under it, and every other secret of the run sealed under the noise key, so
that a change of the operator's key writes one small file a run.
"""

import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedveil.errors import FedveilError
from fedveil.files import write_atomically

KEY_FILE = "FEDVEIL_KEY_FILE"
KEY_BYTES = 32

_FORMAT_BYTES = 8
_NAME_BYTES = 8
_NONCE_BYTES = 12
_LARGEST_FILE = 4_096
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class UnknownFormatError(Exception):
    """The content is nothing that was sealed in this format."""


class OtherKeyError(Exception):
    """The content was sealed under another key."""


class DamagedError(Exception):
    """The content was changed, or was sealed to stand elsewhere."""


def derive_key(secret: bytes, purpose: str) -> bytes:
    """Return the 32 bytes of a key for one purpose, by HKDF-SHA256 (RFC 5869).

    Args:
        secret: 32 bytes.
        purpose: Keys of different purposes say nothing about each other.
    """
    info = f"fedveil {purpose}".encode()
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


class Seal:
    """Encrypts and authenticates content by AES-256-GCM (NIST SP 800-38D).

    Sealed content is 8 bytes that name the format, 8 that name the key, a random nonce of 12, and
    the ciphertext with its tag. Both names are authenticated, too.

    Args:
        secret: 32 bytes, from which the key and its name are derived.
        form: Name of the format; 8 bytes.
        purpose: What is sealed; keys are derived for it alone.
    """

    def __init__(self, secret: bytes, *, form: bytes, purpose: str) -> None:
        name = derive_key(secret, f"{purpose} key name v1")[:_NAME_BYTES]
        self._head = form + name
        self._cipher = AESGCM(derive_key(secret, f"{purpose} v1"))

    def close(self, content: bytes, *, place: bytes) -> bytes:
        """Return the content sealed.

        Args:
            content: Any bytes.
            place: Where it is to stand; ``open`` must be given the same.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return self._head + nonce + self._cipher.encrypt(nonce, content, self._head + place)

    def open(self, sealed: bytes, *, place: bytes) -> bytes:
        """Return what was sealed.

        Raises:
            UnknownFormatError: It is of no or another format.
            OtherKeyError: It was sealed under another key.
            DamagedError: It was changed, or sealed for another place.
        """
        head, rest = sealed[: len(self._head)], sealed[len(self._head) :]
        if head[:_FORMAT_BYTES] != self._head[:_FORMAT_BYTES]:
            raise UnknownFormatError
        if head != self._head:
            raise OtherKeyError
        try:
            return self._cipher.decrypt(rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], head + place)
        except (InvalidTag, ValueError):
            raise DamagedError from None


@dataclass(frozen=True)
class OperatorKey:
    """The operator's key, and the file it came from.

    Attributes:
        path: The file.
        secret: 32 bytes; in no ``repr``, and so in no traceback or log.
    """

    path: Path
    secret: bytes = field(repr=False)

    @classmethod
    def make(cls, path: Path) -> "OperatorKey":
        """Draw a key and write it to a new file as 64 hexadecimal digits, mode 0600.

        Raises:
            FedveilError: The file is there already, or cannot be written.
        """
        if path.exists():
            raise FedveilError(
                f"{path} exists, and what is encrypted under it would be lost; name a new file"
            )
        key = cls(path, secrets.token_bytes(KEY_BYTES))
        try:
            write_atomically(path, (key.secret.hex() + "\n").encode("ascii"), mode=0o600)
        except OSError as error:
            raise FedveilError(f"{path} could not be written: {error.strerror}") from None
        return key

    @classmethod
    def read(cls, path: Path, *, option: str) -> "OperatorKey":
        """Read a key that only its owner may read.

        Args:
            path: The file.
            option: What the user knows it by, for messages.

        Raises:
            FedveilError: It is missing, open to others, or holds anything but a key.
        """
        try:
            with path.open("rb") as stream:
                mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
                content = stream.read(_LARGEST_FILE)
        except OSError as error:
            raise FedveilError(
                f"{option} {path} cannot be read: {error.strerror}; make a key with fedveil key "
                "make FILE, or name the file of yours"
            ) from None
        if mode & _OTHERS:
            raise FedveilError(
                f"{option} {path} has mode {mode:04o}, open to other users of this machine; "
                f"chmod 600 {path}"
            )
        try:
            secret = bytes.fromhex(content.decode("ascii"))
        except ValueError:
            secret = b""
        if len(secret) != KEY_BYTES:
            raise FedveilError(
                f"{option} {path} holds no key: {2 * KEY_BYTES} hexadecimal digits and nothing "
                "else; make one with fedveil key make FILE"
            )
        return cls(path, secret)

    @classmethod
    def from_environment(cls) -> "OperatorKey | None":
        """Read the key ``FEDVEIL_KEY_FILE`` names; ``None`` where the variable is not set.

        Raises:
            FedveilError: The variable is empty, or as of ``read``.
        """
        named = os.environ.get(KEY_FILE)
        if named is None:
            return None
        if not named:
            raise FedveilError(
                f"{KEY_FILE} is set and empty; give it the path of a key file, or unset it to keep "
                "secrets unencrypted"
            )
        return cls.read(Path(named), option=KEY_FILE)
