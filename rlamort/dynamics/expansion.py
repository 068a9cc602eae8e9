"""Objectives of a policy's parameters that follow dynamics, and then ask a critic.

x context (B, d) · lam parameters of a density over actions · H steps
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlamort.domain import Density
from rlamort.dynamics.base import LARGE, LAST, Dynamics, Moved, Transitions
from rlamort.objective import Metrics, Objective, Oracle, Soft, nothing


class ValueExpansion(Objective):
    """f(lam; x) = -sum_{t < H} gamma^t n_t (r_t - alpha log q_t) - gamma^H n_H (Q(x_H, y_H) - alpha log q_H), of lam = lam_0.

    The objective of SVG(H) with entropy (Amos et al., 2021, section 4), by one reparameterised draw: y_t is of q(.; lam_t),
    with the later lam_t as the policy predicts them at x_t, and n_t is the product of the probabilities to go on of all
    steps before t. With H = 0 it is `soft`. What follows an end is neither counted nor differentiated.

    Where the model has diverged, f is `LAST`, above what any sound solution costs, and without gradient; metrics count it.

    Args:
        soft: -Q + alpha log q, the cost of the last action; models ask it alone, so that acting needs no dynamics.
        dynamics: what follows an action.
        policy: (x, oracle) -> lam, as of a `Model`.
        horizon: H.
        discount: gamma.
    """

    def __init__(
        self, soft: Soft, dynamics: Dynamics, policy: Callable[[Tensor, Oracle], Tensor], horizon: int, discount: float
    ) -> None:
        self.soft, self.dynamics, self.policy, self.horizon, self.discount = soft, dynamics, policy, horizon, discount

    def oracle(self, x: Tensor) -> Oracle:
        return self.soft.oracle(x)

    def deterministic_oracle(self, x: Tensor) -> Oracle:
        return self.soft.deterministic_oracle(x)

    def report(self, lam: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        gains, alpha, entropies = Gains(lam.new_ones(len(x)), self.discount), self.soft.alpha().detach(), []
        for _ in range(self.horizon):
            y, logq = self.soft.density.sample(lam)
            moved = self.dynamics(x, y)
            x = gains.after(x, moved._replace(reward=moved.reward - alpha * logq))
            lam = self.policy(x, self.soft.oracle(x))
            entropies.append(-logq.detach().mean())
        cost, metrics = self.soft.report(lam, x)
        first = {"entropy": entropies[0]} if entropies else {}  # at states that were met, as the temperature needs it
        return gains.cost(cost), metrics | first | {"diverged": gains.diverged.to(cost).mean()}


class Gains:
    """A discounted sum of rewards along model states (B, d), each weighed by the product of all probabilities to go on so far.

    Args:
        weight: (B,), of the first reward.
        discount: gamma.

    Attributes:
        diverged: (B,) bool: where a state or reward was none that counts, NaN or beyond `LARGE`.
    """

    def __init__(self, weight: Tensor, discount: float) -> None:
        self.weight, self.discount = weight, discount
        self.value, self.diverged = torch.zeros_like(weight), weight < 0

    def after(self, x: Tensor, moved: Moved) -> Tensor:
        """Count one step from x; returns the next state, or x without gradient where the task has ended."""
        x_next, reward, continues = moved
        unsound = (self.weight > 0) & ~((x_next.abs() < LARGE).all(-1) & (reward.abs() < LARGE))  # NaN is unsound, too
        self.diverged = self.diverged | unsound
        self.value = self.value + self.weight * torch.where((self.weight > 0) & ~unsound, reward, 0)
        self.weight = self.discount * self.weight * torch.where(unsound, 0, continues)
        # a state after an end may be NaN, and so would be the gradient of all that is computed from it
        return torch.where((self.weight > 0)[:, None], x_next, x.detach())

    def cost(self, tail: Tensor) -> Tensor:
        """Minus the sum, with the cost `tail` (B,) of what follows; `LAST` where the model has diverged."""
        return torch.where(self.diverged, LAST, self.weight * tail - self.value)


class Retraced(Objective):
    """f(lam; x) = -sum_{t < H} gamma^t n_t r_t - gamma^H n_H V(x_H), along transitions that were met (Heess et al., 2015).

    The noise of every transition is inferred, what the model lacks of the state and reward that followed. So where actions
    are those that were played, f is what happened, and errors of the model enter its derivatives alone. Contexts are the rows
    of `posed`, and models read the first state of each.

    Args:
        x_dim: d.
        density: of actions.
        dynamics: what follows an action, but for noise.
        policy: (x, oracle) -> lam of the steps after the first, as of a `Model`.
        act: lam, and the state that was met (B, d) with the action that was played there (B, n) -> the action of this step.
        discount: gamma.
        tail: x (B, d) -> V(x) (B,), what the state after the last step is worth.
    """

    def __init__(
        self,
        x_dim: int,
        density: Density,
        dynamics: Dynamics,
        policy: Callable[[Tensor, Oracle], Tensor],
        act: Callable[[Tensor, Tensor, Tensor], Tensor],
        discount: float,
        tail: Callable[[Tensor], Tensor],
    ) -> None:
        self.density, self.dynamics, self.policy, self.act = density, dynamics, policy, act
        self.discount, self.tail, self.x_dim = discount, tail, x_dim

    def posed(self, met: Transitions) -> Tensor:
        """Sequences of transitions with leading axes (C, H), or single ones (B,), as contexts: (C, H (2 d + n + 2))."""
        ended = met.terminated.to(met.reward)
        return torch.cat([met.x, met.y, met.x_next, met.reward[..., None], ended[..., None]], -1).flatten(1)

    def seen(self, x: Tensor) -> Tensor:
        return x[:, : self.x_dim]

    def oracle(self, x: Tensor) -> Oracle:
        return nothing(self.seen(x))

    def report(self, lam: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        n, state, gains = self.density.dim, self.seen(x), Gains(lam.new_ones(len(x)), self.discount)
        for number, step in enumerate(torch.split(x, 2 * self.x_dim + n + 2, 1)):
            met, played, followed, paid, ended = torch.split(step, [self.x_dim, n, self.x_dim, 1, 1], 1)
            lam = self.policy(state, nothing(state)) if number else lam
            moved, (usual, reward, _) = self.dynamics(state, self.act(lam, met, played)), self.dynamics(met, played)
            x_next = moved.x_next + (followed - usual).detach()
            state = gains.after(state, Moved(x_next, moved.reward + (paid[:, 0] - reward).detach(), 1 - ended[:, 0]))
        return gains.cost(-self.tail(state)), {"diverged": gains.diverged.to(lam).mean()}
