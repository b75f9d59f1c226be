"""Files that are either whole or not there, and directories for results."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedveil.errors import FedveilError

UNFINISHED = "unfinished"
"""Folder in an audit's ``--out`` that holds what is done, until all of it is."""


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a crash at any point, sees the old or the new one whole.

    Args:
        path: Destination; its folder must exist.
        content: Whole content.
        mode: Permission bits, less the umask; in force before the first byte is written.

    Raises:
        OSError: As of the file system (no space, no permission); nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def json_bytes(content: Any) -> bytes:
    """Return the content of a JSON file."""
    return (json.dumps(content, indent=1) + "\n").encode()


def write_results(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files into the user's ``--out``, in this order, each whole or not at all.

    Args:
        out: The directory; made where it is not there.
        files: Name to content.

    Raises:
        FedveilError: The directory cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(out / name, content)
    except OSError as error:
        raise FedveilError(
            f"--out {out} could not be written: {error.strerror}; make room, mend the "
            "permissions or name another directory"
        ) from error


def check_directory(path: Path, *, new: bool = False) -> None:
    """Refuse a directory for results that could not be made or written; nothing is made yet.

    Args:
        path: The user's ``--out``.
        new: Refuse one that holds something, too.

    Raises:
        FedveilError: A file is in the way, it may not be written, or it is not empty.
    """
    nearest = path.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise FedveilError(f"--out {path}: {nearest} is a file; name a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FedveilError(
            f"--out {path}: {nearest} may not be written; mend its permissions, or name another "
            "directory"
        )
    if new and path.exists() and any(path.iterdir()):
        raise FedveilError(f"--out {path} is not empty; name a new directory")
