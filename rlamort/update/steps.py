"""One step of a solver, y -> y, classical or learned. How losses differentiate through it is `adjoint.py`'s.

x context (B, d) · y solution (B, n) · f cost (B,) · h carry: tensors with leading axis B · S samples · M history · k step

Every step works inside no_grad, has fixed shapes, and treats each item of the batch as if it were alone.
"""

import math

import torch
from torch import Tensor, nn

from rlamort.adjoint import Carry
from rlamort.config import Count, Fraction, NonNegative, Positive
from rlamort.domain import CappedSimplex, Domain
from rlamort.errors import UserError
from rlamort.objective import Oracle


class Update(nn.Module):
    """(y, h) -> (y, h), on what an oracle tells of f(.; x). The result may lie outside Y; `Unroll` takes it back."""

    def start(self, y: Tensor, x: Tensor) -> Carry:
        """The carry h before the first step from y (B, n)."""
        return ()

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        """One step."""
        raise NotImplementedError


class Fixed(nn.Module):
    """The same step size everywhere.

    Args:
        rate: step size.
    """

    def __init__(self, rate: Positive) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, y: Tensor, k: Tensor) -> Tensor:
        """Steps k (B,) at y (B, n) -> step sizes that multiply a gradient (B, n)."""
        return torch.full_like(y[..., :1], self.rate)


class Learned(nn.Module):
    """A step size of its own for each coordinate and step, learned as a logarithm (Li et al., 2017: Meta-SGD).

    Args:
        rate: step sizes before training.
        dim: n.
        steps: how many steps have their own; later ones use the last.
    """

    def __init__(self, rate: Positive, dim: Count, steps: Count = 1) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((steps, dim), math.log(rate)))

    def forward(self, y: Tensor, k: Tensor) -> Tensor:
        """Steps k (B,) at y (B, n) -> step sizes (B, n)."""
        return self.log[k.clamp(max=len(self.log) - 1)].exp()


class Gradient(Update):
    """Gradient descent, y - rate * m with m = momentum * m + grad f(y; x), each item by its own gradient.

    Args:
        rate: step size: a number, `Fixed`, or `Learned`.
        momentum: of the heavy ball (Polyak, 1964).
        clip: the longest gradient, per item; longer ones are scaled down to it.
    """

    def __init__(self, rate: Positive | nn.Module, momentum: Fraction = 0.0, clip: Positive = math.inf) -> None:
        super().__init__()
        self.rate = rate if isinstance(rate, nn.Module) else Fixed(rate)
        self.momentum, self.clip = momentum, clip

    def start(self, y: Tensor, x: Tensor) -> Carry:
        return torch.zeros_like(y), torch.zeros(len(y), dtype=torch.long, device=y.device)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        velocity, k = h
        slope = oracle.grad(y)
        norm = torch.linalg.vector_norm(slope, dim=-1, keepdim=True)
        long = norm > self.clip
        slope = slope * torch.where(long, self.clip / torch.where(long, norm, 1), 1)
        velocity = self.momentum * velocity + slope
        return y - self.rate(y, k) * velocity, (velocity, k + 1)


class LogSign(nn.Module):
    """g -> (log|g| / p, sign g) per coordinate, and (-1, e^p g) below e^-p (Andrychowicz et al., 2016, appendix A).

    Args:
        p: how many powers of e below 1 are told apart.
    """

    def __init__(self, p: Positive = 10.0) -> None:
        super().__init__()
        self.p = p

    def size(self, dim: int) -> int:
        """How many numbers encode `dim`."""
        return 2 * dim

    def forward(self, slope: Tensor) -> Tensor:
        """(B, n) -> (B, 2 n)."""
        large = slope.abs() >= math.exp(-self.p)
        log = torch.where(large, slope, 1).abs().log() / self.p
        sign = torch.where(large, slope.sign(), math.exp(self.p) * slope)
        return torch.cat([torch.where(large, log, -1), sign], dim=-1)


