"""What a run leaves on disk, and from which a killed run goes on.

``config.json``         the whole configuration, and the versions it ran with
``rounds.jsonl``        a line a round
``checkpoint.safetensors``  w, base and the strategy's state after the last whole round (0600)
``noise.key``           the run's secret key (0600)
``releases.jsonl``      under DP-SGD, who was asked for an update in each round that was started
``archive/``            what each client was sent in each round, encrypted under that key
``model.safetensors``   w, once the run is complete (0600)
``distilled.safetensors``  the network that w was taught to, if one was asked for (0600)
``summary.json``, ``curves.png``

With ``FEDVEIL_KEY_FILE`` those of mode 0600 are encrypted, and end in ``.enc``.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedveil import __version__
from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.files import write_atomically
from fedveil.runs.config import TrainConfig
from fedveil.runs.lock import lock
from fedveil.runs.secrets import CHECKPOINT, DISTILLED, MODEL, RunSecrets
from fedveil.sealing import OperatorKey
from fedveil.types import Weights

_SECRET = 0o600
_RELEASES = "releases.jsonl"
_IMAGES = "images"
_COLLAPSE = 0.1  # of accuracy, as in the report
_VERSIONED = ("torch", "flwr", "flwr-datasets", "numpy", "safetensors")


@dataclass(frozen=True)
class RoundRecord:
    """One line of ``rounds.jsonl``.

    Attributes:
        round: Round, from 1.
        accuracy: Accuracy of w after the round, on report images.
        copies: Accuracy of each distinct copy that was distributed, on the same report images,
            none of which σ was calibrated on.
        sigma: Strength of the noise in the copies; 0 where they carried none.
        calibration_evaluations: Evaluations of copies that finding σ took.
        calibration_images: Images those took in all.
        calibration_seconds: Time from the base model to the finished copies.
        seconds: Time of the round, without the report's own evaluations.
        loss: Mean training loss the clients report; None where none does, as under DP-SGD.
        clients: Partitions of the clients whose answers were averaged.
        refused: Answers that were left out, and why.
        bounded: Clients that said they have far more images than the others, and as how many they
            counted.
        calibration: Accuracy of w on all calibration images, by which the best round is chosen;
            None where no round is.
    """

    round: int
    accuracy: float
    copies: tuple[float, ...]
    sigma: float
    calibration_evaluations: int
    calibration_images: int
    calibration_seconds: float
    seconds: float
    loss: float | None
    clients: tuple[int, ...]
    refused: tuple[str, ...] = ()
    bounded: tuple[str, ...] = ()
    calibration: float | None = None


def fallen_from(rounds: Sequence[RoundRecord]) -> RoundRecord | None:
    """Return the round that the last one is far behind of: training collapsed since; else None.

    Args:
        rounds: All so far, from the first.
    """
    if not rounds:
        return None
    best = max(rounds, key=lambda record: record.accuracy)
    return best if best.accuracy - rounds[-1].accuracy >= _COLLAPSE else None


_ROUND = TypeAdapter(RoundRecord)
_RELEASE = TypeAdapter(dict[int, int | None])


@dataclass(frozen=True)
class StrategyState:
    """What a strategy carries from round to round; with the seed, all a resumed run needs.

    Attributes:
        base: The model the next copies are made from.
        sigma: Where the next search for σ starts.
        noisy: Whether the model has passed the cap.
        memory: What else the strategy keeps, by name.
    """

    base: Weights | None = None
    sigma: float = 0.0
    noisy: bool = False
    memory: Weights | None = None


@dataclass(frozen=True)
class BestRound:
    """The round whose w is best on the calibration images.

    Attributes:
        round: Which; the later of two that are alike.
        calibration: Its accuracy on the calibration images.
        weights: Its w.
    """

    round: int
    calibration: float
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The state after a whole round.

    Attributes:
        round: The last round completed; 0 before the first.
        weights: w.
        state: What the strategy carries over.
        best: The best round so far; None where none is chosen.
    """

    round: int
    weights: Mapping[str, Tensor]
    state: StrategyState
    best: BestRound | None = None

    @property
    def delivered(self) -> Mapping[str, Tensor]:
        """The w that would be delivered: of the best round, or of the last."""
        return self.weights if self.best is None else self.best.weights

    @property
    def delivered_round(self) -> int:
        """The round that ``delivered`` is of."""
        return self.round if self.best is None else self.best.round


