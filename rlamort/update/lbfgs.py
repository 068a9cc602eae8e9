"""Limited-memory BFGS."""

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.config import Count, Positive
from rlamort.domain import Domain, nearest_each
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.update.base import Update, push


class Lbfgs(Update):
    """Limited-memory BFGS with a parallel line search over the step sizes 1.5^-j, per item.

    It uses the gradient mapping (y - nearest(y - s grad f)) / s, which is the gradient in the interior of Y and the gradient
    on the active face at its boundary; s is the Barzilai-Borwein step size. The largest step that satisfies Armijo's condition
    along the projection onto Y is taken. If none does, the item stays and its history is cleared, so that its next step is a
    spectral projected gradient step (Birgin et al., 2000). Two-loop recursion: Nocedal and Wright (2006), algorithm 7.4.

    Args:
        domain: Y, onto which candidates are projected.
        history: M, the number of curvature pairs.
        candidates: number of step sizes in the line search.
        decrease: Armijo's constant, the required fraction of the predicted decrease.
    """

    def __init__(self, domain: Domain, history: Count = 10, candidates: Count = 10, decrease: Positive = 1e-4) -> None:
        super().__init__()
        if history < 1 or candidates < 1:
            raise UserError(f"update.history, candidates: {history}, {candidates} given; at least 1 of each is needed")
        self.domain, self.history, self.candidates, self.decrease = domain, history, candidates, decrease

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        pairs, numbers = y.new_zeros(len(y), self.history, y.shape[-1]), y.new_zeros(len(y), self.history)
        return pairs, pairs, numbers, numbers[:, 0], y, torch.zeros_like(y)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        moves, bends, rho, scale, y_last, slope_last = h  # rho = 0 marks a pair that is not there
        gradient = oracle.grad(y)
        first = 1 / torch.linalg.vector_norm(gradient, dim=-1).clamp_min(1)
        scale = torch.where(scale > 0, scale, first)
        slope = (y - self.domain.at(x).nearest(y - scale[:, None] * gradient)) / scale[:, None]

        move, bend = y - y_last, slope - slope_last
        curvature, square = (move * bend).sum(-1), bend.square().sum(-1)
        convex = curvature > 1e-10 * square  # False before the first move
        keep = convex[:, None]
        moves = torch.where(keep[..., None], push(moves, move), moves)
        bends = torch.where(keep[..., None], push(bends, bend), bends)
        rho = torch.where(keep, push(rho, 1 / torch.where(convex, curvature, 1)), rho)
        scale = torch.where(convex, curvature / torch.where(convex, square, 1), scale)

        direction = -self._newton(slope, moves, bends, rho, scale)
        with torch.no_grad():
            sizes = 1.5 ** -torch.arange(self.candidates, dtype=y.dtype, device=y.device)
            points = nearest_each(self.domain, x, y + sizes[:, None, None] * direction)  # (J, B, n)
            values = oracle.values(torch.cat([y[None], points]))
            predicted = (slope * (points - y)).sum(-1)  # not gradient, whose part across the face cancels only to rounding
            rounding = torch.finfo(y.dtype).eps * values[0].abs()  # close to a solution f tells nothing, its gradient does
            enough = values[0] + self.decrease * predicted + rounding
            fits = (predicted < 0) & (values[1:] <= enough)  # (J, B), False where NaN
            found = fits.any(0)
            size = sizes[fits.int().argmax(0)]
        step = torch.where(found[:, None], size[:, None] * direction, 0)

        plain = (rho == 0).all(-1)  # it was a gradient step, so what failed was its length
        scale = torch.where(~found & plain, scale * sizes[-1], scale)
        rho = torch.where(found[:, None], rho, 0)
        return y + step, (moves, bends, rho, scale, y, slope)

    def _newton(self, slope: Tensor, moves: Tensor, bends: Tensor, rho: Tensor, scale: Tensor) -> Tensor:
        """The approximate inverse Hessian times slope (B, n)."""
        q, shares = slope, []
        for i in reversed(range(self.history)):
            shares.append(rho[:, i, None] * (moves[:, i] * q).sum(-1, keepdim=True))
            q = q - shares[-1] * bends[:, i]
        q = scale[:, None] * q
        for i in range(self.history):
            q = q + (shares.pop() - rho[:, i, None] * (bends[:, i] * q).sum(-1, keepdim=True)) * moves[:, i]
        return q
