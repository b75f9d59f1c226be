"""The sparsest columns that span a space, found by climbing: what peeling leaves."""

import math
import time

import torch
from torch import Tensor
from torch.nn import functional as F

_CHAINS = 256
_ROUNDS = 24
_PATIENCE = 2  # rounds without any sparse vector
_QUIET = (0.08, 0.15, 0.25, 0.4)  # of the rows, the quietest, from which chains of a round start
_INDEPENDENT = 1e-3
_WIDE = 5.0  # times the angle, of what may be a zero
_SPANNED = 1e-8  # of a squared length
_AS_SPARSE = 0.85  # of the median's zeros
_LEAST = 0.1  # of the rows: any vector has as many zeros as the space allows


def climbed(left: Tensor, known: Tensor, angle: float, until: float) -> Tensor | None:
    """Return as many sparse columns as ``left`` has, which span what it spans; None if not found.

    A vector of the space is fixed by the d - 1 rows at which it is zero. Chains start at rows of
    little length, where most columns are zero; each step gives one row up, and of the plane that
    opens takes the direction that is zero at most rows. The columns asked for are where no step
    gains. Chains never enter the span of what was found before, or most would end there again.

    Source: the columns as sparse vectors, and zeros at sampled rows: Dimitrov et al., "SPEAR: Exact
    Gradient Inversion of Batches in Federated Learning", NeurIPS 2024, section 3. Climbing is ours.

    Args:
        left: Float64 [out, d], d at least 3; no row is zero.
        known: Float64 [out, K], columns that were found before.
        angle: What rounding makes of zero, as a share of a vector's largest entry.
        until: When to stop, by ``time.perf_counter``.
    """
    left, width = torch.linalg.qr(left)[0], left.shape[1]
    if width < 3 or len(left) < 2 * width:
        return None
    generator = torch.Generator().manual_seed(0)
    found = F.normalize(known.T @ left, dim=1)
    for number in range(_ROUNDS):
        if time.perf_counter() > until:
            break
        sure = found
        if len(found):
            zeros = _zeros(left, found, angle)
            least = max(_LEAST * len(left), _AS_SPARSE * float(zeros.max()))
            sure = found[zeros >= least]
        rows = _starts(left, _QUIET[number % len(_QUIET)], generator)
        vectors = _climb(left, rows, _beyond(sure), angle, generator, until)
        found = _refined(left, _sparsest(left, torch.cat([found, vectors]), angle), angle)
        zeros = _zeros(left, found, angle)
        sparse = max(_LEAST * len(left), 2 * width + 4, _AS_SPARSE * float(zeros.median()))
        if len(found) == width and float(zeros.min()) >= sparse:
            return left @ found.T
        if number + 1 >= _PATIENCE and int(zeros.max()) < sparse:
            break  # nothing here is sparse
    return None


def _zeros(left: Tensor, vectors: Tensor, angle: float) -> Tensor:
    values = (vectors @ left.T).abs()
    count: Tensor = (values < angle * values.amax(dim=1, keepdim=True)).sum(dim=1)
    return count