class RunDirectory:
    """The directory of one training run.

    Args:
        path: Where it is; it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.secrets = RunSecrets(path)

    @classmethod
    def create(
        cls, path: Path, config: TrainConfig, *, noise_key: NoiseKey | None = None
    ) -> "RunDirectory":
        """Start a run in a new or empty directory.

        Args:
            path: Where; made if need be.
            config: Every setting.
            noise_key: A key to use again; a fresh one is drawn where there is none.

        Raises:
            FedveilError: The directory holds something, or cannot be made, or the key that
                ``FEDVEIL_KEY_FILE`` names cannot be read.
        """
        operator = OperatorKey.from_environment()
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(path.iterdir())
        except OSError as error:
            raise FedveilError(f"--out {path}: {error.strerror}") from None
        if occupied:
            raise FedveilError(
                f"--out {path} is not empty; go on with fedveil train --resume {path}, or name a "
                "new directory"
            )
        run = cls(path)
        described = {
            "run": token_hex(16),
            "configuration": config.model_dump(mode="json"),
            "versions": versions(),
        }
        # The configuration first: the sealed key is bound to it.
        run._write("config.json", _json(described))
        try:
            run.secrets.keep(noise_key or NoiseKey.generate(), operator)
        except OSError as error:
            raise FedveilError(f"--out {path}: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open the directory of an earlier run.

        Raises:
            FedveilError: It is none; or it is encrypted, the operator's key is at hand, and the
                configuration is not the one the run's key was bound to.
        """
        if not (path / "config.json").is_file():
            raise FedveilError(
                f"{path} is no run directory: it has no config.json; name the --out of an earlier "
                "fedveil train"
            )
        run = cls(path)
        run.secrets.check()
        return run

    @property
    def config(self) -> TrainConfig:
        """The configuration the run was started with.

        Raises:
            FedveilError: ``config.json`` is damaged.
        """
        try:
            described = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            return TrainConfig.check(described["configuration"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FedveilError(f"{self.path / 'config.json'} is damaged: {error}") from None

    @property
    def complete(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "summary.json").is_file()

    def extend(self, rounds: int) -> None:
        """Let the run go on to more rounds than it was started for.

        What it comes to is what a run of so many rounds from the start would have come to.

        Args:
            rounds: Rounds in all.

        Raises:
            FedveilError: The run has gone as far already, or the directory cannot be written.
        """
        config, done = self.config, len(self.rounds())
        if rounds <= done:
            raise FedveilError(
                f"--rounds {rounds} is out of range: {self.path} has trained {done}; give more"
            )
        longer = TrainConfig.check(config.model_dump() | {"rounds": rounds})
        described = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        try:
            # Before all else, since its presence says that the run is complete.
            (self.path / "summary.json").unlink(missing_ok=True)
            for name in (MODEL, DISTILLED):
                self.secrets.path(name).unlink(missing_ok=True)
        except OSError as error:
            raise FedveilError(f"{self.path}: {error.strerror}") from None
        held = self.secrets.noise_key() if self.secrets.sealed else None
        configuration = longer.model_dump(mode="json")
        self._write("config.json", _json(described | {"configuration": configuration}))
        if held is not None:
            self.secrets.keep(held, OperatorKey.from_environment())

    @contextmanager
    def locked(self, role: Literal["train", "server"] = "train") -> Iterator[None]:
        """Hold the run's lock; it ends with the process, however that ends.

        Args:
            role: ``train`` for whoever drives a run or changes its files; ``server`` for the
                ServerApp, which on a deployment is another process of the same run.

        Raises:
            FedveilError: Another process holds it; says which, and since when.
        """
        with lock(self.path / f".{role}.lock", named=str(self.path)):
            yield

    def note_versions(self) -> dict[str, str]:
        """Note that the run goes on, if it does so under other versions than before.

        Returns:
            Library to "old, now new" for each that changed; empty where none did.

        Raises:
            FedveilError: ``config.json`` is damaged or cannot be written.
        """
        history, now = self.version_history(), versions()
        before = history[-1]["versions"]
        changed = {
            name: f"{before.get(name, 'none')}, now {now.get(name, 'none')}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        }
        if changed:
            described = self._described()
            later = [*described.get("later", []), {"from_round": self._next, "versions": now}]
            self._write("config.json", _json(described | {"later": later}))
        return changed

    def note_images(self, digest: str) -> None:
        """Note which images the run is trained on; a run that has begun keeps what was noted.

        Args:
            digest: ``Dataset.digest``.

        Raises:
            FedveilError: They are others than those noted, or ``config.json`` is damaged or cannot
                be written.
        """
        self.check_images(digest)
        described = self._described()
        if _IMAGES not in described and not self.rounds():
            self._write("config.json", _json(described | {_IMAGES: digest}))

    def check_images(self, digest: str) -> None:
        """Refuse images that are not those the run is trained on; of an earlier version's, none.

        Raises:
            FedveilError: They are others, or ``config.json`` is damaged.
        """
        noted = self._described().get(_IMAGES)
        if noted is not None and noted != digest:
            raise FedveilError(
                f"the images of {self.config.dataset} here are not those that {self.path} was "
                "trained on: some were added, removed or changed since, or are read otherwise, so "
                "that whoever trained on which is not known here; restore them, or work where the "
                "run was made"
            )

    def version_history(self) -> list[dict[str, Any]]:
        """Return the versions the run was under, each with the round from which it was.

        Raises:
            FedveilError: ``config.json`` is damaged.
        """
        described = self._described()
        first = {"from_round": 1, "versions": described.get("versions", {})}
        return [first, *described.get("later", [])]

    @property
    def _next(self) -> int:
        return len(self.rounds()) + 1

    def _described(self) -> dict[str, Any]:
        try:
            described: Any = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise FedveilError(f"{self.path / 'config.json'} is damaged: {error}") from None
        if not isinstance(described, dict):
            raise FedveilError(f"{self.path / 'config.json'} is damaged: it holds no object")
        return described

    def noise_key(self) -> NoiseKey:
        """Return the run's noise key.

        Raises:
            FedveilError: There is none, or it is encrypted under a key that is not at hand.
        """
        return self.secrets.noise_key()

    def rounds(self) -> list[RoundRecord]:
        """Read ``rounds.jsonl``.

        Raises:
            FedveilError: A line is no round.
        """
        return _lines(self.path / "rounds.jsonl", _round)

    def note_release(self, images: Mapping[int, int | None]) -> None:
        """Note, before it leaves, who is asked for an update; a repeated round is noted again.

        Args:
            images: Partition of each client to the number of images it says it has, if it does.

        Raises:
            FedveilError: It could not be written.
        """
        noted = [*self.releases(), images]
        text = "".join(json.dumps({str(k): v for k, v in one.items()}) + "\n" for one in noted)
        self._write(_RELEASES, text.encode())

    def releases(self) -> list[dict[int, int | None]]:
        """Return what ``note_release`` noted, every started round, repeated ones too.

        Raises:
            FedveilError: The file is damaged.
        """
        return _lines(self.path / _RELEASES, _RELEASE.validate_python)

    def write_rounds(self, rounds: list[RoundRecord]) -> None:
        """Write ``rounds.jsonl`` anew, so that no crash leaves half a line."""
        text = "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in rounds)
        self._write("rounds.jsonl", text.encode())

    def checkpoint(self) -> Checkpoint | None:
        """Read the last checkpoint; ``None`` before the first.

        Raises:
            FedveilError: The file is damaged, or encrypted under a key that is not at hand.
        """
        content = self.secrets.read(CHECKPOINT)
        if content is None:
            return None
        try:
            tensors, metadata = load(content), _metadata(content)
            state = json.loads(metadata["state"])
            w, base, memory = (_with_prefix(tensors, f"{x}/") for x in ("w", "base", "memory"))
            return Checkpoint(
                round=int(state["round"]),
                weights=w,
                state=StrategyState(
                    base or None, float(state["sigma"]), bool(state["noisy"]), memory or None
                ),
                best=_best(state.get("best"), _with_prefix(tensors, "best/") or w),
            )
        except (
            *(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError),
            SafetensorError,
        ) as error:
            raise FedveilError(
                f"{self.secrets.path(CHECKPOINT)} is damaged ({error}); restore it, or train anew "
                "in another directory"
            ) from None

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint in one rename."""
        tensors = {f"w/{name}": value for name, value in checkpoint.weights.items()}
        base = checkpoint.state.base or {}
        tensors |= {f"base/{name}": value.clone() for name, value in base.items()}
        memory = checkpoint.state.memory or {}
        tensors |= {f"memory/{name}": value.clone() for name, value in memory.items()}
        state: dict[str, Any] = {
            "round": checkpoint.round,
            "sigma": checkpoint.state.sigma,
            "noisy": checkpoint.state.noisy,
        }
        if best := checkpoint.best:
            state["best"] = {"round": best.round, "calibration": best.calibration}
            if best.round != checkpoint.round:
                tensors |= {f"best/{name}": value for name, value in best.weights.items()}
        content = save(_contiguous(tensors), metadata={"state": json.dumps(state)})
        self._write_secret(CHECKPOINT, content)

    def sweep(self) -> None:
        """Remove what a killed writer left half written; only for whoever writes from now on."""
        for part in self.path.glob(".*.part"):
            part.unlink(missing_ok=True)

    def write_model(self, weights: Mapping[str, Tensor]) -> None:
        """Write ``model.safetensors``: w alone, for the party that ordered it."""
        self._write_secret(MODEL, save(_contiguous(weights)))

    def write_distilled(self, weights: Mapping[str, Tensor]) -> None:
        """Write ``distilled.safetensors``: the network that w was taught to."""
        self._write_secret(DISTILLED, save(_contiguous(weights)))

    def model(self) -> dict[str, Tensor]:
        """Return w of the complete run.

        Raises:
            FedveilError: It is not there yet, damaged, or encrypted under a key not at hand.
        """
        return self._weights(MODEL, f"the run is not complete; fedveil train --resume {self.path}")

    def distilled(self) -> dict[str, Tensor]:
        """Return the network that w was taught to.

        Raises:
            FedveilError: As ``model``; or none was asked for.
        """
        return self._weights(
            DISTILLED, "the run is not complete, or was started without --distil-into"
        )

    def _weights(self, name: str, missing: str) -> dict[str, Tensor]:
        path, content = self.secrets.path(name), self.secrets.read(name)
        if content is None:
            raise FedveilError(f"{path} is not there: {missing}")
        try:
            return load(content)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise FedveilError(f"{path} is damaged ({error}); restore it from a copy") from None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``; its presence says that the run is complete."""
        self._write("summary.json", _json(summary))

    def _write_secret(self, name: str, content: bytes) -> None:
        self.secrets.check_writable()
        self._write(self.secrets.path(name).name, self.secrets.closed(name, content), mode=_SECRET)

    def _write(self, name: str, content: bytes, *, mode: int = 0o644) -> None:
        try:
            write_atomically(self.path / name, content, mode=mode)
        except OSError as error:
            raise FedveilError(
                f"{self.path / name} could not be written: {error.strerror}; make room or mend the "
                f"permissions, then fedveil train --resume {self.path}"
            ) from error


def versions() -> dict[str, str]:
    """Return the versions of fedveil, Python and the libraries results depend on."""
    libraries = {name: version(name) for name in _VERSIONED}
    return {"fedveil": __version__, "python": platform.python_version(), **libraries}


def origin() -> dict[str, Any]:
    """Return what every result says of where it comes from: ``date`` in UTC, and ``versions``."""
    return {"date": datetime.now(UTC).date().isoformat(), "versions": versions()}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata in the header of a file in the safetensors format."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata


def _round(content: Any) -> RoundRecord:
    record = _ROUND.validate_python(content)
    if unknown := sorted(set(content) - {field.name for field in fields(RoundRecord)}):
        raise ValueError(f"a round has no {unknown[0]!r}")
    return record


def _best(chosen: Any, weights: Weights) -> BestRound | None:
    if chosen is None:
        return None
    return BestRound(int(chosen["round"]), float(chosen["calibration"]), weights)


_Line = TypeVar("_Line")


def _lines(path: Path, read: Callable[[Any], _Line]) -> list[_Line]:
    """Return what is read off each line of JSON; nothing where there is no file."""
    if not path.exists():
        return []
    try:
        return [read(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FedveilError(f"{path} is damaged: {error}") from None


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}
