"""What a node's updates have spent of its images' privacy, in all runs together."""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedveil.defenses.dp_sgd import spent_together
from fedveil.deployment.policy import PolicyError
from fedveil.errors import FedveilError


@dataclass(frozen=True)
class Release:
    """One answer that leaves the node, noted before it is made.

    Attributes:
        run: Flower's number of the run.
        message: Flower's name of the message.
        noise: Noise multiplier of DP-SGD.
        rate: Part of the images a step takes, in (0, 1].
        steps: Steps of local training.
    """

    run: int
    message: str
    noise: float
    rate: float
    steps: int


class Ledger:
    """A node's account of releases, one JSON line each, in a file of its own.

    A release is written and flushed to disk before the training it stands for begins: after a kill
    it counts, whether its answer left or not, and a message that comes again counts again.

    Args:
        path: The file; made with the first release.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def releases(self) -> list[Release]:
        """Return all releases, the oldest first.

        Raises:
            FedveilError: A line is damaged; what was spent cannot be told without it.
        """
        if not self._path.exists():
            return []
        found = []
        for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                del entry["date"]
                found.append(Release(**entry))
            except (ValueError, TypeError, KeyError) as error:
                raise FedveilError(
                    f"ledger {self._path}, line {number}: {error}; what was spent cannot be told. "
                    "Restore the line; to take it out is to forget what it spent"
                ) from None
        return found

    def spent(self, delta: float) -> float:
        """Return ε of all releases together, for one image added or removed."""
        return _epsilon(self.releases(), delta)

    def spend(self, release: Release, *, most: float, delta: float) -> float:
        """Note a release, unless it exceeds what is left.

        Args:
            release: What is about to be made.
            most: ε of all releases together at most.
            delta: δ of the same.

        Returns:
            ε spent with it.

        Raises:
            PolicyError: It would exceed ``most``; nothing is noted.
            FedveilError: The ledger is damaged or cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise FedveilError(f"ledger {self._path}: {error.strerror}") from None
        with os.fdopen(descriptor, "ab", buffering=0) as file:
            # Two messages at once must not each see what the other has not spent yet.
            fcntl.flock(file, fcntl.LOCK_EX)
            before = self.releases()
            epsilon = _epsilon([*before, release], delta)
            if not epsilon <= most:
                raise PolicyError(
                    f"the site's policy allows epsilon {most:g} over all runs (delta {delta:g}); "
                    f"{_epsilon(before, delta):.2f} is spent, and with this answer it would be "
                    f"{epsilon:.2f}"
                )
            entry = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **asdict(release)}
            file.write((json.dumps(entry) + "\n").encode())
            os.fsync(file.fileno())
        return epsilon


def _epsilon(releases: Sequence[Release], delta: float) -> float:
    return spent_together(
        [(release.noise, release.rate, release.steps) for release in releases], delta=delta
    )
