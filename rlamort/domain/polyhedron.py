"""Affine sets and polyhedra as domains, whose data may come with each item.

y solution (..., B, n) · v unconstrained (..., B, inputs) · m rows
"""

import copy
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlamort.domain.base import Data, Domain, PerItem, checked, lacking, magnitude
from rlamort.domain.rows import Rows
from rlamort.errors import UserError

Numbers = Any  # a list, an array or a tensor of numbers, or PerItem


class Affine(Domain):
    """{y : A y = b}. `project` is completion: with A fixed, n - rank(A) unconstrained numbers are a point of its null space.

    So equalities hold exactly for every v, as in DC3 (Donti, Rolnick and Kolter, 2021), in an orthonormal basis. Where A comes
    with each item, so does its rank, and `project` is `nearest`. Dependent rows are allowed; where they contradict each other,
    answers are least-squares points of the rows at unit length, whose `violation` says so.

    Args:
        A: (m, n), fixed, or `PerItem(m, n)`.
        b: (m,), fixed, or `PerItem(m)`.

    Raises:
        UserError: data are no numbers, are not finite, differ in size, or contradict each other.
    """

    def __init__(self, A: Numbers, b: Numbers) -> None:
        super().__init__()
        E, tol = _matrix("Affine.A", A, None)
        m, n = E.shape
        bound = _vector("Affine.b", b, m)
        none = torch.zeros(0, n, dtype=torch.float64)
        self.rows = Rows({"E": E, "b": bound, "A": none, "low": none[:, 0], "high": none[:, 0]}, tol)
        self.needs = {"A" if name == "E" else name: shape for name, shape in self.rows.needs.items()}
        self.dim, self.inputs = n, _inputs(self.rows, n)
        _refuse_empty(self)

    def bind(self, data: Data) -> "Affine":
        checked(self, data, "Affine")
        return _bound(self, {"E" if name == "A" else name: part for name, part in data.items()})

    def project(self, v: Tensor) -> Tensor:
        return _completed(self, self.rows, v) if self.rows.chart else self.nearest(v)

    def polyhedral(self) -> dict[str, Tensor] | None:
        return None if self.needs else dict(self.rows.data)

    def nearest(self, y: Tensor) -> Tensor:
        return _nearest(self, self.rows, y)

    def violation(self, y: Tensor) -> Tensor:
        return _violation(self, self.rows, y)

    def empty(self) -> Tensor:
        """(B,) bool, or (1,) of fixed data: whether the equations of an item contradict each other."""
        return self.rows.empty()


