"""A small individual noise in each client's copy, by which a leaked copy names its receiver."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from fedveil.copies.noise import NoiseKey, root_mean_square
from fedveil.models import twins

# Where accuracy is still that of no fingerprint; docs/tracing.md has the measurement.
FINGERPRINT_STRENGTH = 0.05

_LEVELS = 1 << 16


@dataclass(frozen=True)
class Fingerprint:
    """Gaussian noise in all parameters, expanded from a secret key per (run, round, client).

    Source: Cox, Kilian, Leighton, Shamoon, "Secure spread spectrum watermarking for multimedia",
    IEEE Transactions on Image Processing 6 (1997), sections III and IV-D: a Gaussian mark, since
    averaging and order statistics of several copies reveal a binary one.

    Attributes:
        key: The run's secret key.
        strength: Standard deviation, in units of a layer's root mean square.
        layers: Names of the parameters, grouped by the layer they belong to.
        run: Name of the run.
        twins: Further names of tied parameters, to the name that carries the mark.
    """

    key: NoiseKey
    strength: float
    layers: tuple[tuple[str, ...], ...]
    run: str = "run"
    twins: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, key: NoiseKey, *, strength: float, run: str = "run"
    ) -> "Fingerprint":
        """Return the fingerprint of all parameters of a model."""
        layers: dict[str, list[str]] = {}
        for name, _ in model.named_parameters():
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        grouped = tuple(tuple(names) for names in layers.values())
        return cls(key, strength, grouped, run, twins(model))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters, layer by layer: the order of ``pattern``."""
        return tuple(name for layer in self.layers for name in layer)

    def pattern(self, count: int, *, round_number: int, client: int) -> Tensor:
        """Return one client's values of one round.

        Args:
            count: Number of values: of all parameters together.
            round_number: Round, from 1.
            client: The client's partition.

        Returns:
            float32 [count], standard normal in 65,536 equally likely steps, |z| ≤ 4.33; the same
            on every machine.
        """
        stream = self.key.stream(f"fingerprint v1\0{self.run}\0{round_number}\0{client}", 2 * count)
        words = torch.frombuffer(stream, dtype=torch.int16).to(torch.int32) + _LEVELS // 2
        return _quantiles()[words]

    def apply(
        self, weights: Mapping[str, Tensor], *, round_number: int, client: int
    ) -> dict[str, Tensor]:
        """Return one client's copy of a model; tensors that are no parameters are shared.

        Args:
            weights: State by name.
            round_number: Round, from 1.
            client: The client's partition.

        Returns:
            The state, to the same bits on every machine and with any number of threads.
        """
        sizes = [weights[name].numel() for name in self.names]
        values = self.pattern(sum(sizes), round_number=round_number, client=client)
        parts = dict(zip(self.names, torch.split(values, sizes), strict=True))
        marked = dict(weights)
        for layer in self.layers:
            # Summed in float64 and rounded, so that the order of summation leaves no trace.
            scale = torch.tensor(
                self.strength * root_mean_square(weights, layer), dtype=torch.float32
            )
            for name in layer:
                change = (parts[name] * scale).reshape(weights[name].shape)
                marked[name] = weights[name] + change.to(weights[name].dtype)
        return marked | {name: marked[first] for name, first in self.twins.items()}


@lru_cache(maxsize=1)
def _quantiles() -> Tensor:
    """Return the middles of 65,536 equally likely steps of the standard normal distribution."""
    steps = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    values: Tensor = torch.special.ndtri(steps)
    return values.to(torch.float32)
