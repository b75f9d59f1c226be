"""Large batches parted by their images' independence, from a first linear layer's gradient."""

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.attacks.inversion.fully_connected import first_linear, preparation
from fedveil.attacks.inversion.gradients import GradientMap, check_attackable
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress, Uses
from fedveil.attacks.inversion.peeling import labels_of
from fedveil.attacks.inversion.separation import separated
from fedveil.attacks.inversion.subspace import range_of
from fedveil.types import Shape

_RANK = 1e-6  # singular values below this share of the largest are rounding
_SILENT_SHARE = 0.8  # of the neurons that an estimate makes silent, the surest
_CAUCHY = 2.0  # medians at which a neuron that is not silent after all has lost half of its weight
_PASSES = 6
_STAYS = 0.7  # cosine below which a column without its zeros has moved to where it has no business
_SOLVED = 1e-3  # of its root mean square at all neurons: what is left at silent ones
_SETTLED = 1e-5  # of the same: nothing is left, and another fit would find the column again
_EXPLAINED = 0.01  # of an update's squared length at most is left by images that were found
_GAIN = 0.5  # of what was left before; another round that leaves more brings nothing
_TWICE = 0.99  # cosine of two columns that are one
_RIDGE = 1e-13  # beside normal equations of rows of length 1
_NEARLY = 0.75  # images of a client whose training moved few neurons; of mixtures half are zero
_MORE = 6  # zeros beyond those that any column can be given
_TINY = 1e-30
_LEAST = 1e-300


