"""What the outputs of critics stand for, and how they learn it. E members · B batch · O outputs · M atoms of a distribution

A head reads Q from outputs, makes the regression target of a batch from the outputs at its next states, and scores outputs by
it. `backup` takes values at next states (B, K) to targets (B, K), each r + gamma (v - alpha log pi) where the episode goes on.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlamort.errors import UserError

Backup = Callable[[Tensor], Tensor]


def pessimistic(q: Tensor, beta: float) -> Tensor:
    """q (E, B) -> mean - beta std over members (B,), with the population's std: of two members and beta = 1 their minimum."""
    return q.mean(0) - beta * q.std(0, correction=0)


class Head(nn.Module):
    """The meaning of a critic's outputs.

    Attributes:
        outputs: O, outputs of each member.
    """

    outputs: int

    def q(self, outputs: Tensor) -> Tensor:
        """Outputs (E, B, O) -> Q (E, B)."""
        raise NotImplementedError

    def require(self, pessimism: float) -> None:
        """Raises UserError if targets cannot be pessimistic by so many standard deviations of the members."""

    def target(self, after: Tensor, backup: Backup, pessimism: float) -> Tensor:
        """Outputs at next states (E, B, O) -> the target that all members share, (B, ...), without gradients."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Outputs (E, B, O) and their target -> the sum of the members' losses, 0-d."""
        raise NotImplementedError

    def metrics(self) -> dict[str, Tensor]:
        """What there is to say about targets so far, detached, 0-d."""
        return {}

    def notice(self, recorded: Mapping[str, Any]) -> None:
        """Warn, once, where the recorded metrics say that something is wrong."""


class Scalar(Head):
    """One output, Q itself, which learns by half the squared error."""

    outputs = 1

    def q(self, outputs: Tensor) -> Tensor:
        return outputs.squeeze(-1)

    @torch.no_grad()
    def target(self, after: Tensor, backup: Backup, pessimism: float) -> Tensor:
        return backup(pessimistic(self.q(after), pessimism)[:, None])[:, 0]

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (self.q(outputs) - target).square().mean(-1).sum()


class Projection(Protocol):
    """How a categorical head projects the distribution of targets onto its atoms."""

    def require(self, pessimism: float) -> None: ...
    def __call__(self, probabilities: Tensor, atoms: Tensor, backup: Backup, pessimism: float) -> tuple[Tensor, Tensor]:
        """Probabilities of atoms at next states (E, B, M), and the atoms (M,) -> targets' probabilities (B, M), means (B,)."""


class Moved:
    """The whole distribution of the member with the least Q moves, atom by atom (Bellemare et al., 2017, algorithm 1)."""

    def require(self, pessimism: float) -> None:
        if pessimism != 1:
            raise UserError(
                f"critic.head.projection=moved and pessimism={pessimism}: the target is the distribution of the least critic, "
                "which is pessimism=1; critic.head.projection=two_hot takes any"
            )

    def __call__(self, probabilities: Tensor, atoms: Tensor, backup: Backup, pessimism: float) -> tuple[Tensor, Tensor]:
        least = (probabilities @ atoms).argmin(0)  # (B,)
        p = probabilities.gather(0, least[None, :, None].expand(1, -1, len(atoms)))[0]  # (B, M)
        to = backup(atoms.expand_as(p))  # where each atom goes
        return (p[:, :, None] * shares(to, atoms)).sum(1), (p * to).sum(-1)


class TwoHot:
    """The pessimistic Q is a scalar target, of which the two nearest atoms have a share each."""

    def require(self, pessimism: float) -> None:
        pass

    def __call__(self, probabilities: Tensor, atoms: Tensor, backup: Backup, pessimism: float) -> tuple[Tensor, Tensor]:
        to = backup(pessimistic(probabilities @ atoms, pessimism)[:, None])  # (B, 1)
        return shares(to, atoms)[:, 0], to[:, 0]


def shares(values: Tensor, atoms: Tensor) -> Tensor:
    """values (..., K), clipped to the span of evenly spaced atoms (M,) -> shares of the atoms (..., K, M), which sum to one.

    A value's two neighbours have it between them, so that the mean is kept inside the span.
    """
    low, high = atoms[0], atoms[-1]
    spacing = (high - low) / (len(atoms) - 1)
    distance = (torch.minimum(torch.maximum(values, low), high)[..., None] - atoms).abs() / spacing
    return (1 - distance).clamp_min(0)