class Normed(nn.Module):
    """g -> (g / |g|, log|g|), the norm of each item by itself.

    Args:
        epsilon: added in quadrature to |g|, so that g = 0 has an encoding.
    """

    def __init__(self, epsilon: Positive = 1e-8) -> None:
        super().__init__()
        self.epsilon = epsilon

    def size(self, dim: int) -> int:
        """How many numbers encode `dim`."""
        return dim + 1

    def forward(self, slope: Tensor) -> Tensor:
        """(B, n) -> (B, n + 1)."""
        norm = (slope.square().sum(-1, keepdim=True) + self.epsilon**2).sqrt()
        return torch.cat([slope / norm, norm.log()], dim=-1)


class Gru(nn.GRUCell):
    """A gated recurrent unit whose carry is a tuple, the first of which is its output."""

    def start(self, y: Tensor) -> Carry:
        return (y.new_zeros(len(y), self.hidden_size),)

    def forward(self, inputs: Tensor, h: Carry) -> Carry:  # type: ignore[override]
        return (super().forward(inputs, *h),)


class Lstm(nn.LSTMCell):
    """A long short-term memory cell whose carry is a tuple, the first of which is its output."""

    def start(self, y: Tensor) -> Carry:
        return y.new_zeros(len(y), self.hidden_size), y.new_zeros(len(y), self.hidden_size)

    def forward(self, inputs: Tensor, h: Carry) -> Carry:  # type: ignore[override]
        return super().forward(inputs, (h[0], h[1]))


class Additive(nn.Module):
    """y + net(out), small before training.

    Args:
        hidden: numbers in the cell's output.
        dim: n.
    """

    def __init__(self, hidden: Count, dim: Count) -> None:
        super().__init__()
        self.change = nn.Linear(hidden, dim)
        with torch.no_grad():
            self.change.weight.mul_(0.1)
            self.change.bias.zero_()

    def forward(self, y: Tensor, out: Tensor) -> Tensor:
        moved: Tensor = y + self.change(out)
        return moved


class Gated(nn.Module):
    """gate * y + (1 - gate) * proposal, per coordinate (Marino et al., 2018); close to y before training.

    Args:
        hidden: numbers in the cell's output.
        dim: n.
    """

    def __init__(self, hidden: Count, dim: Count) -> None:
        super().__init__()
        self.gate, self.proposal = nn.Linear(hidden, dim), nn.Linear(hidden, dim)
        nn.init.constant_(self.gate.bias, 2.0)

    def forward(self, y: Tensor, out: Tensor) -> Tensor:
        gate = self.gate(out).sigmoid()
        moved: Tensor = gate * y + (1 - gate) * self.proposal(out)
        return moved


class Recurrent(Update):
    """A learned update: a recurrent cell reads y and an encoding of grad f(y; x), and a head moves y.

    Andrychowicz et al. (2016) with LogSign, Lstm and Additive; Marino et al. (2018) with a Gated head.

    Args:
        dim: n.
        hidden: numbers in the cell's output.
        contexts: d, for a cell that also reads x; 0 for one that does not.
        cell: Gru or Lstm.
        encoding: LogSign or Normed, which keep a gradient's magnitude and bound its numbers.
        head: Additive or Gated.
    """

    def __init__(
        self,
        dim: Count,
        hidden: Count = 64,
        contexts: int = 0,
        cell: type[Gru | Lstm] = Gru,
        encoding: LogSign | Normed | None = None,
        head: type[Additive | Gated] = Additive,
    ) -> None:
        super().__init__()
        self.encoding = encoding or LogSign()
        self.contexts = contexts
        self.cell = cell(dim + self.encoding.size(dim) + contexts, hidden)
        self.head = head(hidden, dim)

    def start(self, y: Tensor, x: Tensor) -> Carry:
        return self.cell.start(y)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        read = [y, self.encoding(oracle.grad(y)), *([x] if self.contexts else [])]
        h = self.cell(torch.cat(read, dim=-1), h)
        return self.head(y, h[0]), h


class HardTop(nn.Module):
    """The k cheapest samples alike. Losses do not differentiate through the choice."""

    def forward(self, costs: Tensor, k: int) -> Tensor:
        """costs (B, S) -> weights (B, S), of sum k."""
        return torch.zeros_like(costs).scatter(-1, costs.topk(k, largest=False).indices, 1.0)