@dataclass(frozen=True, kw_only=True)
class IndependentComponents:
    """Part a batch by independent component analysis, then sharpen it by what a ReLU silences.

    The gradient of a first linear layer's weights is ``D·X``: each row is a mixture of the batch's
    images, which are the sources. What filters answer is mixed alike, and where one image has an
    edge, all filters and colours answer at once, which parts images (``separated``). The gradient
    of the biases gives lengths and signs.

    An image that is known roughly tells at which neurons it is silent, if a ReLU follows. Its
    column of D is zero there, and is what spans the gradient's columns with those zeros, by least
    squares that give less weight to neurons at which zero does not fit. Images whose column turns
    into another's are parted anew among themselves. Whichever answer explains the update better is
    given. Where the images do not explain the update, as under noise, ``Inversion.untold`` says so;
    of several local steps, which images explain in part only, where not every column was solved.

    Source: Kariyappa et al., "Cocktail Party Attack: Breaking Aggregation-Based Privacy in
    Federated Learning Using Independent Component Analysis", ICML 2023, section 4 (images as
    sources of the mixtures; they descend on kurtosis, total variation and a penalty of likeness).
    What parts images and the sharpening are ours, the zeros those of Dimitrov et al., "SPEAR",
    NeurIPS 2024, section 3.

    Args:
        steps: Most fixed-point steps of the separation.
        rounds: Most rounds of sharpening; 0 for none.
        seed: Seeds its start.

    Shape: any batch of at most as many images as the layer has neurons; any number of local steps,
    though the loss takes their sum for one step's gradient. Iterations are rounds of sharpening.

    Raises:
        FedveilError: On a call, as of ``FullyConnected``.

    Example:
        >>> IndependentComponents()(observation).images  # doctest: +SKIP
    """

    uses: ClassVar = Uses(linear=True)

    steps: int = 200
    rounds: int = 8
    seed: int = 0

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images."""
        begin = time.perf_counter()
        check_attackable(observation, attack="ica", most=None, local=True, batch_statistics=True)
        # Sums over local steps are of the same images, and so of the same form.
        local = observation.local is not None
        observation = replace(observation, local=None)
        name, layer = first_linear(observation)
        scale, offset = preparation(observation, layer)
        measure = GradientMap.of(observation, dtype=torch.float32, device=layer.weight.device)
        subspace = range_of(observation.knows, observation.shape)
        images, labels, losses, rounds, untold = [], [], [], [], []
        for victim in range(observation.victims):
            weight, bias = (
                observation.gradients[f"{name}.{part}"][victim].detach().double().cpu()
                for part in ("weight", "bias")
            )
            mixture = _Mixture.of(
                weight,
                bias,
                (layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu()),
                (scale.cpu(), offset.cpu()),
                observation.images,
            )
            part = observation.select(torch.tensor([victim]))
            best: tuple[Tensor, Tensor, float] | None = None
            parted = self._parted(mixture.rows, observation.shape)
            sharp, taken, solved = self._sharpened(mixture, parted, observation.shape)
            for columns in (parted, sharp)[: 1 + bool(taken)]:
                slopes, inputs = mixture.solved(columns)
                own = _whole((inputs - mixture.offset) / mixture.scale, observation.images)
                own = own.nan_to_num(0.5).reshape(1, -1, *observation.shape).to(scale)
                own = subspace.to(own).images(subspace.to(own).coordinates(own)).cpu()
                seen = labels_of(observation.model, layer, own[0], _whole(slopes.T, len(own[0])).T)
                loss = float(measure.distance(own.float(), seen[None], part).double().cpu()[0])
                if best is None or loss < best[2]:
                    best = own, seen, loss
            assert best is not None
            images.append(best[0])
            labels.append(best[1])
            losses.append(best[2])
            rounds.append(taken)
            # One image is its quotient, whatever follows the layer. The loss of several steps is no
            # judge, as it takes their sum for one; of one step it judges better than columns do.
            whole = solved and local and sharp.shape[1] == observation.images
            known = observation.images == 1 or whole or losses[-1] < _EXPLAINED
            untold.append(not (bool(bias.any()) and known))
            if progress:
                progress(victim + 1, observation.victims, losses[-1])
        seconds = (time.perf_counter() - begin) / observation.victims
        return Inversion(
            images=torch.cat(images),
            labels=torch.stack(labels),
            loss=torch.tensor(losses, dtype=torch.float64),
            seconds=torch.full((observation.victims,), seconds),
            iterations=torch.tensor(rounds),
            untold=torch.tensor(untold),
        )

    def _parted(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return columns [r, r], one an image, that mix rows [r, C·H·W], up to length and sign."""
        return F.normalize(separated(rows, shape, steps=self.steps, seed=self.seed), dim=0)

    def _sharpened(
        self, mixture: "_Mixture", columns: Tensor, shape: Shape
    ) -> tuple[Tensor, int, bool]:
        """Return columns as their zeros determine them, in how many rounds, and whether all are."""
        least, most = float("inf"), 0
        told, left = columns.clone(), torch.full_like(columns[0], float("inf"))
        settled = torch.zeros_like(left, dtype=torch.bool)
        for taken in range(self.rounds):
            silent = mixture.silent(columns)
            for place in settled.logical_not().nonzero()[:, 0].tolist():
                fitted = _fitted(mixture.heard, silent[place], columns[:, place])
                told[:, place], left[place] = fitted
            stays = (told * columns).sum(dim=0).abs()
            own = _distinct(told, stays)
            solved, settled = own & (left < _SOLVED), own & (left < _SETTLED)
            done = bool(solved.all()) and float(left.max()) >= _GAIN * least
            if bool(settled.all()) or done:
                return told, taken + 1, _determined(mixture.heard, silent, told)
            least = float(left.max()) if bool(solved.all()) else float("inf")
            columns = torch.where(solved | (own & (stays > _STAYS)), told, columns)
            count = int(solved.sum())
            if most <= count < len(solved) and count and (count == most or taken):
                columns = self._parted_anew(mixture, columns, solved, shape)
            most = count
        return columns, self.rounds, False

    def _parted_anew(
        self, mixture: "_Mixture", columns: Tensor, solved: Tensor, shape: Shape
    ) -> Tensor:
        """Return columns whose unsolved ones are the components of what solved ones leave."""
        known, columns = columns[:, solved], columns.clone()
        # What is orthogonal to known columns sees none of their images.
        beyond = torch.linalg.svd(known, full_matrices=True)[0][:, known.shape[1] :]
        mixed = self._parted(beyond.T @ mixture.rows, shape)
        for place, start in zip(solved.logical_not().nonzero()[:, 0], mixed.T, strict=True):
            columns[:, place] = F.normalize(beyond @ start, dim=0)
        silent = mixture.silent(columns)
        for place in solved.logical_not().nonzero()[:, 0].tolist():
            columns[:, place] = _completed(mixture.heard, silent[place], columns[:, place], known)
        return columns


