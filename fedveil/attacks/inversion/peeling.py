"""Whole batches read exactly off the gradient of a first linear layer before a ReLU."""

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.attacks.inversion.fully_connected import (
    FullyConnected,
    first_linear,
    preparation,
)
from fedveil.attacks.inversion.gradients import GradientMap, check_attackable
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress, Uses
from fedveil.attacks.inversion.sparse_columns import climbed
from fedveil.attacks.inversion.subspace import range_of

_RANK = 1e-6  # singular values below this share of the largest are rounding
_NOISY = 1e-3  # angle beyond which rows of one image cannot be told from rows of two
_PARALLEL = 3e-5  # angle between rows of one image that rounding of float32 makes
_SILENT = 3.0  # a neuron's part of a column is zero below so many of those angles
_EXPLAINED = 0.01  # of an update's squared length at most is left by images that are all there
_AGREE = 3  # quotients that do not agree by chance
_RANGE = (-0.5, 1.5)  # of pixels, known transformations included; other solutions are far off


@dataclass(frozen=True, kw_only=True)
class Peeling:
    """Take the gradient of a first linear layer apart into its images, one after the other.

    The gradient of the weights is ``D·X``, a row of X an image, a column of D its slopes at the
    layer's outputs, which a ReLU makes zero wherever the image leaves a neuron silent. The singular
    value decomposition gives ``L·R`` with D = L·Q and X = Q⁻¹·R, and what is left to find is the
    square Q that makes L·Q sparse.

    A neuron that fires for one image only has in L that image's row of Q⁻¹, up to a factor; several
    such neurons are parallel. Projecting L onto what is orthogonal to it takes the image out, and
    neurons that fired for it and one other now fire for one: so on to the last image, whose column
    is what is left. Backwards, each image's column is known up to multiples of the columns found
    before it, and each multiple is the quotient on which most neurons agree at which no other
    column is left. The gradient of the biases is a further column of that of the weights, as if
    each image had one more pixel that is 1, and that pixel gives the columns' lengths.

    Where no neuron fires for one image only, as with centred inputs, what is left is searched
    (``fedveil.attacks.inversion.sparse_columns``). Where that ends without a result or at its
    limit, or there is noise on the update, the answer is that of ``FullyConnected``, and
    ``Inversion.untold`` says so.

    Source: the decomposition and the use of ReLU's zeros: Dimitrov et al., "SPEAR: Exact Gradient
    Inversion of Batches in Federated Learning", NeurIPS 2024, section 3, who sample neurons until
    some are silent for an image, in a time that doubles with every image. Peeling is ours.

    Args:
        seconds: How long to search for one victim's images at most.

    Shape: any batch of fewer images than the layer has neurons; any number of local steps, though
    the loss takes their sum for one step's gradient. A label goes to the image whose column it
    explains best. Iterations are 0.

    Raises:
        FedveilError: On a call, as of ``FullyConnected``.

    Example:
        >>> Peeling()(observation).images  # doctest: +SKIP
    """

    uses: ClassVar = Uses(linear=True, sanitizer=True)

    seconds: float = 60.0

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images."""
        begin = time.perf_counter()
        check_attackable(observation, attack="peel", most=None, local=True, batch_statistics=True)
        # Sums over local steps are of the same images, and so of the same form.
        local = observation.local is not None
        observation = replace(observation, local=None)
        read = FullyConnected()(observation)
        name, layer = first_linear(observation)
        scale, offset = preparation(observation, layer)
        measure = GradientMap.of(observation, dtype=torch.float32, device=layer.weight.device)
        subspace = range_of(observation.knows, observation.shape).to(read.images)
        images, labels, losses = read.images.clone(), read.labels.clone(), read.loss.clone()
        # One image is its quotient, whatever there is on the update.
        untold = torch.full((observation.victims,), observation.images > 1)
        untold |= read.untold if read.untold is not None else False
        for victim in range(observation.victims):
            weight, bias = (
                observation.gradients[f"{name}.{part}"][victim].detach().double()
                for part in ("weight", "bias")
            )
            until = time.perf_counter() + self.seconds
            found = _taken_apart(weight, bias, observation.images, until)
            if found is None:
                continue
            slopes, inputs = found
            pixels = (inputs - offset) / scale
            inside = ((pixels > _RANGE[0]) & (pixels < _RANGE[1])).all(dim=1)
            if not bool(inside.any()):
                continue
            own = pixels[inside].reshape(1, -1, *observation.shape).cpu()
            own = subspace.images(subspace.coordinates(own))
            images[victim, : own.shape[1]] = own[0]
            # An image that was used twice has one column.
            images[victim, own.shape[1] :] = own[0, -1]
            seen = labels_of(observation.model, layer, own[0], slopes[:, inside])
            labels[victim, : len(seen)], labels[victim, len(seen) :] = seen, seen[-1]
            part = observation.select(torch.tensor([victim]))
            told = images[victim : victim + 1].float(), labels[victim : victim + 1]
            losses[victim] = measure.distance(*told, part).double().cpu()[0]
            # Images may have one column as they are one; or be a mixture of others, and be missing.
            # The loss of several steps is no judge, as it takes their sum for one.
            whole = local and int(inside.sum()) == observation.images
            untold[victim] = not (whole or float(losses[victim]) < _EXPLAINED)
            if progress:
                progress(victim + 1, observation.victims, float(losses[victim]))
        seconds = (time.perf_counter() - begin) / observation.victims
        return Inversion(
            images=images,
            labels=labels,
            loss=losses,
            seconds=torch.full((observation.victims,), seconds),
            iterations=torch.zeros(observation.victims, dtype=torch.int64),
            untold=untold,
        )


def _taken_apart(
    weight: Tensor, bias: Tensor, images: int, until: float
) -> tuple[Tensor, Tensor] | None:
    """Return slopes, float64 [out, N], and inputs, float64 [N, in], of at most ``images`` images.

    None where the gradient is of more images than that, or where the search ends without them.
    """
    # An image that the layer receives as zeros is in the biases' gradient alone.
    both = torch.cat([weight, bias[:, None]], dim=1)
    left, values, _ = torch.linalg.svd(both, full_matrices=False)
    rank = min(images, int((values > _RANK * values[0]).sum()))
    if rank < 1 or rank >= len(values):
        return None
    angle = max(_PARALLEL, 10 * float(values[rank] / values[rank - 1]))
    if angle > _NOISY:
        return None
    columns = _sparse(left[:, :rank], angle, until)
    if columns is None:
        return None
    rows = torch.linalg.lstsq(columns, both).solution
    lengths = rows[:, -1]
    if bool((lengths.abs() < _RANK * lengths.abs().max()).any()):
        return None
    return columns * lengths, rows[:, :-1] / lengths[:, None]


def _sparse(left: Tensor, angle: float, until: float) -> Tensor | None:
    """Return sparse columns [out, N] that span what the columns of ``left`` [out, N] span."""
    size = left.norm(dim=1)
    loud = size > angle * size.max()
    whole = torch.zeros_like(left)
    left = left[loud]
    space, spaces = torch.eye(left.shape[1]).to(left), []
    while space.shape[1] > 1:
        row = _common_row(left, space, angle)
        if row is None:
            break
        spaces.append(space)
        space = space @ torch.linalg.svd(row[None], full_matrices=True)[2][1:].T
    if space.shape[1] > 1:
        columns = _searched(left, space, left[:, :0], angle, until)
        if columns is None:
            return None
    else:
        columns = _silenced(left @ space, angle)
    for space in reversed(spaces):
        # What the larger space has beyond the columns that are known.
        inside = space.T @ torch.linalg.lstsq(left, columns).solution
        new = space @ torch.linalg.svd(inside, full_matrices=True)[0][:, -1]
        column = _without(columns, left @ new, angle)
        if column is not None:
            columns = torch.cat([columns, _silenced(column[:, None], angle)], dim=1)
            continue
        searched = _searched(left, space, columns, angle, until)
        if searched is None:
            return None
        columns = searched
    weights = torch.linalg.lstsq(left, columns).solution
    whole[loud] = left @ weights * (columns != 0)
    return whole


def _searched(
    left: Tensor, space: Tensor, known: Tensor, angle: float, until: float
) -> Tensor | None:
    """Return the sparse columns [out, d] of ``left @ space``, some of which may be known."""
    seen = left @ space
    heard = seen.norm(dim=1) > _SILENT * angle * left.norm(dim=1)
    columns = climbed(seen[heard], known[heard], angle, until)
    if columns is None:
        return None
    weights = torch.linalg.lstsq(seen[heard], columns).solution
    return _silenced(seen @ weights, angle)


def _common_row(left: Tensor, space: Tensor, angle: float) -> Tensor | None:
    """Return the direction in ``space`` that most neurons share, [d]; None if no two do."""
    rows = left @ space
    size = rows.norm(dim=1)
    rows = rows[size > _SILENT * angle * left.norm(dim=1)]
    if len(rows) < 2:
        return None
    rows = F.normalize(rows, dim=1)
    # A sine squared is as exact as float64, and a cosine is not.
    alike = (1 - (rows @ rows.T).square()) < angle**2
    votes = alike.sum(dim=1)
    if int(votes.max()) < 2:
        return None
    shared = rows[alike[votes.argmax()]]
    direction: Tensor = torch.linalg.svd(shared, full_matrices=False)[2][0]
    return direction


def _without(columns: Tensor, column: Tensor, angle: float) -> Tensor | None:
    """Return ``column`` [out] less the multiples of known columns [out, K] that leave most zeros.

    None where too few neurons tell one of the multiples.
    """
    fires = columns != 0
    left = set(range(columns.shape[1]))
    while left:
        others = fires[:, sorted(left)].sum(dim=1)
        told = {}
        for place in left:
            alone = fires[:, place] & (others == 1)
            told[place] = _agreed(column[alone] / columns[alone, place], angle)
        sure = [place for place, (_, votes) in told.items() if votes >= _AGREE]
        sure = sure or [place for place, (_, votes) in told.items() if votes == _AGREE - 1][:1]
        if not sure:
            return None
        for place in sure:
            column = column - told[place][0] * columns[:, place]
        left -= set(sure)
    return column


def _agreed(quotients: Tensor, angle: float) -> tuple[float, int]:
    """Return the quotient on which most agree, and how many do."""
    if not len(quotients):
        return 0.0, 0
    ordered = quotients.sort().values
    apart = ordered.diff() > angle * ordered[1:].abs().clamp_min(angle)
    group = F.pad(apart.long().cumsum(0), (1, 0))
    votes = group.bincount()
    best = int(votes.argmax())
    return float(ordered[group == best].median()), int(votes[best])


def _silenced(columns: Tensor, angle: float) -> Tensor:
    """Return columns with what rounding left of their zeros set to zero, of length 1."""
    columns = F.normalize(columns, dim=0)
    heard = columns.abs() > _SILENT * angle * columns.abs().amax(0)
    return torch.where(heard, columns, 0.0)


def labels_of(model: nn.Module, layer: nn.Linear, images: Tensor, slopes: Tensor) -> Tensor:
    """Return for each image [N, C, H, W] the label whose slopes are the most like its own.

    Args:
        model: What the client was sent.
        layer: Its first linear layer.
        images: Reconstructed.
        slopes: [out, N], a column an image.
    """
    received: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _m, _i, output: received.append(output))
    try:
        logits = model(images.to(layer.weight))
    finally:
        hook.remove()
    alike = []
    for label in range(logits.shape[1]):
        loss = F.cross_entropy(logits, torch.full((len(images),), label).to(logits.device))
        (caused,) = torch.autograd.grad(loss, received[0], retain_graph=True)
        alike.append(F.cosine_similarity(caused.double(), slopes.T, dim=1))
    return torch.stack(alike).argmax(dim=0).cpu()
