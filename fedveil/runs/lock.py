"""One process at a time on a run."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fedveil.errors import FedveilError

_PATIENCE = 5.0  # seconds: what a killed process left behind takes a moment to go


@contextmanager
def lock(path: Path, *, named: str) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system lets go of it when the process ends.

    A file that is left behind locks nothing. On a file system without locks (some network ones) it
    cannot be told whether another process is there, and that is said.

    Args:
        path: The lock's file, made if need be.
        named: What is locked, for the message.

    Raises:
        FedveilError: Another process holds it, or there are no locks.
    """
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise FedveilError(f"{path}: {error.strerror}") from None
    with file:
        _take(file.fileno(), path, named)
        file.truncate(0)
        held = {
            "process": os.getpid(),
            "host": platform.node(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        file.write(json.dumps(held))
        file.flush()
        yield


def _take(descriptor: int, path: Path, named: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            raise FedveilError(
                f"{named} is in use by {_holder(path)}; wait for it, or end it"
            ) from None
        except OSError as error:
            raise FedveilError(
                f"{path} cannot be locked ({error.strerror}), so two processes could train at "
                "once; put the run on a file system that has locks"
            ) from None
        return


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return f"process {held['process']} on {held['host']} since {held['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
