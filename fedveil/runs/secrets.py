"""The secret files of a run's directory: 0600, and encrypted where the operator gave a key.

A run that was started with ``FEDVEIL_KEY_FILE`` holds ``noise.key.enc``, the noise key sealed under
the operator's, and its other secrets as ``….enc``, sealed under the noise key and bound to their
names. One started without holds the same files in the clear, without the ``.enc``.

The sealed key is bound to the run's configuration and to its identity, a random name in
``config.json``, and the files to the identity: an edited configuration opens nothing, and neither
does another run's file, though the runs share a noise key. Runs of before that, which have no
identity, are bound to the names of their files only.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.files import write_atomically
from fedveil.sealing import (
    KEY_FILE,
    DamagedError,
    OperatorKey,
    OtherKeyError,
    Seal,
    UnknownFormatError,
)

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
DISTILLED = "distilled.safetensors"
_KEY = "noise.key"
_SEALED = ".enc"
_MODE = 0o600
_FORMAT = b"FVSEAL1\n"


class RunSecrets:
    """The secret files of one run.

    Args:
        directory: The run's directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def check(self) -> None:
        """Refuse a configuration that is not the one the operator's key was bound to.

        Nothing is checked where the run is not encrypted, or the operator's key is not at hand:
        then nobody can tell, and nothing secret can be read either.

        Raises:
            FedveilError: It is another, or the key is another or damaged.
        """
        if self.sealed and OperatorKey.from_environment():
            self.noise_key()

    @property
    def sealed(self) -> bool:
        """Whether the run's secrets are encrypted."""
        return (self.directory / (_KEY + _SEALED)).is_file()

    def path(self, name: str) -> Path:
        """Return where a secret is, or would be."""
        return self.directory / (name + _SEALED if self.sealed else name)

    def keep(self, key: NoiseKey, operator: OperatorKey | None) -> None:
        """Write a new run's noise key, which decides whether the run is encrypted.

        Args:
            key: The run's.
            operator: What to seal it under; ``None`` writes it in the clear.

        Raises:
            OSError: It could not be written.
        """
        if operator is None:
            key.save(self.directory / _KEY)
        else:
            sealed = _key_seal(operator).close(key.secret, place=_bound(self.directory))
            write_atomically(self.directory / (_KEY + _SEALED), sealed, mode=_MODE)

    def noise_key(self) -> NoiseKey:
        """Return the run's noise key.

        Raises:
            FedveilError: There is none, or the operator's key is missing or another one.
        """
        path = self.path(_KEY)
        if not path.exists():
            raise FedveilError(
                f"{self.directory} holds no {_KEY}, without which its archive stays closed; name "
                "the --out of an earlier fedveil train"
            )
        self._refuse_plain(_KEY)
        return read_noise_key(path)

    def _refuse_plain(self, name: str) -> None:
        """Refuse what lies in the clear where the operator or the run itself asks for encryption.

        Whoever can write into the directory can put a file there; only an encrypted one tells that
        it is the run's.

        Raises:
            FedveilError: There is such a file.
        """
        plain = self.directory / name
        if not plain.exists():
            return
        if self.sealed:
            raise FedveilError(
                f"{plain} lies in the clear in a run that is encrypted, so it is not the run's; "
                "find out who put it there, and remove it"
            )
        if OperatorKey.from_environment():
            raise FedveilError(
                f"{plain} is not encrypted, and with {KEY_FILE} set nothing in the clear is "
                f"believed; encrypt the run with fedveil key seal {self.directory} if it is yours "
                f"and whole, or unset {KEY_FILE}"
            )

    def check_writable(self) -> None:
        """Refuse to write in the clear while the operator asks for encryption.

        Raises:
            FedveilError: As said, or the operator's key cannot be read.
        """
        if not self.sealed and OperatorKey.from_environment():
            raise FedveilError(
                f"{self.directory} was started without {KEY_FILE}, and its key and models are not "
                f"encrypted; encrypt them with fedveil key seal {self.directory}, or unset "
                f"{KEY_FILE} to go on without"
            )

    def closed(self, name: str, content: bytes) -> bytes:
        """Return the content of a secret file as it is to be written to ``path(name)``."""
        return self._seal.close(content, place=self._place(name)) if self.sealed else content

    def _place(self, name: str) -> bytes:
        identity = _identity(self.directory)
        return name.encode() if identity is None else f"{name}\0{identity}".encode()

    def read(self, name: str) -> bytes | None:
        """Return the content of a secret file; ``None`` where it is not there.

        Raises:
            FedveilError: It cannot be read, is damaged or of another run.
        """
        self._refuse_plain(name)
        path = self.path(name)
        if not path.exists():
            return None
        content = _bytes_of(path)
        if not self.sealed:
            return content
        try:
            return self._seal.open(content, place=self._place(name))
        except OtherKeyError:
            raise FedveilError(
                f"{path} belongs to another run, under whose noise key it was encrypted; restore "
                "this run's own from a copy"
            ) from None
        except (UnknownFormatError, DamagedError):
            raise FedveilError(
                f"{path} is damaged or another run's (it does not decrypt); restore it, or train "
                "anew in another directory"
            ) from None

    def seal(self, operator: OperatorKey) -> tuple[str, ...]:
        """Encrypt what was kept in the clear; cut short at any point, the same call finishes it.

        This is the one door by which files in the clear are believed: look at them first.

        Args:
            operator: The operator's key.

        Returns:
            Names of the files that were taken in.

        Raises:
            FedveilError: A file cannot be read or written, or the run is under another key.
        """
        names, taken = (CHECKPOINT, MODEL, DISTILLED), []
        try:
            if not self.sealed:
                key = NoiseKey.load(self.directory / _KEY)
                for name in filter(lambda name: (self.directory / name).exists(), names):
                    sealed = _file_seal(key).close(
                        _bytes_of(self.directory / name), place=self._place(name)
                    )
                    taken.append(name)
                    write_atomically(self.directory / (name + _SEALED), sealed, mode=_MODE)
                self.keep(key, operator)
                taken.append(_KEY)
            read_noise_key(self.path(_KEY))
            for name in (_KEY, *names):
                (self.directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise _unwritten(self.directory, error) from None
        return tuple(taken)

    def rotate(self, old: OperatorKey, new: OperatorKey) -> None:
        """Put a new operator's key in the place of an old one; nothing but the noise key changes.

        A run that is under the new key already is left as it is.

        Raises:
            FedveilError: The run is not encrypted, or not under ``old``; or as of ``seal``.
        """
        path = self.directory / (_KEY + _SEALED)
        if not self.sealed:
            raise FedveilError(
                f"{self.directory} is not encrypted; encrypt it with fedveil key seal "
                f"{self.directory}"
            )
        if _is_under(new, path):
            return
        try:
            self.keep(_opened(path, old, named=f"--from {old.path}"), new)
        except OSError as error:
            raise _unwritten(self.directory, error) from None

    @cached_property
    def _seal(self) -> Seal:
        # Once: a training run goes on when the operator takes the key away after its start.
        return _file_seal(self.noise_key())


def read_noise_key(path: Path) -> NoiseKey:
    """Read a run's noise key, in the clear or sealed under the operator's key.

    Args:
        path: ``noise.key`` or ``noise.key.enc`` of a run.

    Raises:
        FedveilError: The file is missing or damaged, or the operator's key is missing or another.
    """
    operator = OperatorKey.from_environment()
    if path.suffix != _SEALED:
        if operator is not None and path.exists():
            raise FedveilError(
                f"{path} is not encrypted, and with {KEY_FILE} set nothing in the clear is "
                f"believed; unset {KEY_FILE}, or give the noise.key.enc of an encrypted run"
            )
        return NoiseKey.load(path)
    if operator is None:
        raise FedveilError(
            f"{path} is encrypted; set {KEY_FILE} to the path of the key it was encrypted under"
        )
    return _opened(path, operator, named=f"{KEY_FILE} {operator.path}")


def _opened(path: Path, operator: OperatorKey, *, named: str) -> NoiseKey:
    content, seal = _bytes_of(path), _key_seal(operator)
    try:
        return NoiseKey(_open_key(seal, content, path.parent))
    except OtherKeyError:
        raise FedveilError(
            f"{path} is encrypted under another key than {named}; give the key it was encrypted "
            "under"
        ) from None
    except (UnknownFormatError, DamagedError):
        raise FedveilError(
            f"{path} does not fit {path.parent / 'config.json'}: that was changed since, or either "
            "is damaged or another run's; restore both from a copy"
        ) from None


def _is_under(operator: OperatorKey, path: Path) -> bool:
    try:
        _open_key(_key_seal(operator), _bytes_of(path), path.parent)
    except (OtherKeyError, UnknownFormatError, DamagedError):
        return False
    return True


def _open_key(seal: Seal, content: bytes, directory: Path) -> bytes:
    return seal.open(content, place=_bound(directory))


def _described(directory: Path) -> dict[str, Any]:
    try:
        described: Any = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return described if isinstance(described, dict) else {}


def _identity(directory: Path) -> str | None:
    identity = _described(directory).get("run")
    return identity if isinstance(identity, str) else None


def _bound(directory: Path) -> bytes:
    """Return the place a run's sealed key is bound to: its configuration and identity.

    A run of before there were identities is bound to the key's name.
    """
    described = _described(directory)
    if "run" not in described:
        return _KEY.encode()
    told = {key: described.get(key) for key in ("run", "configuration")}
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":")).encode()
    return _KEY.encode() + b"\0" + hashlib.sha256(canonical).digest()


def _key_seal(operator: OperatorKey) -> Seal:
    return Seal(operator.secret, form=_FORMAT, purpose="run key")


def _file_seal(key: NoiseKey) -> Seal:
    return Seal(key.secret, form=_FORMAT, purpose="run files")


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FedveilError(f"{path} cannot be read: {error.strerror}") from None


def _unwritten(directory: Path, error: OSError) -> FedveilError:
    return FedveilError(
        f"{directory} could not be written: {error.strerror}; make room or mend the permissions, "
        "then give the same command again"
    )