class SoftTop(nn.Module):
    """The k cheapest samples, softly: -costs / temperature projected onto the capped simplex (Amos and Yarats, 2020).

    Costs are standardised per item first, so that one temperature serves all.

    Args:
        temperature: of the choice; towards 0 it becomes HardTop.
    """

    def __init__(self, temperature: Positive = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"selection.temperature: {temperature} given; above 0 is needed; HardTop() is its limit at 0")
        self.temperature = temperature

    def forward(self, costs: Tensor, k: int) -> Tensor:
        """costs (B, S) -> weights (B, S) in [0, 1], of sum k."""
        centred = costs - costs.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return CappedSimplex(costs.shape[-1], k).project(-centred / scale / self.temperature)


class Cem(Update):
    """The cross-entropy method: samples around y, of which the cheapest make the next y (Rubinstein and Kroese, 2004).

    With a SoftTop selection it is DCEM, through which losses differentiate (Amos and Yarats, 2020). Noise comes from torch's
    generator and is the same for every item, so that none depends on how many there are. What costs NaN counts as costing as
    much as the worst.

    Args:
        domain: Y, to which samples are taken.
        samples: S.
        elites: how many samples make the next y.
        sigma: standard deviation of the first samples.
        smoothing: how much of the old y and standard deviation stays.
        floor: added in quadrature to the standard deviation, so that it never vanishes.
        selection: HardTop or SoftTop.
    """

    def __init__(
        self,
        domain: Domain,
        samples: Count = 64,
        elites: Count = 8,
        sigma: Positive = 1.0,
        smoothing: Fraction = 0.0,
        floor: Positive = 1e-6,
        selection: HardTop | SoftTop | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= elites < samples:
            raise UserError(f"update.elites: {elites} given; at least 1 and fewer than the {samples} samples are needed")
        self.domain, self.samples, self.elites, self.sigma = domain, samples, elites, sigma
        self.smoothing, self.floor, self.selection = smoothing, floor, selection or HardTop()

    def start(self, y: Tensor, x: Tensor) -> Carry:
        return (torch.full_like(y, self.sigma),)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        (std,) = h
        noise = torch.randn(self.samples, 1, y.shape[-1], dtype=y.dtype, device=y.device)
        ys = _within(self.domain, y + std * noise)  # (S, B, n)
        weights = self.selection(_finite(oracle.values(ys).mT), self.elites).mT[..., None] / self.elites  # (S, B, 1)
        mean = (weights * ys).sum(0)
        spread = ((weights * (ys - mean).square()).sum(0) + self.floor**2).sqrt()
        return torch.lerp(mean, y, self.smoothing), (torch.lerp(spread, std, self.smoothing),)


class Anderson(Update):
    """Anderson acceleration of the oracle's map (Walker and Ni, 2011), with mixing.

    The least-squares problem is solved per item by its normal equations, with columns of unit length.

    Args:
        history: how many iterates are combined; 1 is fixed-point iteration.
        beta: mixing: 1 combines values of the map alone.
        ridge: added to the diagonal of the normal equations.
    """

    def __init__(self, history: Count = 5, beta: Fraction = 1.0, ridge: NonNegative = 1e-6) -> None:
        super().__init__()
        if history < 1:
            raise UserError(f"update.history: {history} given; at least 1 is needed")
        self.history, self.beta, self.ridge = history, beta, ridge

    def start(self, y: Tensor, x: Tensor) -> Carry:
        empty = y.new_zeros(len(y), self.history, y.shape[-1])
        return empty, empty, y.new_zeros(len(y), self.history)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        mapped = oracle.map(y)
        fresh = mapped - y, (1 - self.beta) * y + self.beta * mapped, torch.ones_like(y[:, 0])
        fresh = mapped - y, (1 - self.beta) * y + self.beta * mapped, torch.ones_like(y[:, 0])
        # (B, M, n) twice and (B, M), the newest last
        residuals, mixed, valid = (_push(old, new) for old, new in zip(h, fresh, strict=True))
        columns = residuals.diff(dim=1) * valid[:, :-1, None]  # (B, M - 1, n)
        square = columns.square().sum(-1)
        known = square > 0
        scale = torch.where(known, square, 1).rsqrt()[..., None]
        unit = columns * scale
        normal = unit @ unit.mT + torch.diag_embed(torch.where(known, self.ridge, 1.0).to(y.dtype))
        weights = torch.linalg.solve_ex(normal, unit @ residuals[:, -1, :, None])[0] * scale  # (B, M - 1, 1)
        change = mixed.diff(dim=1) * valid[:, :-1, None]
        return mixed[:, -1] - (weights * change).sum(1), (residuals, mixed, valid)


class Lbfgs(Update):
    """Limited-memory BFGS whose line search tries its step sizes 1.5^-j side by side, each item by itself.

    It works on the gradient mapping (y - nearest(y - s grad f)) / s, which is the gradient where Y has no boundary and that of
    the face on which y lies where it has one; s is the length of Barzilai and Borwein's step. The largest step that satisfies
    Armijo's condition along the projection onto Y is taken. Where none does the item stays and forgets its history, so that its
    next step is that of the spectral projected gradient (Birgin et al., 2000). Two-loop recursion: Nocedal and Wright (2006),
    algorithm 7.4.

    Args:
        domain: Y, to which candidates are taken.
        history: M, pairs of changes that approximate the curvature.
        candidates: how many step sizes are tried.
        decrease: the fraction of the predicted decrease that is asked for.
    """

    def __init__(self, domain: Domain, history: Count = 10, candidates: Count = 10, decrease: Positive = 1e-4) -> None:
        super().__init__()
        if history < 1 or candidates < 1:
            raise UserError(f"update.history, candidates: {history}, {candidates} given; at least 1 of each is needed")
        self.domain, self.history, self.candidates, self.decrease = domain, history, candidates, decrease

    def start(self, y: Tensor, x: Tensor) -> Carry:
        pairs, numbers = y.new_zeros(len(y), self.history, y.shape[-1]), y.new_zeros(len(y), self.history)
        return pairs, pairs, numbers, numbers[:, 0], y, torch.zeros_like(y)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        moves, bends, rho, scale, y_last, slope_last = h  # rho = 0 marks a pair that is not there
        gradient = oracle.grad(y)
        first = 1 / torch.linalg.vector_norm(gradient, dim=-1).clamp_min(1)
        scale = torch.where(scale > 0, scale, first)
        slope = (y - self.domain.nearest(y - scale[:, None] * gradient)) / scale[:, None]

        move, bend = y - y_last, slope - slope_last
        curvature, square = (move * bend).sum(-1), bend.square().sum(-1)
        convex = curvature > 1e-10 * square  # False before the first move
        keep = convex[:, None]
        moves = torch.where(keep[..., None], _push(moves, move), moves)
        bends = torch.where(keep[..., None], _push(bends, bend), bends)
        rho = torch.where(keep, _push(rho, 1 / torch.where(convex, curvature, 1)), rho)
        scale = torch.where(convex, curvature / torch.where(convex, square, 1), scale)

        direction = -self._newton(slope, moves, bends, rho, scale)
        with torch.no_grad():
            sizes = 1.5 ** -torch.arange(self.candidates, dtype=y.dtype, device=y.device)
            points = _within(self.domain, y + sizes[:, None, None] * direction)  # (J, B, n)
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
        """The inverse Hessian's approximation times slope (B, n)."""
        q, shares = slope, []
        for i in reversed(range(self.history)):
            shares.append(rho[:, i, None] * (moves[:, i] * q).sum(-1, keepdim=True))
            q = q - shares[-1] * bends[:, i]
        q = scale[:, None] * q
        for i in range(self.history):
            q = q + (shares.pop() - rho[:, i, None] * (bends[:, i] * q).sum(-1, keepdim=True)) * moves[:, i]
        return q


def _within(domain: Domain, ys: Tensor) -> Tensor:
    """ys (S, B, n) -> the points of Y nearest to them."""
    return domain.nearest(ys.flatten(0, 1)).view_as(ys)


def _push(history: Tensor, new: Tensor) -> Tensor:
    """history (B, M, ...), oldest first, with new (B, ...) in the place of the oldest."""
    return torch.cat([history[:, 1:], new[:, None]], dim=1)


def _finite(costs: Tensor) -> Tensor:
    """costs (B, S), with the item's worst in the place of what is not finite."""
    finite = costs.isfinite()
    worst = torch.where(finite, costs, -math.inf).amax(-1, keepdim=True)
    return torch.where(finite, costs, torch.where(worst.isfinite(), worst, 0))
