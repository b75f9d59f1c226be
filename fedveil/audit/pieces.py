"""What an audit that was cut short has finished: kept beside its results until it is whole."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedveil.attacks.inversion import Inversion, Observation
from fedveil.errors import FedveilError
from fedveil.files import UNFINISHED, json_bytes, write_results

_OPTIONS = "options.json"


@dataclass(frozen=True)
class Pieces:
    """Attacks that an audit has finished; none is run twice on the same observation.

    A defence that draws its noise anew leaves another observation in every audit, so what was
    found under it is found anew, and all rows of a defence are of one observation.

    Attributes:
        folder: Where they are kept; None keeps nothing. It is made with the first piece.
        options: What the audit was asked for, as JSON has it.
    """

    folder: Path | None = None
    options: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, out: Path | None, options: Mapping[str, Any]) -> "Pieces":
        """Return the pieces of an audit, those of an earlier process with them.

        Args:
            out: Directory for the audit's results; None keeps nothing.
            options: All that the results depend on, and that JSON can hold.

        Raises:
            FedveilError: The directory holds what another audit has finished.
        """
        if out is None:
            return cls()
        folder, asked = out / UNFINISHED, plain(options)
        if (folder / _OPTIONS).exists():
            begun = read_piece(folder / _OPTIONS)
            for name in sorted({*begun, *asked}):
                if begun.get(name) != asked.get(name):
                    raise FedveilError(
                        f"--out {out} holds an audit that was cut short and had "
                        f"{name.replace('_', '-')} {_short(begun.get(name))}, not "
                        f"{_short(asked.get(name))}: give its options to go on with it, remove "
                        f"{folder}, or name another directory"
                    )
        return cls(folder, asked)

    def inversion(
        self, attack: str, observation: Observation, make: Callable[[], Inversion]
    ) -> Inversion:
        """Return what an attack finds, from its file where it has been found.

        Args:
            attack: What tells it from all others on the same updates.
            observation: What it sees.
            make: Runs it.

        Raises:
            FedveilError: The file is damaged or cannot be written, or what ``make`` raises.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{_digest(attack, observation)}.safetensors"
        if path.exists():
            return _read(path)
        found = make()
        named = {name: value for name, value in vars(found).items() if value is not None}
        options = json_bytes(self.options)
        content = save({name: value.contiguous() for name, value in named.items()})
        write_results(self.folder, {_OPTIONS: options, path.name: content})
        return found

    def close(self) -> None:
        """Remove them: the audit is whole."""
        if self.folder is None or not self.folder.is_dir():
            return
        # The options last, so that what a kill leaves can still be gone on with.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _OPTIONS):
            path.unlink(missing_ok=True)
        self.folder.rmdir()


def _digest(attack: str, observation: Observation) -> str:
    digest = hashlib.sha256(attack.encode())
    for tensors in (observation.model.state_dict(), observation.gradients):
        for name, value in sorted(tensors.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _read(path: Path) -> Inversion:
    try:
        found: dict[str, Tensor] = load(path.read_bytes())
        return Inversion(**found)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise FedveilError(f"{path} is damaged ({error}); remove it to measure anew") from None


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text or "none"


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON gives them back, lists for tuples."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()}


def read_piece(path: Path) -> dict[str, Any]:
    """Return a stored JSON object.

    Raises:
        FedveilError: It is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FedveilError(f"{path} is damaged ({error}); remove it to measure anew") from None
    if not isinstance(content, dict):
        raise FedveilError(f"{path} is damaged; remove it to measure anew")
    return content