def _starts(left: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return rows to start at, [chains, d - 2], among the quietest."""
    count, width = left.shape
    quiet = left.norm(dim=1).argsort()[: max(int(share * count), width + 4)]
    drawn = torch.rand(_CHAINS, len(quiet), generator=generator)
    rows: Tensor = quiet[drawn.topk(width - 2, dim=1).indices]
    return rows


def _beyond(found: Tensor) -> Tensor:
    """Return an orthonormal basis [d, d - K] of what found vectors [K, d] do not span."""
    if not len(found):
        return torch.eye(found.shape[1]).to(found)
    rest: Tensor = torch.linalg.svd(found, full_matrices=True)[2][len(found) :].T
    return rest


def _climb(
    left: Tensor,
    rows: Tensor,
    beyond: Tensor,
    angle: float,
    generator: torch.Generator,
    until: float,
) -> Tensor:
    """Return the vectors [chains, d] at which chains end."""
    vectors, row, zeros = _fullest(left, rows, beyond, angle)
    basis = torch.cat([rows, row[:, None]], dim=1)
    each = torch.arange(len(rows))
    for _ in range(3 * left.shape[1]):
        if time.perf_counter() > until:
            break
        given_up = torch.randint(rows.shape[1], (len(rows),), generator=generator)
        rows = basis[:, :-1].clone()
        rows[each, given_up] = basis[:, -1]
        new, row, count = _fullest(left, rows, beyond, angle)
        better = (count >= zeros)[:, None]
        basis = torch.where(better, torch.cat([rows, row[:, None]], dim=1), basis)
        vectors = torch.where(better, new, vectors)
        zeros = torch.where(better[:, 0], count, zeros)
    return vectors


def _fullest(
    left: Tensor, rows: Tensor, beyond: Tensor, angle: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the vectors that are zero at given rows [chains, d - 2] and at most others.

    Of each plane that those rows leave, a vector without a part in ``beyond`` is left out.

    Returns:
        Vectors [chains, d], one more row [chains] at which each is zero, and how many there are.
    """
    chains = len(rows)
    given = left[rows]
    solved, _ = torch.linalg.solve_ex(given[:, :, :-2], -given[:, :, -2:])
    ends = torch.eye(2, dtype=left.dtype).expand(chains, 2, 2)
    plane = torch.cat([solved, ends], dim=1).nan_to_num(posinf=0.0, neginf=0.0)
    plane, _ = torch.linalg.qr(plane)
    seen = left @ plane
    size = seen.norm(dim=2)
    both = size < angle * size.amax(dim=1, keepdim=True)
    parts = beyond.T @ plane
    weights, turns = torch.linalg.eigh(parts.mT @ parts)
    spanned = weights[:, :1] < _SPANNED * weights[:, 1:]
    along = (seen @ turns[:, :, :1])[..., 0].abs() < 10 * angle * size
    turned = torch.atan2(seen[..., 1], seen[..., 0]) % math.pi
    # Rows that are zero in the whole plane have no direction: none agrees with another.
    apart = 10.0 + torch.arange(len(left), dtype=left.dtype)
    turned = torch.where(both | (spanned & along), apart, turned)
    ordered, order = turned.sort(dim=1)
    group = F.pad((ordered.diff(dim=1) > angle).long().cumsum(dim=1), (1, 0))
    votes = torch.zeros_like(group).scatter_add_(1, group, torch.ones_like(group))
    most, which = votes.max(dim=1)
    first = (group == which[:, None]).long().argmax(dim=1)
    row = order.gather(1, first[:, None])[:, 0]
    across = seen[torch.arange(chains), row]
    vectors = plane[:, :, 1] * across[:, :1] - plane[:, :, 0] * across[:, 1:]
    return F.normalize(vectors, dim=1).nan_to_num(), row, most + both.sum(dim=1)


def _refined(left: Tensor, vectors: Tensor, angle: float) -> Tensor:
    """Return each vector as all its zeros determine it, which rounding blurs less than a few."""
    values = (vectors @ left.T).abs()
    zero = values < _WIDE * angle * values.amax(dim=1, keepdim=True)
    better = [
        torch.linalg.svd(left[rows], full_matrices=False)[2][-1]
        if int(rows.sum()) >= left.shape[1]
        else vector
        for vector, rows in zip(vectors, zero, strict=True)
    ]
    return torch.stack(better)


def _sparsest(left: Tensor, vectors: Tensor, angle: float) -> Tensor:
    """Return the sparsest of vectors [C, d] that do not depend on sparser ones."""
    zeros = _zeros(left, vectors, angle)
    vectors = vectors[zeros.argsort(descending=True, stable=True)]
    vectors = vectors[vectors.norm(dim=1) > 0.5]
    taken: list[int] = []
    rest = vectors.clone()
    while len(taken) < left.shape[1]:
        independent = rest.norm(dim=1) > _INDEPENDENT
        if not bool(independent.any()):
            break
        best = int(independent.long().argmax())
        taken.append(best)
        direction = F.normalize(rest[best], dim=0)
        rest = rest - (rest @ direction)[:, None] * direction
        rest[best] = 0
    return vectors[taken]
