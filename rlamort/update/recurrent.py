"""Learned steps: a recurrent cell reads gradients, and a head updates the iterate."""

import math

import torch
from torch import Tensor, nn

from rlamort.adjoint import Carry
from rlamort.config import Count, Positive
from rlamort.errors import UserError
from rlamort.objective import Oracle
from rlamort.update.base import Update


class LogSign(nn.Module):
    """g -> (log|g| / p, sign g) per coordinate, and (-1, e^p g) below e^-p (Andrychowicz et al., 2016, appendix A).

    Args:
        p: gradients below e^-p are encoded linearly.
    """

    def __init__(self, p: Positive = 10.0) -> None:
        super().__init__()
        self.p = p

    def size(self, dim: int) -> int:
        """Size of the encoding of `dim` numbers."""
        return 2 * dim

    def forward(self, slope: Tensor) -> Tensor:
        """(B, n) -> (B, 2 n)."""
        large = slope.abs() >= math.exp(-self.p)
        log = torch.where(large, slope, 1).abs().log() / self.p
        sign = torch.where(large, slope.sign(), math.exp(self.p) * slope)
        return torch.cat([torch.where(large, log, -1), sign], dim=-1)


class Normed(nn.Module):
    """g -> (g / |g|, log|g|), with the norm per item.

    Args:
        epsilon: added in quadrature to |g|, so that g = 0 has a finite encoding.
    """

    def __init__(self, epsilon: Positive = 1e-8) -> None:
        super().__init__()
        self.epsilon = epsilon

    def size(self, dim: int) -> int:
        """Size of the encoding of `dim` numbers."""
        return dim + 1

    def forward(self, slope: Tensor) -> Tensor:
        """(B, n) -> (B, n + 1)."""
        norm = (slope.square().sum(-1, keepdim=True) + self.epsilon**2).sqrt()
        return torch.cat([slope / norm, norm.log()], dim=-1)


class Gru(nn.GRUCell):
    """A gated recurrent unit with a tuple as carry, whose first entry is its output."""

    def start(self, y: Tensor) -> Carry:
        return (y.new_zeros(len(y), self.hidden_size),)

    def forward(self, inputs: Tensor, h: Carry) -> Carry:  # type: ignore[override]
        return (super().forward(inputs, *h),)


class Lstm(nn.LSTMCell):
    """A long short-term memory cell with a tuple as carry, whose first entry is its output."""

    def start(self, y: Tensor) -> Carry:
        return y.new_zeros(len(y), self.hidden_size), y.new_zeros(len(y), self.hidden_size)

    def forward(self, inputs: Tensor, h: Carry) -> Carry:  # type: ignore[override]
        return super().forward(inputs, (h[0], h[1]))


class Additive(nn.Module):
    """y + net(out), small before training.

    Args:
        hidden: size of the cell's output.
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
        hidden: size of the cell's output.
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
    """A learned update: a recurrent cell reads y and an encoding of grad f(y; x), and a head updates y.

    Andrychowicz et al. (2016) with LogSign, Lstm and Additive; Marino et al. (2018) with a Gated head.

    Args:
        dim: n.
        hidden: size of the cell's output.
        contexts: d, for a cell that also reads x; 0 for one that does not.
        cell: Gru or Lstm.
        encoding: LogSign or Normed, which represent magnitude and direction on a bounded scale.
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
        self.dim, self.contexts = dim, contexts
        self.cell = cell(dim + self.encoding.size(dim) + contexts, hidden)
        self.head = head(hidden, dim)

    def start(self, y: Tensor, x: Tensor, oracle: Oracle) -> Carry:
        if (y.shape[-1], x.shape[-1] if self.contexts else 0) != (self.dim, self.contexts):
            raise UserError(
                f"update.dim, contexts: {self.dim}, {self.contexts} given; iterates have {y.shape[-1]} numbers, contexts "
                f"{x.shape[-1]}: of a density its parameters iterate, density.parameters.dim of them"
            )
        return self.cell.start(y)

    def forward(self, y: Tensor, h: Carry, x: Tensor, oracle: Oracle) -> tuple[Tensor, Carry]:
        read = [y, self.encoding(oracle.grad(y)), *([x] if self.contexts else [])]
        h = self.cell(torch.cat(read, dim=-1), h)
        return self.head(y, h[0]), h
