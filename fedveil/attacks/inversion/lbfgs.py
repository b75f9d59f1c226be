"""L-BFGS for many independent problems at once, each with a state of its own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``evaluate(points [A, n], which [A])`` gives those problems' losses [A] and gradients [A, n]."""

_FLAT = 1e-7
_UNCHANGED = 1e-9
_CURVED = 1e-10


@dataclass
class Problems:
    """V problems on their way down.

    Every problem takes the steps that ``torch.optim.LBFGS`` with ``lr=1`` and without a line search
    takes on it alone: its own curvature pairs, its own tests for the end of a step. The direction
    comes from the compact representation, in which the curvature pairs enter by four products of
    matrices instead of 4·H vector operations in a row.

    Source: Byrd, Nocedal & Schnabel, "Representations of Quasi-Newton Matrices and Their Use in
    Limited Memory Methods", 1994, theorem 2.2 and equation (3.13); the tests are PyTorch's.

    Attributes:
        evaluate: The functions.
        points: [V, n], where the problems stand.
        loss: [V], there.
        gradient: [V, n], there.
        history: Curvature pairs that are remembered, H.
        inner: Most iterations a step.
    """

    evaluate: Evaluate
    points: Tensor
    loss: Tensor
    gradient: Tensor
    history: int
    inner: int

    @classmethod
    def at(cls, points: Tensor, evaluate: Evaluate, *, history: int, inner: int) -> "Problems":
        """Return the problems at their starts ``points``, [V, n]."""
        loss, gradient = evaluate(points, torch.arange(len(points), device=points.device))
        return cls(evaluate, points.clone(), loss, gradient, history, inner)

    def __post_init__(self) -> None:
        count, size = self.points.shape
        self._direction = torch.zeros_like(self.points)
        self._length = self.points.new_zeros(count)
        self._before = torch.zeros_like(self.points)
        self._fresh = torch.ones(count, dtype=torch.bool, device=self.points.device)
        self._moves = self.points.new_zeros(count, self.history, size)
        self._changes = torch.zeros_like(self._moves)
        self._stored = torch.zeros(count, dtype=torch.int64, device=self.points.device)
        # Products of the pairs with each other, in which little may be lost.
        small = self.points.new_zeros(count, self.history, self.history, dtype=torch.float64)
        self._moved, self._changed = small, small.clone()
        self._scale = self.points.new_ones(count, dtype=torch.float64)

    def step(self, which: Tensor) -> None:
        """Make up to ``inner`` iterations on the problems ``which``, int64 [A]."""
        which = which[~(self.gradient[which].abs().amax(dim=1) <= _FLAT)]
        for _ in range(self.inner):
            if not len(which):
                return
            which = self._descend(which)

    def _descend(self, which: Tensor) -> Tensor:
        """Make one iteration and return the problems for which the step goes on."""
        gradient = self.gradient[which]
        fresh = self._fresh[which]
        change = gradient - self._before[which]
        curved = self._store(which, change) & ~fresh
        products = self._products(which, torch.stack([change, gradient], dim=1))
        self._remember(which[curved], products[curved, :, 0])
        direction = -self._solve(which, gradient, products[:, :, 1])
        self._before[which] = gradient
        self._direction[which] = direction
        first = (1 / gradient.abs().sum(dim=1)).clamp_max(1.0)
        length = torch.where(fresh, first, torch.ones_like(first))
        self._length[which] = length
        self._fresh[which] = False
        descends = ~((gradient * direction).sum(dim=1) > -_UNCHANGED)
        which, move = which[descends], (length[:, None] * direction)[descends]
        if not len(which):
            return which
        self.points[which] += move
        before = self.loss[which]
        loss, gradient = self.evaluate(self.points[which], which)
        self.loss[which], self.gradient[which] = loss, gradient
        ended = (gradient.abs().amax(dim=1) <= _FLAT) | (move.abs().amax(dim=1) <= _UNCHANGED)
        return which[~(ended | ((loss - before).abs() < _UNCHANGED))]

    def _store(self, which: Tensor, change: Tensor) -> Tensor:
        """Store the pairs along which the function curves upwards, and return which do, [A]."""
        move = self._direction[which] * self._length[which, None]
        product = (change * move).sum(dim=1)
        curved = product > _CURVED
        kept = which[curved]
        slot = self._stored[kept] % self.history
        self._moves[kept, slot] = move[curved]
        self._changes[kept, slot] = change[curved]
        self._stored[kept] += 1
        size = change[curved].square().sum(dim=1)
        self._scale[kept] = (product[curved] / size).double()
        return curved

    def _remember(self, which: Tensor, products: Tensor) -> None:
        slot = (self._stored[which] - 1) % self.history
        self._moved[which, :, slot] = products[:, 0]
        self._changed[which, :, slot] = products[:, 1]
        self._changed[which, slot] = products[:, 1]

    def _products(self, which: Tensor, vectors: Tensor) -> Tensor:
        """Return the products of all stored pairs with vectors [A, 2, n], float64 [A, 2, 2, H]."""
        used = int(self._stored[which].clamp_max(self.history).max())
        found = self._scale.new_zeros(len(which), 2, 2, self.history)
        for place, problem in enumerate(which.tolist()):
            for kind, pairs in enumerate((self._moves, self._changes)):
                found[place, kind, :, :used] = vectors[place] @ pairs[problem, :used].T
        return found

    def _solve(self, which: Tensor, gradient: Tensor, products: Tensor) -> Tensor:
        """Return the inverse Hessian's approximation applied to the gradient, [A, n].

        Args:
            which: Int64 [A].
            gradient: [A, n].
            products: Float64 [A, 2, H], of the stored pairs with the gradient.
        """
        stored = self._stored[which]
        scale = self._scale[which, None]
        used = int(stored.clamp_max(self.history).max())
        if not used:
            return gradient.clone()
        # Pairs in the order of their age; places not yet filled are equations 1·0 = 0 at the end.
        oldest = torch.where(stored >= self.history, stored % self.history, 0)
        order = (oldest[:, None] + torch.arange(used, device=stored.device)) % self.history
        row = torch.arange(len(which), device=stored.device)[:, None]
        moves, changes = products[row, 0, order], products[row, 1, order]
        across = which[:, None, None], order[:, :, None], order[:, None, :]
        upper = self._moved[across].triu()
        diagonal = upper.diagonal(dim1=1, dim2=2)
        curvature = diagonal.clone()
        diagonal[diagonal == 0] = 1.0
        inner = torch.linalg.solve_triangular(upper, moves[..., None], upper=True)
        bent = (self._changed[across] @ inner)[..., 0] * scale
        right = curvature * inner[..., 0] + bent - scale * changes
        outer = torch.linalg.solve_triangular(upper.mT, right[..., None], upper=False)[..., 0]
        weights = torch.zeros_like(products)
        weights[row, 0, order] = outer
        weights[row, 1, order] = -scale * inner[..., 0]
        found: Tensor = scale.to(gradient) * gradient
        for place, problem in enumerate(which.tolist()):
            for kind, pairs in enumerate((self._moves, self._changes)):
                found[place] += weights[place, kind, :used].to(gradient) @ pairs[problem, :used]
        return found
