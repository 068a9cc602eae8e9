"""Plans as perturbations of a policy, of its actions or of its weights (POPLIN; Wang and Ba, 2020).

x context (B, d) · omega perturbation (B, m) · H steps · n = dim of an action · p parameters of the policy's network
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlamort.domain import Domain, Weights
from rlamort.dynamics.base import Act
from rlamort.dynamics.trajectory import Trajectory
from rlamort.nets import mlp, spread
from rlamort.objective import Metrics, Objective, Oracle


class Policy(nn.Module):
    """A deterministic policy on standardised states, y = project(net(x)), whose weights may be perturbed.

    Args:
        x_dim: d.
        domain: of actions.
        hidden: widths of its hidden layers.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, x_dim: int, domain: Domain, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net, self.domain = mlp(x_dim, hidden, domain.inputs), domain
        self.weights = Weights(self.net)
        self.register_buffer("shift", torch.zeros(x_dim))
        self.register_buffer("scale", torch.ones(x_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> y (..., n)."""
        y: Tensor = self.domain.project(self.net((x - self.shift) / self.scale))
        return y

    def perturbed(self, omega: Tensor) -> Callable[[Tensor], Tensor]:
        """Policies of the weights theta + omega, omega (B, p), for each item its own: x (B, d) or (E, B, d) -> y, likewise."""
        parts = torch.split(self.weights.ravel(self.net) + omega, self.weights.sizes, -1)
        layers = [
            (weight.reshape(-1, *shape).mT, bias[:, None])  # (B, i, o), (B, 1, o)
            for weight, bias, shape in zip(parts[::2], parts[1::2], [*self.weights.shapes.values()][::2], strict=True)
        ]

        def act(x: Tensor) -> Tensor:
            h = ((x - self.shift) / self.scale).view(-1, *x.shape[-2:]).transpose(0, 1)  # (B, E, d)
            for number, (weight, bias) in enumerate(layers):
                h = torch.baddbmm(bias, h.relu() if number else h, weight)
            y: Tensor = self.domain.project(h.transpose(0, 1))
            return y.reshape(*x.shape[:-1], -1)

        return act

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        """Set the mean and standard deviation of states to those of x (B, d)."""
        self.shift.copy_(x.mean(0))
        self.scale.copy_(spread(x))


class Noise:
    """What is perturbed.

    Args:
        policy: that acts.
        trajectory: the plan's objective, with its dynamics.

    Attributes:
        steps: groups of coordinates of omega, one a step of the plan, or 1.
        dim: m.
    """

    steps: int
    dim: int

    def __init__(self, policy: Policy, trajectory: Trajectory) -> None:
        self.policy, self.trajectory = policy, trajectory
        self.steps, self.dim = self.size(trajectory.horizon)

    def size(self, horizon: int) -> tuple[int, int]:
        """Of plans of H steps, `steps` and `dim`."""
        raise NotImplementedError

    def reference(self, x: Tensor) -> Tensor:
        """x (B, d) -> what its perturbations refer to (B, .), computed once for all of them."""
        return x[:, :0]

    def rule(self, omega: Tensor, reference: Tensor) -> Act:
        """How to act, of each item by its own omega (B, m)."""
        raise NotImplementedError

    def moved(self, omega: Tensor) -> Tensor:
        """omega (..., m) -> that of the same plan one step later (..., m), with zeros, the policy's own, as the last."""
        each = self.dim // self.steps
        return torch.cat([omega[..., each:], torch.zeros_like(omega[..., :each])], -1)

    def apart(self, omega: Tensor) -> Tensor:
        """omega (B, m) by steps (B, steps, m / steps)."""
        return omega.reshape(len(omega), self.steps, -1)


class Init(Noise):
    """Noise on the actions that the policy takes from x on, as the mean of the dynamics goes (POPLIN-A-Init)."""

    def size(self, horizon: int) -> tuple[int, int]:
        return horizon, horizon * self.policy.domain.dim

    def reference(self, x: Tensor) -> Tensor:
        actions = []
        for _ in range(self.steps):
            actions.append(self.policy(x))
            x = self.trajectory.dynamics(x, actions[-1]).x_next
        return torch.cat(actions, -1)  # (B, H n)

    def rule(self, omega: Tensor, reference: Tensor) -> Act:
        actions = self.apart(reference + omega)
        return lambda t, x: self.policy.domain.nearest(actions[:, t])


class Replan(Noise):
    """Noise on the actions that the policy takes wherever the plan has come to (POPLIN-A-Replan)."""

    def size(self, horizon: int) -> tuple[int, int]:
        return horizon, horizon * self.policy.domain.dim

    def rule(self, omega: Tensor, reference: Tensor) -> Act:
        noise = self.apart(omega)
        return lambda t, x: self.policy.domain.nearest(self.policy(x) + noise[:, t])


class Uniform(Noise):
    """One perturbation of the policy's weights for the whole plan (POPLIN-P-Uni)."""

    def size(self, horizon: int) -> tuple[int, int]:
        return 1, self.policy.weights.dim

    def rule(self, omega: Tensor, reference: Tensor) -> Act:
        act = self.policy.perturbed(omega)
        return lambda t, x: act(x)

    def moved(self, omega: Tensor) -> Tensor:
        return omega


class Separate(Noise):
    """A perturbation of the policy's weights for each step of the plan (POPLIN-P-Sep)."""

    def size(self, horizon: int) -> tuple[int, int]:
        return horizon, horizon * self.policy.weights.dim

    def rule(self, omega: Tensor, reference: Tensor) -> Act:
        acts = [self.policy.perturbed(part) for part in self.apart(omega).unbind(1)]
        return lambda t, x: acts[t](x)


class Perturbed(Objective):
    """f(omega; x): minus the return of a perturbed policy from x on. Contexts are the rows of `posed`.

    Args:
        x_dim: d.
        noise: what is perturbed.
        trajectory: minus the return of what follows from x.
    """

    def __init__(self, x_dim: int, noise: Noise, trajectory: Trajectory) -> None:
        self.x_dim, self.noise, self.trajectory = x_dim, noise, trajectory

    def posed(self, x: Tensor) -> Tensor:
        """x (B, d) as contexts: with what its perturbations refer to."""
        return torch.cat([x, self.noise.reference(x)], -1)

    def oracle(self, x: Tensor) -> Oracle:
        """Of x (B, d), with the same noise of the dynamics at every query, if they have some."""
        return Oracle(Perturbed(self.x_dim, self.noise, self.trajectory.settled()), self.posed(x))

    def report(self, omega: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        act, f = self.noise.rule(omega, x[:, self.x_dim :]), self.trajectory
        return f.cost(f.dynamics.unfold(x[:, : self.x_dim], act, f.horizon)), {}