class Polyhedron(Domain):
    """{y : low <= A y <= high, E y = b}; `project` completes the equalities E y = b, and then is `nearest`.

    Entries of `low` and `high` may be infinite, or equal. Bounds on y itself are rows of the identity: the intersection of a
    box and an affine set is `Polyhedron(torch.eye(n), low, high, E, b)`. Equalities belong into E, where they cost least.

    `nearest` guesses the active rows by operator splitting with over-relaxation, as Pi-net does (Terpin et al., 2026), makes
    them exact by a dual active-set method (Goldfarb and Idnani, 1983), and solves for the point of that face, in float64. Its
    derivatives, in y and all data, are those of the face (implicit function theorem), of every order. Where a set is empty,
    answers are points of least squared distance to the rows at unit length, without derivatives; `violation` says so, and
    `empty` proves it.

    Args:
        A: (m, n), fixed, or `PerItem(m, n)`.
        low: (m,), one number for all, or `PerItem(m)`.
        high: as `low`.
        E: (k, n), fixed, or `PerItem(k, n)`; None for no equalities.
        b: (k,), one number for all, or `PerItem(k)`.

    Raises:
        UserError: data are no numbers, are NaN, differ in size, cross, or leave no point.
    """

    def __init__(self, A: Numbers, low: Numbers, high: Numbers, E: Numbers = None, b: Numbers = None) -> None:
        super().__init__()
        if (E is None) != (b is None):
            raise UserError(f"Polyhedron.{'b' if E is not None else 'E'}: None is given; E and b are needed together")
        rows, tol = _matrix("Polyhedron.A", A, None)
        m, n = rows.shape
        equal, also = (torch.zeros(0, n, dtype=torch.float64), 0.0) if E is None else _matrix("Polyhedron.E", E, n)
        ends = [_vector("Polyhedron.low", low, m, infinite=True), _vector("Polyhedron.high", high, m, infinite=True)]
        if all(isinstance(end, Tensor) for end in ends):
            for i, (least, most) in enumerate(zip(*(end.tolist() for end in ends if isinstance(end, Tensor)), strict=True)):
                if least > most or least == torch.inf or most == -torch.inf:
                    raise UserError(f"Polyhedron.low: {least} with high {most} in row {i}; low <= high is needed")
        bound = torch.zeros(0, dtype=torch.float64) if b is None else _vector("Polyhedron.b", b, equal.shape[0])
        self.rows = Rows({"E": equal, "b": bound, "A": rows, "low": ends[0], "high": ends[1]}, max(tol, also))
        self.needs = dict(self.rows.needs)
        self.dim, self.inputs = n, _inputs(self.rows, n)
        _refuse_empty(self)

    def bind(self, data: Data) -> "Polyhedron":
        checked(self, data, "Polyhedron")
        return _bound(self, data)

    def project(self, v: Tensor) -> Tensor:
        return self.nearest(_completed(self, self.rows, v) if self.rows.chart else v)

    def polyhedral(self) -> dict[str, Tensor] | None:
        return None if self.needs else dict(self.rows.data)

    def nearest(self, y: Tensor) -> Tensor:
        return _nearest(self, self.rows, y)

    def violation(self, y: Tensor) -> Tensor:
        return _violation(self, self.rows, y)

    def empty(self) -> Tensor:
        """(B,) bool, or (1,) of fixed data: whether a certificate shows that an item's set has no point."""
        if self.needs:
            raise lacking(self)
        return self.rows.empty()

    def around(self) -> tuple[Tensor, Tensor] | None:
        """From rows of A with a single entry, which bound y itself; None unless they bound every coordinate of every item."""
        if self.needs:
            raise lacking(self)
        A, low, high = (self.rows.data[name] for name in ("A", "low", "high"))
        column = A.abs().argmax(-1)  # (m,) or (B, m)
        entry = A.gather(-1, column[..., None])[..., 0]
        alone = (A != 0).sum(-1) == 1
        ends = torch.stack(list(torch.broadcast_tensors(low / entry, high / entry)))  # type: ignore[no-untyped-call]
        least, most = (end.where(alone, infinite) for end, infinite in ((ends.amin(0), -torch.inf), (ends.amax(0), torch.inf)))
        shape = (*least.shape[:-1], self.dim)
        at = column.expand(least.shape)
        low = torch.full(shape, -torch.inf).to(least).scatter_reduce(-1, at, least, "amax")
        high = torch.full(shape, torch.inf).to(most).scatter_reduce(-1, at, most, "amin")
        return (low, high) if bool((low.isfinite() & high.isfinite()).all()) else None

    def compact(self) -> Tensor:
        """Whether 0 alone is a direction in which no row ends: E d = 0, A d <= 0 of finite `high`, and >= 0 of finite `low`.

        That is where these rows span R^n, and 0 is a combination of them in which all inequalities have positive weights
        (Stiemke's lemma), which is a linear program.
        """
        if self.around() is not None:
            return torch.ones(1, dtype=torch.bool)
        items, fixed = range(self.rows.count or 1), all(self.rows.data[name].ndim == 2 for name in "EA")
        known: dict[Any, bool] = {}  # of fixed matrices, by which rows are finite
        found = []
        for item in items:
            E, A, low, high = (self.rows.item(name, item).numpy(force=True) for name in ("E", "A", "low", "high"))
            above, below = np.isfinite(high), np.isfinite(low)
            key = (above.tobytes(), below.tobytes()) if fixed else item
            if key not in known:
                known[key] = _spanned(E, np.concatenate([A[above], -A[below]]), self.rows.tol)
            found.append(known[key])
        return torch.tensor(found)

    def linear(self, g: Tensor) -> Tensor:
        """By SciPy's HiGHS, an item at a time on the host: for certificates, not for updates. NaN where a set is empty."""
        from scipy.optimize import linprog  # here, since importing it takes longer than most runs of `linear`

        if self.needs:
            raise lacking(self)
        slopes = self.rows.points(g, "Polyhedron.linear").detach()
        slopes = slopes / magnitude(slopes)
        found = np.full(slopes.shape, np.nan)
        for block, item in np.ndindex(*slopes.shape[:2]):
            E, A, b, low, high = (self.rows.item(name, item).numpy(force=True) for name in ("E", "A", "b", "low", "high"))
            above, below = np.isfinite(high), np.isfinite(low)
            answer = linprog(
                slopes[block, item].numpy(force=True),
                np.concatenate([A[above], -A[below]]), np.concatenate([high[above], -low[below]]), E, b, bounds=(None, None),
            )  # fmt: skip
            if answer.status == 3:
                return super().linear(g)
            if answer.status == 0:
                found[block, item] = answer.x
        with torch.no_grad():  # a linear program's tolerances are no rounding
            return self.rows.nearest(torch.from_numpy(found).to(slopes)).view(g.shape).to(g.dtype)


