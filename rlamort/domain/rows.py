"""{y : E y = b, low <= A y <= high}: projection, violation and emptiness of what `Affine` and `Polyhedron` are.

y point (..., B, n) · k equalities · m inequalities · all arithmetic in float64
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlamort.domain.active import identify, least_violating, magnitudes, splitting, times, within
from rlamort.domain.base import Data, PerItem
from rlamort.domain.face import Factor, face, null_space
from rlamort.errors import UserError

MATRICES = ("E", "A")
PASSES = 4  # enough for points as far as float32 reaches
FAR = 1e6  # how far, in sizes of its data, an item's set is shown to have no point before it is called empty


class Scaled(NamedTuple):
    """The data of points (N, n), with A's rows of unit length within E's null space."""

    E: Tensor  # (k, n) or (N, k, n)
    A: Tensor  # (m, n) or (N, m, n)
    b: Tensor  # (N, k)
    low: Tensor  # (N, m)
    high: Tensor  # (N, m)
    factor: Factor

    def onto_affine(self, p: Tensor) -> Tensor:
        """p (N, n) -> the nearest (N, n) with E y = b, in the sense of least squares."""
        return p - times(times(p, self.E.mT) - self.b, self.factor.inverse.mT)


class Rows(nn.Module):
    """The rows of a set, fixed or of each item. They stay in float64, since rounding A moves the set.

    Args:
        data: E (k, n), b (k,), A (m, n), low (m,), high (m,), each as numbers in float64 or `PerItem`.
        tol: singular values below this part of the largest are 0.

    Attributes:
        iterations: of the splitting, which guesses the active rows.
        rounds: the most of the active-set method, which makes them exact.
        count: B where some data are of items, else 0.
        chart: of a fixed E, its pseudo-inverse (n, k) and an orthonormal basis (n, n - rank) of its null space.
    """

    iterations = 90
    rounds = 300

    def __init__(self, data: dict[str, Tensor | PerItem], tol: float) -> None:
        super().__init__()
        self.needs = {name: part.shape for name, part in data.items() if isinstance(part, PerItem)}
        self.data: dict[str, Tensor] = {name: part for name, part in data.items() if isinstance(part, Tensor)}
        self.tol, self.count = tol, 0
        self.chart = null_space(self.data["E"], tol) if "E" in self.data else None
        self.factor = None if self.needs.keys() & set(MATRICES) else self._factored()

    def bind(self, data: Data) -> "Rows":
        bound = copy.copy(self)
        bound.data, bound.needs = self.data | {name: part.double() for name, part in data.items()}, {}
        bound.count = next((len(part) for part in data.values()), self.count)
        if bound.factor is None:  # then both matrices are of items
            for name in MATRICES:
                part = bound.data[name]
                bound.data[name] = part if part.ndim == 3 else part.expand(bound.count, *part.shape)
            bound.factor = bound._factored()
        return bound

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rows":  # where `to`, `cuda` and `float` arrive
        device = fn(torch.empty(0)).device
        self.data = {name: part.to(device) for name, part in self.data.items()}
        self.factor = self.factor and self.factor.to(device)
        self.chart = self.chart and (self.chart[0].to(device), self.chart[1].to(device))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def _factored(self) -> Factor:
        E, A = (self.data[name] / lengths(self.data[name])[..., None] for name in MATRICES)
        return Factor.of(E, A, self.tol)

    def points(self, y: Tensor, what: str) -> Tensor:
        """y (..., n), or (..., B, n) where the data are of B items -> (blocks, B, n) in float64."""
        if not self.count:
            return y.double().reshape(1, -1, y.shape[-1])
        if y.ndim < 2 or y.shape[-2] != self.count:
            raise UserError(f"{what}: points {tuple(y.shape)} are given; {self.count} items, as in the set's data, are needed")
        return y.double().reshape(-1, self.count, y.shape[-1])

    def item(self, name: str, item: int) -> Tensor:
        """One item's datum."""
        part = self.data[name]
        return part if part.ndim == (2 if name in MATRICES else 1) else part[item]

    def scaled(self, blocks: int, count: int) -> Scaled:
        assert self.factor is not None
        E, A, b, low, high = (self.data[name] for name in ("E", "A", "b", "low", "high"))
        of_E, of_A = lengths(E), lengths(A) * self.factor.scale
        middle = (low + high) / 2  # of bounds that cross, the least violating value
        low, high = (torch.where(low > high, middle, end) for end in (low, high))

        def vectors(part: Tensor) -> Tensor:
            return part.expand(blocks * count, -1) if part.ndim == 1 else part.repeat(blocks, 1)

        def matrices(part: Tensor) -> Tensor:
            return part if part.ndim == 2 else part.repeat(blocks, 1, 1)

        return Scaled(
            matrices(E / of_E[..., None]), matrices(A / of_A[..., None]), vectors(b / of_E), vectors(low / of_A),
            vectors(high / of_A), self.factor.repeated(blocks),
        )  # fmt: skip

    def nearest(self, p: Tensor) -> Tensor:
        """p (blocks, B, n) in float64 -> the projections, of the same shape."""
        sets = self.scaled(*p.shape[:2])
        y = p.flatten(0, 1)
        if not sets.low.shape[-1]:
            return face(y, sets.b, sets.low, sets.E, sets.A, sets.low != 0, sets.factor)[0].view(p.shape)
        solved = torch.ones(len(y), dtype=torch.bool, device=y.device)
        # an answer is exact to the rounding of p; from there the next pass begins, until it is exact to the rounding of the set
        for i in range(PASSES):
            with torch.no_grad():
                s, low, high = times(sets.onto_affine(y), sets.A.mT), sets.low.detach(), sets.high.detach()
                if i and bool(within(s, low, high).all()):
                    break
                guess = splitting(s, low, high, sets.factor.gram, 0 if i else self.iterations)
                found = identify(s, low, high, sets.factor.gram, guess, self.rounds)
            solved = solved & found.solved
            bound = torch.where(found.side > 0, sets.high, torch.where(found.side < 0, sets.low, 0.0))
            y = face(y, sets.b, bound, sets.E, sets.A, found.side != 0, sets.factor, found.block)[0]
        lost = (sets.low.isnan() | sets.high.isnan()).any(-1, keepdim=True)
        y = y + torch.where(lost, torch.nan, 0.0)  # a bound that is NaN is not just left out
        if not bool(solved.all()):  # of an empty set: the least violating point, without derivatives
            y = torch.where(solved[:, None], y, self._least_violating(sets, p.detach().flatten(0, 1), ~solved))
        return y.view(p.shape)

    @torch.no_grad()
    def _least_violating(self, sets: Scaled, p: Tensor, items: Tensor) -> Tensor:
        y = sets.onto_affine(p)
        s, low, high = (part[items] for part in (times(y, sets.A.mT), sets.low, sets.high))
        lam = torch.zeros_like(sets.low)
        lam[items] = least_violating(s, low, high, sets.factor.gram.take(items), 40)
        return y - times(lam, sets.factor.gram.rows)

    def violation(self, y: Tensor) -> Tensor:
        """y (blocks, B, n) in float64 -> (blocks, B): the largest distance to the set of one row."""
        E, A, b, low, high = (self.data[name] for name in ("E", "A", "b", "low", "high"))
        exact = (_values(E, y) - b).abs() / lengths(E)
        between = torch.maximum(low - (w := _values(A, y)), w - high).clamp(min=0) / lengths(A)
        return torch.cat([exact, between, torch.zeros_like(y[..., :1])], dim=-1).amax(-1)

    @torch.no_grad()
    def empty(self) -> Tensor:
        """(B,) bool, or (1,) of fixed rows: whether a certificate shows that no y satisfies them.

        It is a combination of rows that is (nearly) 0, while that of their bounds is not (Farkas), so that no feasible y is
        within a million times the size of the data.
        """
        sets = self.scaled(1, self.count or 1)
        y = sets.onto_affine(sets.E.new_zeros(len(sets.b), sets.E.shape[-1]))
        s, size = times(y, sets.A.mT), y.norm(dim=-1)
        if s.shape[-1]:
            size = torch.maximum(size, magnitudes(s, sets.low, sets.high))
        off = sets.b - times(y, sets.E.mT)
        least = off.square().sum(-1)
        shown = (off.norm(dim=-1) > self.tol * sets.b.norm(dim=-1)) & (least >= FAR * size * times(off, sets.E).norm(dim=-1))
        crossed = (self.data["low"] > self.data["high"]) | self.data["low"].isposinf() | self.data["high"].isneginf()
        shown = shown | crossed.any(-1)
        if not s.shape[-1]:
            return torch.logical_and(shown, ~y.isnan().any(-1))
        gram = sets.factor.gram
        guess = splitting(s, sets.low, sets.high, gram, self.iterations)
        rows = identify(s, sets.low, sets.high, gram, guess, self.rounds).farkas
        most = torch.where(rows > 0, rows * sets.high, torch.where(rows < 0, rows * sets.low, 0.0)).sum(-1)
        gap = (rows * s).sum(-1) - most
        apart = FAR * size * times(rows, gram.rows).norm(dim=-1)
        return torch.logical_or(shown, (gap > self.tol * size) & (gap >= apart))


def lengths(matrix: Tensor) -> Tensor:
    """(..., m, n) -> (..., m): of its rows, 1 of a row of zeros; detached, since they only scale."""
    length: Tensor = torch.linalg.vector_norm(matrix.detach(), dim=-1)
    return length.masked_fill(length == 0, 1.0)


def _values(matrix: Tensor, y: Tensor) -> Tensor:
    """(m, n) or (B, m, n), y (blocks, B, n) -> (blocks, B, m)."""
    return y @ matrix.mT if matrix.ndim == 2 else (matrix @ y[..., None])[..., 0]
