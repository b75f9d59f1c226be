"""What running statistics of batch normalisation that come back tell of the batches behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedveil.models.inspect import BATCH_NORMS

_MEAN, _VARIANCE, _COUNTER = "running_mean", "running_var", "num_batches_tracked"


@dataclass(frozen=True)
class LayerStatistics:
    """Mean and variance of what one layer of batch normalisation was given, for V victims.

    They are means over the victim's batches, of which the last ones weigh most unless the layer
    averages them alike; of a single batch they are its own.

    Attributes:
        mean: Float64 [V, C], of the batches' means.
        variance: Float64 [V, C], of the batches' unbiased variances.
        concentration: Float64 [V], sum of the squared weights of the batches, whose sum is 1; the
            inverse of as many batches as weigh alike.
        batches: Int64 [V], how many there were.
    """

    mean: Tensor
    variance: Tensor
    concentration: Tensor
    batches: Tensor

    def select(self, victims: Tensor) -> "LayerStatistics":
        """Return those of some victims only; ``victims`` is an index, int64 [M]."""
        return replace(
            self,
            mean=self.mean[victims],
            variance=self.variance[victims],
            concentration=self.concentration[victims],
            batches=self.batches[victims],
        )


@dataclass(frozen=True)
class RunningStatistics:
    """What was read of a model's layers.

    Attributes:
        layers: By name, where statistics came back.
        unread: Why not, by the name of the layer.
    """

    layers: Mapping[str, LayerStatistics]
    unread: Mapping[str, str]


def read_running_statistics(
    model: nn.Module,
    before: Mapping[str, Tensor],
    returned: Sequence[Mapping[str, Tensor]],
    *,
    steps: int,
) -> RunningStatistics:
    """Return what the change of running statistics tells of a victim's batches.

    A layer of momentum m replaces its running mean r by (1−m)·r + m·μ in each step, so that after k
    of them r_k = (1−m)^k·r_0 + m·Σ_j (1−m)^(k−1−j)·μ_j, and the mean of the μ_j by these weights is
    (r_k − (1−m)^k·r_0) / (1 − (1−m)^k); of one step it is μ itself. Without a momentum r is the
    average over all n + k batches counted, and Σ μ_j = (n+k)·r_k − n·r_0. The same holds for the
    unbiased variances. A weighted mean over clients gives the weighted mean of what each would.

    Source: Ioffe & Szegedy, "Batch Normalization", ICML 2015, algorithm 2; the update rule is that
    of ``torch.nn.BatchNorm2d``.

    Args:
        model: The architecture.
        before: The state that was sent.
        returned: The states that came back, one a victim; whatever they lack was withheld.
        steps: Steps of a client, where no counter tells.
    """
    layers: dict[str, LayerStatistics] = {}
    unread: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            found = _read(name, module, before, returned, steps)
            if isinstance(found, str):
                unread[name] = found
            else:
                layers[name] = found
    return RunningStatistics(layers, unread)


def _read(
    name: str,
    module: nn.Module,
    before: Mapping[str, Tensor],
    returned: Sequence[Mapping[str, Tensor]],
    steps: int,
) -> LayerStatistics | str:
    mean, variance, counter = (f"{name}.{p}" if name else p for p in (_MEAN, _VARIANCE, _COUNTER))
    if mean not in before or variance not in before:
        return "it keeps no running statistics"
    if not returned or any(mean not in one or variance not in one for one in returned):
        return "its running statistics did not come back"
    if all(torch.equal(one[mean], before[mean]) for one in returned):
        return (
            "its running statistics came back as they went: they were withheld, or the layer is "
            "not used, or kept in evaluation mode"
        )
    if any(torch.equal(one[mean], before[mean]) for one in returned):
        return "only some of the victims returned its running statistics"
    counted = int(before[counter]) if counter in before else 0
    own: Any = module
    mixes = [_mix(own.momentum, counted, _steps(before, one, counter, steps)) for one in returned]
    if any(mix.kept >= 1 for mix in mixes):
        return f"its momentum of {own.momentum} takes nothing of a batch"
    means, variances = (
        torch.stack([mix.of(before[k], one[k]) for mix, one in zip(mixes, returned, strict=True)])
        for k in (mean, variance)
    )
    return LayerStatistics(
        mean=means,
        variance=variances.clamp_min(0),
        concentration=torch.tensor([mix.concentration for mix in mixes], dtype=torch.float64),
        batches=torch.tensor([mix.batches for mix in mixes]),
    )


@dataclass(frozen=True)
class _Mix:
    """How a running statistic is mixed of what it was before and of a client's batches."""

    kept: float
    concentration: float
    batches: int

    def of(self, before: Tensor, after: Tensor) -> Tensor:
        return (after.double() - self.kept * before.double()) / (1 - self.kept)


def _mix(momentum: float | None, counted: int, batches: int) -> _Mix:
    if momentum is None:
        return _Mix(counted / (counted + batches), 1 / batches, batches)
    kept = (1 - momentum) ** batches
    if kept >= 1:
        return _Mix(1.0, 1.0, batches)
    return _Mix(kept, momentum * (1 + kept) / ((2 - momentum) * (1 - kept)), batches)


def _steps(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], counter: str, told: int
) -> int:
    if counter not in before or counter not in after:
        return told
    # Secure aggregation sums no counters, so that one may come back as it went.
    counted = int(after[counter]) - int(before[counter])
    return counted if counted > 0 else told