class Categorical(Head):
    """Logits of a distribution of the return over evenly spaced atoms, which learn by cross-entropy.

    Q is the mean of the distribution (Bellemare et al., 2017; Farebrother et al., 2024).

    Args:
        outputs: M.
        low: the first atom.
        high: the last.
        projection: of targets onto the atoms.
    """

    atoms: Tensor
    outside: Tensor
    seen: Tensor

    def __init__(self, outputs: int, low: float, high: float, projection: Projection) -> None:
        super().__init__()
        self.outputs, self.projection, self.warned = outputs, projection, False
        self.register_buffer("atoms", torch.linspace(low, high, outputs), persistent=False)
        self.register_buffer("outside", torch.zeros((), dtype=torch.float64))  # targets whose mean left the span, so far
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))  # all targets so far

    def q(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1) @ self.atoms

    def require(self, pessimism: float) -> None:
        self.projection.require(pessimism)

    @torch.no_grad()
    def target(self, after: Tensor, backup: Backup, pessimism: float) -> Tensor:
        target, mean = self.projection(after.softmax(-1), self.atoms, backup, pessimism)
        self.outside += ((mean < self.atoms[0]) | (mean > self.atoms[-1])).sum()
        self.seen += len(mean)
        return target

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return -(target * outputs.log_softmax(-1)).sum(-1).mean(-1).sum()

    def metrics(self) -> dict[str, Tensor]:
        return {"critic/outside": self.outside.clone(), "critic/targets": self.seen.clone()}

    def notice(self, recorded: Mapping[str, Any]) -> None:
        outside = recorded.get("critic/outside", 0)
        if outside and not self.warned:
            self.warned = True
            warnings.warn(
                f"critic.head: {outside:,.0f} of {recorded['critic/targets']:,.0f} targets so far are outside of its atoms' "
                f"span, {self.atoms[0]:g} to {self.atoms[-1]:g}, and clipped to it; critic/outside goes on counting. "
                "reward_scale=bounded keeps returns in [-5, 5], and critic.head.low and high set the span",
                stacklevel=2,
            )


class Quantiles(Head):
    """Quantiles of the return, whose mean is Q (Kuznetsov et al., 2020, section 3).

    Args:
        outputs: quantiles of each member.
        dropped: the highest so many per member, of all members' together, are dropped from targets.
    """

    def __init__(self, outputs: int, dropped: int) -> None:
        super().__init__()
        if dropped >= outputs:
            raise UserError(f"critic.head.dropped={dropped}: fewer than critic.head.count={outputs} are needed")
        self.outputs, self.dropped = outputs, dropped

    def q(self, outputs: Tensor) -> Tensor:
        return outputs.mean(-1)

    def require(self, pessimism: float) -> None:
        if pessimism:
            raise UserError(
                f"critic.head=quantiles and pessimism={pessimism}: targets are pessimistic by what they drop, "
                "critic.head.dropped, and Q is the mean of all; pessimism=0 is needed"
            )

    @torch.no_grad()
    def target(self, after: Tensor, backup: Backup, pessimism: float) -> Tensor:
        pooled = after.transpose(0, 1).flatten(1).sort(-1).values  # (B, E O)
        return backup(pooled[:, : len(after) * (self.outputs - self.dropped)])

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return quantile_huber(outputs, target)


def quantile_huber(q: Tensor, target: Tensor) -> Tensor:
    """The Huber loss of quantile regression, at threshold 1 (Dabney et al., 2018, eq. 10; Kuznetsov et al., 2020, eq. 12).

    Args:
        q: (E, B, M), quantiles of E critics at the levels (2 m - 1) / (2 M).
        target: (B, K), samples of the return.

    Returns:
        The mean over critics, items, quantiles and samples, 0-d.
    """
    m = q.shape[-1]
    levels = (torch.arange(m, device=q.device, dtype=q.dtype) + 0.5) / m  # (M,)
    error = target[:, None, :] - q[..., None]  # (E, B, M, K)
    size = error.abs()
    huber = torch.where(size > 1, size - 0.5, 0.5 * error.square())
    return ((levels[:, None] - (error.detach() < 0).to(q.dtype)).abs() * huber).mean()