def _spanned(E: np.ndarray, G: np.ndarray, tol: float) -> bool:
    """Whether d = 0 is the only solution of E d = 0 and G d <= 0."""
    from scipy.optimize import linprog  # as in `linear`

    rows = np.concatenate([G, E])
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True).clip(np.finfo(float).tiny)
    if not np.isfinite(rows).all() or np.linalg.matrix_rank(rows, tol=tol * len(rows) ** 0.5) < rows.shape[-1]:
        return False
    weights = [(1, None)] * len(G) + [(None, None)] * len(E)
    answer = linprog(np.zeros(len(rows)), A_eq=rows.T, b_eq=np.zeros(rows.shape[-1]), bounds=weights)
    return bool(answer.status == 0)


D = TypeVar("D", Affine, Polyhedron)


def _nearest(domain: Domain, rows: Rows, y: Tensor) -> Tensor:
    if domain.needs:
        raise lacking(domain)
    return rows.nearest(rows.points(y, f"{type(domain).__name__}.nearest")).view(y.shape).to(y.dtype)


def _violation(domain: Domain, rows: Rows, y: Tensor) -> Tensor:
    if domain.needs:
        raise lacking(domain)
    return rows.violation(rows.points(y, f"{type(domain).__name__}.violation")).view(y.shape[:-1]).to(y.dtype)


def _completed(domain: Domain, rows: Rows, v: Tensor) -> Tensor:
    """v (..., inputs) -> y (..., n) with E y = b, the rows of a fixed E."""
    if domain.needs:
        raise lacking(domain)
    assert rows.chart is not None
    inverse, basis = rows.chart
    return (rows.data["b"] @ inverse.mT + v.double() @ basis.mT).to(v.dtype)


def _inputs(rows: Rows, n: int) -> int:
    return n if rows.chart is None else rows.chart[1].shape[-1]


def _bound(domain: D, data: Data) -> D:
    bound = copy.copy(domain)
    bound._modules, bound.needs, bound.itemwise = {**domain._modules, "rows": domain.rows.bind(data)}, {}, bool(data)
    return bound


def _refuse_empty(domain: Affine | Polyhedron) -> None:
    if not domain.needs and bool(domain.empty().any()):
        raise UserError(f"{type(domain).__name__}: no point satisfies its rows; a set that is not empty is needed")


def _matrix(field: str, given: Numbers, columns: int | None) -> tuple[Tensor | PerItem, float]:
    """Its values in float64, and below which part of the largest its singular values are 0."""
    if isinstance(given, PerItem):
        shape = given.shape
        if len(shape) != 2 or (columns or shape[-1]) != shape[-1]:
            raise UserError(f"{field}: PerItem{shape} is given; PerItem(rows, {columns or 'columns'}) is needed")
        return given, max(shape) * torch.finfo(torch.float32).eps  # what comes with items has usually been in float32
    matrix, eps = _numbers(field, given)
    if matrix.ndim != 2 or not matrix.shape[-1] or (columns or matrix.shape[-1]) != matrix.shape[-1]:
        raise UserError(f"{field}: shape {tuple(matrix.shape)} is given; a matrix (rows, {columns or 'columns'}) is needed")
    if not matrix.isfinite().all():
        row = int((~matrix.isfinite()).any(-1).nonzero()[0])
        raise UserError(f"{field}: {matrix[row].tolist()} is given in row {row}; finite numbers are needed")
    return matrix, max(matrix.shape) * eps


def _vector(field: str, given: Numbers, count: int, infinite: bool = False) -> Tensor | PerItem:
    if isinstance(given, PerItem):
        if given.shape != (count,):
            raise UserError(f"{field}: PerItem{given.shape} is given; PerItem({count}), a number a row, is needed")
        return given
    vector, _ = _numbers(field, given)
    vector = vector.expand(count) if vector.ndim == 0 else vector
    if vector.shape != (count,):
        raise UserError(f"{field}: shape {tuple(vector.shape)} is given; a number a row, ({count},), is needed")
    bad = vector.isnan() if infinite else ~vector.isfinite()
    if bad.any():
        row = int(bad.nonzero()[0])
        allowed = "a number" if infinite else "a finite number"
        raise UserError(f"{field}: {vector[row]} is given in row {row}; {allowed} is needed")
    return vector


def _numbers(field: str, given: Numbers) -> tuple[Tensor, float]:
    try:
        tensor = torch.as_tensor(given).detach()
        eps = torch.finfo(tensor.dtype if isinstance(given, Tensor) and tensor.is_floating_point() else torch.float64).eps
        return torch.as_tensor(given, dtype=torch.float64).detach(), eps
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{field}: {given!r} is given; numbers are needed") from error
