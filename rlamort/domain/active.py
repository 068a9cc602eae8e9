"""Which inequalities hold with equality at a projection: splitting, and then an exact dual active-set method.

All is in the coordinates of the rows: with y = y0 - P A' lam, A y = s - G lam, where G = P-projected A times its transpose,
of unit rows. B items · m rows · s, low, high, lam (B, m) · G (m, m), or (B, m, m) where A comes with each item.

Solved items leave the batch, which changes no item's answer, only the time that others take.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-13  # added to the diagonal of what is factored
DEPENDENT = 1e-6  # squared distance of a unit row to the span of those before, below which it is left out of a guess
SPANNED = 1e-11  # the same for a row that is to be added, where that distance is not computed from products
ADAPT = 15  # iterations of the splitting between changes of its penalty, and between looks at its signs
STRAYS = 0.01  # share of items whose signs may still change when it ends
ROUNDING = 5e-15  # of a row, in sizes of the item's data


class Gram(NamedTuple):
    """Unit rows, their products G, and its eigendecomposition, so that each item may have a penalty of its own."""

    rows: Tensor  # (m, n) or (B, m, n): those of A, projected onto E's null space
    matrix: Tensor  # (m, m) or (B, m, m)
    vectors: Tensor  # the same shape
    values: Tensor  # (m,) or (B, m), >= 0

    def take(self, items: Tensor) -> "Gram":
        return self if self.matrix.ndim == 2 else Gram(*(part[items] for part in self))


class Active(NamedTuple):
    side: Tensor  # (B, m): 1 where y is at `high`, -1 at `low`, 0 where the row is inactive
    farkas: Tensor  # (B, m): a combination of rows which shows that an item's set is empty; 0 where none was met
    solved: Tensor  # (B,) bool: every row holds to rounding
    block: "Block | None"  # of the active rows of all items, if it is at hand


def times(v: Tensor, matrix: Tensor) -> Tensor:
    """v (B, i), matrix (i, j) or (B, i, j) -> (B, j)."""
    return v @ matrix if matrix.ndim == 2 else (v[:, None] @ matrix)[:, 0]


def splitting(s: Tensor, low: Tensor, high: Tensor, gram: Gram, iterations: int) -> Tensor:
    """Signs of the multipliers lam (B, m), by over-relaxed ADMM on |y - y0|^2 / 2 subject to A y = z, low <= z <= high.

    The x-update needs A y alone, and with the eigenvectors of G no factorisation when an item's penalty changes. The penalty
    balances the residuals (Boyd et al., 2011, 3.4.1), and the relaxation is 1.6. It is a guess, so it is made in float32, and
    ends before `iterations` where the signs of nearly all items stay.
    """
    s, low, high, vectors, values = (part.float() for part in (s, low, high, gram.vectors, gram.values))
    rho, z, u, sign = torch.ones_like(s[:, :1]), s.clamp(low, high), torch.zeros_like(s), torch.zeros_like(s)
    gain = 1.6 / (rho * values + 1)
    for i in range(1, iterations + 1):
        step = times(times(s - z + u, vectors) * gain, vectors.mT)  # A y is z - u + step / 1.6
        w = torch.add(z, u, alpha=-0.6) + step
        after = w.clamp(low, high)
        last, u = u, w - after
        if i % ADAPT == 0:
            before, sign = sign, u.sign()
            if int((before != sign).any(-1).sum()) <= STRAYS * len(s):
                break
            moved = rho * (times(after - z, vectors) * values.sqrt()).norm(dim=-1, keepdim=True)
            factor = ((u - last).norm(dim=-1, keepdim=True) / moved).sqrt().nan_to_num(1.0, posinf=10.0).clamp(0.1, 10)
            changed = (rho * factor).clamp(1e-4, 1e4)
            u, rho = u * rho / changed, changed
            gain = 1.6 / (rho * values + 1)
        z = after
    return u.sign().to(gram.values)


def magnitudes(s: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(B,): the largest finite number of each item."""
    return torch.stack([part.abs().where(part.isfinite(), 0) for part in (s, low, high)]).amax((0, -1))


