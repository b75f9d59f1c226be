"""Keyed Gaussian noise that degrades the copies of a model its clients receive."""

import fnmatch
import glob
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor, nn

from fedveil.errors import FedveilError
from fedveil.files import write_atomically
from fedveil.models import first_layer, output_layer, twins
from fedveil.sealing import KEY_BYTES, derive_key

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class NoiseKey:
    """The secret from which every round's noise is expanded.

    Whoever holds it and a copy can subtract the noise, so it stays on the server: in no message, no
    log, and, by ``repr=False``, no traceback.

    Attributes:
        secret: 32 bytes.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise FedveilError(
                f"a noise key has {KEY_BYTES} bytes, this one {len(self.secret)}; "
                "leave the key file out to have a fresh one drawn"
            )

    @classmethod
    def generate(cls) -> "NoiseKey":
        """Return a key from the operating system's secure generator."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> "NoiseKey":
        """Read a key that ``save`` wrote.

        Raises:
            FedveilError: The file is missing, unreadable or no key.
        """
        try:
            return cls(bytes.fromhex(path.read_text(encoding="ascii").strip()))
        except (OSError, ValueError) as error:
            raise FedveilError(
                f"noise key {path}: cannot be read ({type(error).__name__}); "
                f"the file must hold {2 * KEY_BYTES} hexadecimal digits"
            ) from None

    def save(self, path: Path) -> None:
        """Write the key as hexadecimal text, readable by the owner alone."""
        write_atomically(path, (self.secret.hex() + "\n").encode("ascii"), mode=0o600)

    def derive(self, purpose: str) -> bytes:
        """Return the 32 bytes of a key for one purpose, by HKDF-SHA256 (RFC 5869)."""
        return derive_key(self.secret, purpose)

    def stream(self, purpose: str, count: int) -> bytearray:
        """Return ``count`` bytes of the ChaCha20 key stream (RFC 8439) for one purpose."""
        cipher = Cipher(ChaCha20(self.derive(purpose), bytes(16)), mode=None)
        return bytearray(cipher.encryptor().update(bytes(count)))

    def gaussians(self, *, run: str, round_number: int, group: str, count: int) -> Tensor:
        """Expand the key into independent standard normal values.

        HKDF-SHA256 (RFC 5869) derives a ChaCha20 key (RFC 8439) per (run, round, group); each
        32-bit word of its key stream becomes one value by the inverse of the normal distribution.

        Args:
            run: Name of the run.
            round_number: Round, from 1.
            group: Name of the group of clients that shares the noise.
            count: How many values.

        Returns:
            float64 [count], |z| ≤ 6.4; the same on every machine for the same arguments.
        """
        stream = self.stream(f"noise v1\0{run}\0{round_number}\0{group}", 4 * count)
        words = torch.frombuffer(stream, dtype=torch.int32).to(torch.float64)
        values: Tensor = torch.special.ndtri((words + (2**31 + 0.5)) / 2**32)
        return values


@dataclass(frozen=True)
class NoiseTarget:
    """The parameter tensors that carry noise, and the unit of σ for each.

    Attributes:
        layers: Names of the parameters, grouped by the layer they belong to.
        twins: Further names of tied parameters, to the name that carries noise.
        relative: Whether σ counts in units of a layer's root mean square (``noise-delta``) or is
            the standard deviation itself (the paper's algorithm).
    """

    layers: tuple[tuple[str, ...], ...]
    relative: bool = True
    twins: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters that carry noise, in the model's order."""
        return tuple(name for layer in self.layers for name in layer)

    def draw(
        self, weights: Tensors, key: NoiseKey, *, run: str, round_number: int, group: str
    ) -> dict[str, Tensor]:
        """Return one draw of the noise at σ = 1.

        Args:
            weights: The model the noise is for; gives shapes, dtypes and scales.
            key: Secret the draw is expanded from.
            run: Name of the run.
            round_number: Round, from 1.
            group: Name of the group of clients that shares the noise.

        Returns:
            A tensor of the parameter's shape and dtype for each name in ``names``, and for every
            further name of a tied one.
        """
        sizes = [weights[name].numel() for name in self.names]
        values = key.gaussians(run=run, round_number=round_number, group=group, count=sum(sizes))
        drawn = dict(zip(self.names, torch.split(values, sizes), strict=True))
        noise = {
            name: (drawn[name] * scale).reshape(weights[name].shape).to(weights[name].dtype)
            for layer in self.layers
            for scale in [self._scale(weights, layer)]
            for name in layer
        }
        return noise | {name: noise[first] for name, first in self.twins.items() if first in noise}

    def _scale(self, weights: Tensors, layer: Sequence[str]) -> float:
        if not self.relative:
            return 1.0
        return root_mean_square(weights, layer)


def root_mean_square(weights: Tensors, layer: Sequence[str]) -> float:
    """Return the root mean square over the tensors of one layer together.

    Over the layer, not the tensor: a bias may still be zero and must be hidden all the same.
    """
    squares = sum(float(weights[name].double().square().sum()) for name in layer)
    return math.sqrt(squares / sum(weights[name].numel() for name in layer))


def noise_target(
    model: nn.Module, shape: tuple[int, int, int], where: str, *, relative: bool = True
) -> NoiseTarget:
    """Find the parameters that ``--noise`` names.

    Args:
        model: Any module that takes float [N, C, H, W].
        shape: (C, H, W) of one image.
        where: ``first-conv``: the first convolution, patch embedding or linear layer the pixels
            reach; ``output``: the linear layer that gives the logits; ``all``: every parameter;
            otherwise names, or patterns as of the shell, separated by commas, over the names of the
            model's parameters (``body.0.*``, ``*.bias``). Frozen parameters are public and carry
            none.
        relative: See ``NoiseTarget``.

    Raises:
        FedveilError: No parameter of the model has such a name.
    """
    tied = twins(model)
    parameters = [name for name, value in model.named_parameters() if value.requires_grad]
    text = _PLACES[where](model, shape) if where in _PLACES else where
    patterns = [pattern.strip() for pattern in text.split(",")]
    named = {name for name in (*parameters, *tied) if _matches(name, patterns)}
    named |= {tied[name] for name in named if name in tied}
    chosen = [name for name in parameters if name in named]
    if not chosen:
        raise FedveilError(
            f"--noise {where!r} matches no parameter of this model; allowed: {', '.join(_PLACES)}, "
            f"or a pattern over {', '.join(parameters)}"
        )
    layers: dict[str, list[str]] = {}
    for name in chosen:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    grouped = tuple(tuple(names) for names in layers.values())
    return NoiseTarget(grouped, relative=relative, twins=tied)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    # By name first: brackets in one are no pattern.
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _parameters_of(layer: str) -> str:
    return f"{glob.escape(layer)}.*" if layer else "*"


_PLACES: Mapping[str, Callable[[nn.Module, tuple[int, int, int]], str]] = {
    "first-conv": lambda model, shape: _parameters_of(first_layer(model, shape)),
    "output": lambda model, shape: _parameters_of(output_layer(model, shape)),
    "all": lambda model, shape: "*",
}


def add_noise(weights: Tensors, noise: Tensors, sigma: float) -> dict[str, Tensor]:
    """Return ``weights + sigma * noise``; tensors without noise are shared, not copied.

    Args:
        weights: Model state by name.
        noise: A draw of ``NoiseTarget.draw``.
        sigma: Strength, of either sign.
    """
    return {
        name: torch.add(value, noise[name], alpha=sigma) if name in noise else value
        for name, value in weights.items()
    }
