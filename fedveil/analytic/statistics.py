"""The sums a ridge needs of labelled images, as integers: added and subtracted without rounding."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedveil.errors import FedveilError

FRACTION_BITS = 14
"""A feature is a multiple of 2⁻¹⁴, which int16 holds; a product of two is one of 2⁻²⁸."""

MOST_IMAGES = 2 ** (62 - 2 * FRACTION_BITS)
"""Images of a sum that fits 64-bit words, since no image adds more than 2²⁸ to any of them."""

_UNIT = float(2**FRACTION_BITS)
_EXACT_IMAGES = 2 ** (53 - 2 * FRACTION_BITS)  # as many float64 sums without rounding
_ROWS = 512


def quantised(features: Tensor) -> Tensor:
    """Return features scaled to norm 1 at most and rounded, int16 [N, D] in units of 2⁻¹⁴.

    An image's row has a norm of 2¹⁴ at most whatever the rounding does. Rows of zeros stay zeros.

    Args:
        features: Float [N, D], finite.
    """
    rows = features.double()
    norms = rows.norm(dim=1, keepdim=True)
    room = _UNIT - math.sqrt(features.shape[1]) / 2 - 1
    scale = torch.where(norms > 0, room / norms.clamp(min=1e-300), 0.0)
    return (rows * scale).round().to(torch.int16)


@dataclass(frozen=True)
class Layout:
    """Where the sums lie in a vector of words: G's upper triangle by rows, H by rows, counts.

    Attributes:
        dimension: D.
        classes: K.
    """

    dimension: int
    classes: int

    @property
    def triangle(self) -> int:
        """D·(D + 1)/2."""
        return self.dimension * (self.dimension + 1) // 2

    @property
    def length(self) -> int:
        """Words in all."""
        return self.triangle + self.dimension * self.classes + self.classes

    def rows(self) -> Iterator[tuple[int, slice]]:
        """Yield each row of the triangle and where it lies."""
        start = 0
        for row in range(self.dimension):
            yield row, slice(start, start + self.dimension - row)
            start += self.dimension - row


@dataclass(frozen=True)
class Statistics:
    """Σ φφᵀ, Σ φyᵀ and how many images of each class, with y the class as a unit vector.

    Two of them are added and subtracted word by word, modulo 2⁶⁴: in any order and grouping the
    bits are the same, and what was added and is subtracted again was never there.

    Attributes:
        layout: D and K.
        words: int64 [layout.length]; G in units of 2⁻²⁸, H in units of 2⁻¹⁴.
    """

    layout: Layout
    words: Tensor

    def __post_init__(self) -> None:
        if self.words.shape != (self.layout.length,) or self.words.dtype != torch.int64:
            raise FedveilError(
                f"statistics are {self.words.dtype} {tuple(self.words.shape)}; allowed: "
                f"torch.int64 ({self.layout.length},)"
            )

    @classmethod
    def nothing(cls, layout: Layout) -> "Statistics":
        """Return the sums of no image."""
        return cls(layout, torch.zeros(layout.length, dtype=torch.int64))

    @classmethod
    def of(
        cls, rows: Tensor, labels: Tensor, *, classes: int, dimension: int | None = None
    ) -> "Statistics":
        """Return the sums of images, in memory for two D × D matrices whatever their number.

        Args:
            rows: int16 [N, P·D], as ``quantised`` returns them: of an image P vectors of a norm of
                2¹⁴ together. G is summed over all of them, H over each image's first one.
            labels: int64 [N], from 0 to K - 1.
            classes: K.
            dimension: D; a row's length where an image has one vector.

        Raises:
            FedveilError: A label is out of range.
        """
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise FedveilError(
                f"labels run from {int(labels.min())} to {int(labels.max())}; allowed: 0 to "
                f"{classes - 1}"
            )
        layout = Layout(dimension or rows.shape[1], classes)
        words = torch.zeros(layout.length, dtype=torch.int64)
        upper = slice(0, layout.triangle)
        for vectors in torch.split(rows, layout.dimension, dim=1):
            for block in torch.split(vectors, _EXACT_IMAGES):
                words[upper] += _packed(_gram(block.double()), layout)
        moments = torch.zeros(classes, layout.dimension, dtype=torch.int64)
        moments.index_add_(0, labels, rows[:, : layout.dimension].to(torch.int64))
        words[layout.triangle :] = torch.cat(
            [moments.T.reshape(-1), labels.bincount(minlength=classes)]
        )
        return cls(layout, words)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Return the sums of both sets of images."""
        return Statistics(self.layout, self.words + other.words)

    def __sub__(self, other: "Statistics") -> "Statistics":
        """Return the sums without the other's images."""
        return Statistics(self.layout, self.words - other.words)

    @property
    def counts(self) -> Tensor:
        """Images of each class, int64 [K]."""
        return self.words[self.layout.length - self.layout.classes :]

    @property
    def images(self) -> int:
        """N."""
        return int(self.counts.sum())

    @property
    def gram(self) -> Tensor:
        """G = Σ φφᵀ, float64 [D, D]."""
        size = self.layout.dimension
        found = torch.zeros(size, size, dtype=torch.float64)
        for row, place in self.layout.rows():
            found[row, row:] = self.words[place]
        found.div_(_UNIT**2)
        return found + found.triu(1).T

    @property
    def moments(self) -> Tensor:
        """H = Σ φyᵀ, float64 [D, K]."""
        start = self.layout.triangle
        end = start + self.layout.dimension * self.layout.classes
        return self.words[start:end].view(-1, self.layout.classes).double() / _UNIT

    def fault(self, *, images: int) -> str | None:
        """Say what shows that these are no sums of so many images, if anything does.

        What any honest sums have: counts that add up, squares that are not negative and no more
        than one an image, and no entry beyond what the squares allow.

        Args:
            images: How many they are said to be of.
        """
        counts, words = self.counts, self.words
        if (
            bool((counts < 0).any())
            or int(counts.double().sum()) != images
            or (self.images != images)
        ):
            return f"the images of its classes are not the {images} it says"
        squares = torch.stack([words[place.start] for _, place in self.layout.rows()])
        if bool((squares < 0).any()) or float(squares.double().sum()) > images * _UNIT**2:
            return f"its squares are none of {images} images of norm 1"
        most = squares.double().sqrt()
        for row, place in self.layout.rows():
            if bool((words[place].double().abs() > most[row] * most[row:] * (1 + 1e-9)).any()):
                return "its products are larger than its squares allow"
        bounds = most[:, None] * counts.double().sqrt()
        if bool((self.moments.abs() * _UNIT > bounds * (1 + 1e-9)).any()):
            return "its sums of features are larger than its squares allow"
        return None


def _gram(rows: Tensor) -> Tensor:
    """Return the upper triangle of rowsᵀ·rows, by blocks; what lies below it is undefined."""
    size = rows.shape[1]
    found = torch.empty(size, size, dtype=rows.dtype)
    for start in range(0, size, _ROWS):
        part = slice(start, start + _ROWS)
        torch.mm(rows[:, part].T, rows[:, start:], out=found[part, start:])
    return found


def _packed(gram: Tensor, layout: Layout) -> Tensor:
    found = torch.empty(layout.triangle, dtype=torch.int64)
    for row, place in layout.rows():
        found[place] = gram[row, row:].to(torch.int64)
    return found