@dataclass(frozen=True)
class _Mixture:
    """What a layer's gradient spans.

    Attributes:
        left: Float64 [out, r], orthonormal.
        heard: The same of the neurons that fired at all, each row of length 1.
        rows: Float64 [r, in], so that the gradient is ``left @ rows``, up to its size.
        bias: Float64 [out], the biases' gradient, up to the same size.
        weights: Float64 [heard, in], of the model that was sent.
        thresholds: Float64 [heard], the biases of that model.
        scale: Float64 [in]; the layer receives ``scale · pixels + offset``.
        offset: Float64 [in].
    """

    left: Tensor
    heard: Tensor
    rows: Tensor
    bias: Tensor
    weights: Tensor
    thresholds: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor,
        sent: tuple[Tensor, Tensor],
        prepared: tuple[Tensor, Tensor],
        images: int,
    ) -> "_Mixture":
        size = weight.abs().max().clamp_min(_LEAST)
        weight, bias = weight / size, bias / size
        # An image that the layer receives as zeros is in the biases' gradient alone.
        both = torch.cat([weight, bias[:, None]], dim=1)
        left, values, right = torch.linalg.svd(both, full_matrices=False)
        rank = max(1, min(images, int((values > _RANK * values[0]).sum())))
        left = left[:, :rank]
        fired = left.norm(dim=1)
        loud = fired > _RANK * fired.max()
        return cls(
            left,
            left[loud] / fired[loud, None],
            values[:rank, None] * right[:rank, :-1],
            bias,
            sent[0][loud],
            sent[1][loud],
            *prepared,
        )

    def solved(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return slopes [out, r] and inputs [r, in] of columns [r, r]."""
        mixed = self.left @ columns
        lengths = torch.linalg.lstsq(mixed, self.bias[:, None]).solution[:, 0]
        lengths = torch.where(lengths.abs() > _TINY, lengths, _TINY)
        inputs = torch.linalg.lstsq(columns * lengths, self.rows).solution
        return mixed * lengths, inputs

    def silent(self, columns: Tensor) -> list[Tensor]:
        """Return for each column the neurons most surely silent for its image, indices."""
        _, inputs = self.solved(columns)
        pixels = ((inputs - self.offset) / self.scale).nan_to_num(0.5).clamp(0, 1)
        received = (pixels * self.scale + self.offset) @ self.weights.T + self.thresholds
        fewest = min(len(self.weights), columns.shape[1] + _MORE)
        return [
            one.argsort()[: max(fewest, int(_SILENT_SHARE * float((one < 0).sum())))]
            for one in received / self.weights.norm(dim=1)
        ]


def _fitted(heard: Tensor, silent: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Return the column near ``start`` [r] that is zero at most silent neurons.

    Returns:
        The column, of length 1, and what is left of it at the silent neurons, as a share of what
        it has at all.
    """
    rows, column = heard[silent], start
    same = torch.eye(len(start), dtype=start.dtype)
    for _ in range(_PASSES):
        square, weights = _weighed(rows @ column)
        normal = (rows * weights[:, None]).T @ rows / weights.sum()
        # The start decides where zeros leave several columns; it counts less the better they fit.
        column = torch.linalg.solve(normal + (0.01 * square + _RIDGE) * same, column)
        column = F.normalize(column, dim=0)
    # Not by the median of all: half of the neurons may be silent.
    left = (rows @ column).abs().median() / (heard @ column).square().mean().sqrt()
    return column, float(left)


def _determined(heard: Tensor, silent: list[Tensor], columns: Tensor) -> bool:
    """Whether columns [r, r] are zero at most silent neurons, each, and at enough of them.

    Zeros at any r - 1 neurons can be chosen, and a mixture of two images' columns is zero where
    both images are silent.
    """
    size = (heard @ columns).square().mean(dim=0).sqrt()
    for place, own in enumerate(silent):
        zeros = int(((heard[own] @ columns[:, place]).abs() < _SOLVED * size[place]).sum())
        if zeros < max(columns.shape[1] + _MORE - 1, _NEARLY * len(own)):
            return False
    return True


def _completed(heard: Tensor, silent: Tensor, column: Tensor, known: Tensor) -> Tensor:
    """Return a column [r] with the multiples of known columns [r, K] that leave most zeros."""
    rows, others = heard[silent], heard[silent] @ known
    same = torch.eye(known.shape[1], dtype=known.dtype)
    share = torch.zeros(known.shape[1], dtype=known.dtype)
    for _ in range(_PASSES):
        square, weights = _weighed(rows @ column + others @ share)
        normal = (others * weights[:, None]).T @ others / weights.sum()
        wanted = (others * weights[:, None]).T @ (rows @ column) / weights.sum()
        share = -torch.linalg.solve(normal + (1e-6 * square + _RIDGE) * same, wanted)
    return F.normalize(column + known @ share, dim=0)


def _weighed(left: Tensor) -> tuple[float, Tensor]:
    """Return the weighed mean square of what is left, and the weights, by Cauchy's function."""
    scale = left.abs().median().clamp_min(1e-12)
    weights = 1 / (1 + (left / (_CAUCHY * scale)).square())
    return float((weights * left.square()).sum() / weights.sum()), weights


def _distinct(columns: Tensor, stays: Tensor) -> Tensor:
    """Return which columns [r, r] are not another's that moved less to be there, bool [r]."""
    own = torch.ones(columns.shape[1], dtype=torch.bool)
    alike = (columns.T @ columns).abs() > _TWICE
    for one, other in alike.triu(diagonal=1).nonzero().tolist():
        own[one if stays[one] < stays[other] else other] = False
    return own


def _whole(rows: Tensor, count: int) -> Tensor:
    """Return as many rows as there were images: one that was used twice is there once."""
    return rows[torch.arange(count).clamp(max=len(rows) - 1)]