def within(s: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(B,) bool: whether every row of an item holds to rounding."""
    return (torch.maximum(low - s, s - high).amax(-1) <= ROUNDING * magnitudes(s, low, high)).logical_and(~s.isnan().any(-1))


def identify(s: Tensor, low: Tensor, high: Tensor, gram: Gram, guess: Tensor, rounds: int) -> Active:
    """`active_set` from the signs of `guess` (B, m); where rounding of nearly dependent rows stops it, once more from none."""
    found = active_set(s, low, high, gram, guess, rounds)
    lost = ~found.solved
    if bool(lost.any()):
        again = active_set(s[lost], low[lost], high[lost], gram.take(lost), torch.zeros_like(s[lost]), rounds)
        for kept, part in zip(found[:3], again[:3], strict=True):
            kept[lost] = part
        return found._replace(block=None)
    return found


def active_set(s: Tensor, low: Tensor, high: Tensor, gram: Gram, guess: Tensor, rounds: int) -> Active:
    """The dual active-set method of Goldfarb and Idnani (1983), of all items at once, from the signs of `guess` (B, m).

    A round is one factorisation: wrong signs and dependent rows of the guess are dropped first; then the most violated row is
    added, and rows whose multiplier reaches 0 on the way are dropped. The dual objective grows with every row that is added, so
    it ends. Where a violated row depends on active ones and none of these can be dropped, no point satisfies them all.
    """
    side, farkas = guess.sign().nan_to_num(0.0), torch.zeros_like(s)
    sides, solved = side.clone(), torch.zeros(len(s), dtype=torch.bool, device=s.device)
    size = magnitudes(s, low, high)
    # from afar what is left is larger; from close by, where the guess is empty, rounding alone
    near = (guess == 0).all(-1)
    slack = torch.where(near, ROUNDING, 1e-13 * max(10, s.shape[-1])) * size
    items = torch.arange(len(s), device=s.device)
    row = torch.full_like(items, -1)  # being added; -1 for none
    waived = torch.zeros_like(s, dtype=torch.bool)  # rows that hold only to rounding
    weight, fresh = torch.zeros_like(size), torch.ones_like(solved)  # its multiplier so far; whether the guess is still mended
    for _ in range(rounds):
        free, active, every = low == high, side != 0, torch.arange(len(s), device=s.device)
        block, pending = Block.of(gram, active), row >= 0
        at = row.clamp(min=0)
        bound = torch.where(side > 0, high, torch.where(side < 0, low, s))
        added = torch.where(pending, weight, 0.0)[:, None]
        lam = block.solve(s - bound - added * _row(gram, at)).scatter_add(-1, at[:, None], added)
        # the guess is mended until its multipliers have the right signs
        torn = block.failed > 0
        wrong = active & ((block.pivots(s) < DEPENDENT) | (~torn[:, None] & ~free & (lam * side < 0)))
        fresh = (fresh | torn) & wrong.any(-1)
        side = torch.where(fresh[:, None] & wrong, 0.0, side)
        # the most violated row, unless one is being added
        w = s - times(lam, gram.matrix)
        worst, most = torch.maximum(low - w, w - high).masked_fill(active | waived, -1).max(-1)
        done = ~fresh & ~pending & ~(worst > slack)
        tight = ~((w - bound).masked_fill(~active, 0).abs().amax(-1) > 1e4 * slack)  # else the active rows have no common point
        if bool(done.all()):  # as after a good guess
            sides[items], solved[items] = side, tight
            return Active(sides, farkas, solved, block if len(items) == len(sides) else None)
        moves = ~fresh & ~done
        begins = moves & ~pending
        at, weight = torch.where(begins, most, at), torch.where(begins, 0.0, weight)
        # how far its multiplier goes until the row holds, or until that of an active one is 0
        value, below, above = (part[every, at] for part in (w, low, high))
        sign = torch.where(value - above > below - value, 1.0, -1.0).to(s)
        beyond = torch.maximum(value - above, below - value)
        slope = block.solve(_row(gram, at))
        shown = (-slope * sign[:, None]).scatter(-1, at[:, None], sign[:, None])
        apart = times(shown, gram.rows).square().sum(-1)
        whole = torch.where(apart > SPANNED, beyond.clamp(min=0) / apart, torch.inf)
        rate = side * sign[:, None] * slope
        falls = active & ~free & (rate > 1e-10 * slope.abs().amax(-1, keepdim=True))
        least, first = torch.where(falls, (lam * side).clamp(min=0) / rate, torch.inf).min(-1)
        # a row that depends on active ones is off by their rounding, enlarged by its coefficients: that is no violation
        rounding = moves & (apart <= SPANNED) & (beyond <= 10 * slack * (1 + slope.abs().sum(-1)))
        waived = waived | (rounding[:, None] & (torch.arange(s.shape[-1], device=s.device) == at[:, None]))
        moves, fresh = moves & ~rounding, fresh | rounding
        stuck = moves & least.isinf() & whole.isinf()
        full, part = moves & ~stuck & (whole <= least), moves & ~stuck & (whole > least)
        side[every[full], at[full]] = sign[full]
        side[every[part], first[part]] = 0
        weight = torch.where(part, weight + least * sign, weight)
        row = torch.where(part, at, -1)  # one that was being added when the factor failed is met again
        farkas[items[stuck]] = shown[stuck]
        sides[items], solved[items] = side, done & tight
        left = ~(done | stuck)
        if not bool(left.any()):
            break
        gram = gram.take(left)
        s, low, high, side, slack = s[left], low[left], high[left], side[left], slack[left]
        items, row, weight, fresh, waived = items[left], row[left], weight[left], fresh[left], waived[left]
    return Active(sides, farkas, solved, None)


def least_violating(s: Tensor, low: Tensor, high: Tensor, gram: Gram, rounds: int) -> Tensor:
    """lam (B, m) whose y has the least sum of squared distances to the rows, and is nearest to y0 among those, to about 1e-7.

    Newton's method on that sum, whose pieces are quadratic, with a line search by bisection, which makes it monotone.
    """
    delta, lam, w = 1e-8, torch.zeros_like(s), s
    for _ in range(rounds):
        target = w.clamp(low, high)
        inside = (w != target).to(s.dtype)
        factor = torch.linalg.cholesky_ex(_masked(gram.matrix, inside, delta))[0]
        full = torch.cholesky_solve(((s - target) * inside)[..., None], factor)[..., 0]
        turn, fall = full - lam, times(full - lam, gram.matrix)
        start, end = torch.zeros_like(s[:, :1]), torch.ones_like(s[:, :1])
        at = end
        for _ in range(30):
            there = w - at * fall
            falling = (fall * (delta * (lam + at * turn) - there + there.clamp(low, high))).sum(-1, keepdim=True) < 0
            start, end = torch.where(falling, at, start), torch.where(falling, end, at)
            at = (start + end) / 2
        lam = lam + at * turn
        w = s - times(lam, gram.matrix)
    return lam


def _masked(matrix: Tensor, active: Tensor, delta: float) -> Tensor:
    return matrix * active[:, :, None] * active[:, None] + torch.diag_embed(delta + 1 - active)


def _row(gram: Gram, at: Tensor) -> Tensor:
    """(B, m): row at (B,) of each item's G."""
    return gram.matrix[at] if gram.matrix.ndim == 2 else gram.matrix[torch.arange(len(at), device=at.device), at]


class Block(NamedTuple):
    """G on the active rows of each item, factored; gathered first, since active rows are few."""

    order: Tensor  # (B, k): the active rows, and then others
    mask: Tensor  # (B, k): 1 where active
    matrix: Tensor  # (B, k, k), of those alone
    factor: Tensor  # (B, k, k)
    failed: Tensor  # (B,): 0, or the first minor that is not positive, counted from 1

    @classmethod
    def of(cls, gram: Gram, active: Tensor) -> "Block":
        count = max(1, int(active.sum(-1).max()))
        order = (~active).to(torch.int8).argsort(dim=-1, stable=True)[:, :count]
        mask = active.gather(-1, order).to(gram.values.dtype)
        if gram.matrix.ndim == 2:
            block = gram.matrix[order[:, :, None], order[:, None]]
        else:
            every = torch.arange(len(order), device=order.device)[:, None, None]
            block = gram.matrix[every, order[:, :, None], order[:, None]]
        block.mul_(mask[:, :, None]).mul_(mask[:, None]).diagonal(dim1=-2, dim2=-1).add_(1 - mask)
        jittered = block.clone()
        jittered.diagonal(dim1=-2, dim2=-1).add_(TINY)
        return cls(order, mask, block, *torch.linalg.cholesky_ex(jittered))

    def solve(self, right: Tensor) -> Tensor:
        """right (B, m) -> G_JJ^-1 right_J, 0 elsewhere (B, m)."""
        part = (right.gather(-1, self.order) * self.mask)[..., None]
        found = torch.cholesky_solve(part, self.factor)
        found = found + torch.cholesky_solve(part - self.matrix @ found, self.factor)  # without what the diagonal changed
        return torch.zeros_like(right).scatter(-1, self.order, found[..., 0])

    def pivots(self, like: Tensor) -> Tensor:
        """(B, m): squared distances of the active rows to the span of those before, 1 elsewhere; 0 alone where it failed."""
        found = self.factor.diagonal(dim1=-2, dim2=-1).square()
        place = torch.arange(1, found.shape[-1] + 1, device=like.device)
        found = torch.where(self.failed[:, None] > 0, (place != self.failed[:, None]).to(found), found)
        return torch.ones_like(like).scatter(-1, self.order, found)
