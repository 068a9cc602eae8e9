"""Transition models, (x, y) -> (x_next, reward, continues), and plans through them as solutions of an objective.

x context (B, d) · y action (B, n) in [-1, 1]^n · H actions in a plan (B, H n) · E members of an ensemble
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlamort import nets
from rlamort.domain import Box, Density
from rlamort.errors import UserError
from rlamort.objective import Metrics, Objective, Oracle, Soft, nothing

LARGE = 1e6  # a state or reward of that size has left what any environment's units are for
LAST = 1e9  # the cost where a model has diverged


class Moved(NamedTuple):
    """The results of an action."""

    x_next: Tensor  # (B, d)
    reward: Tensor  # (B,) for it
    continues: Tensor  # (B,) in [0, 1]: 0 where the task ends there, so that no reward follows


class Transitions(Protocol):
    """What dynamics are learned from: one-step transitions, as of `rlamort.source.Batch`."""

    @property
    def x(self) -> Tensor: ...  # (B, d)
    @property
    def y(self) -> Tensor: ...  # (B, n)
    @property
    def reward(self) -> Tensor: ...  # (B,)
    @property
    def terminated(self) -> Tensor: ...  # (B,) bool
    @property
    def x_next(self) -> Tensor: ...  # (B, d)


class Dynamics(nn.Module):
    """A transition model: (x (B, d), y (B, n)) -> results; items are independent.

    Attributes:
        differentiable: whether results have gradients with respect to actions.
    """

    differentiable: bool = True

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        raise NotImplementedError

    def futures(self, x: Tensor, y: Tensor) -> Moved:
        """As `forward`, per member of an ensemble (E, B, .), from x (B, d) or from one per member (E, B, d)."""
        moved: Moved = self(x, y)
        return moved

    def follow(self, x: Tensor, actions: Sequence[Tensor]) -> list[Moved]:
        """What follows from x (B, d) with H actions, each (B, n), one after another: as `futures`, of every step."""
        path: list[Moved] = []
        for action in actions:
            path.append(self.futures(path[-1].x_next if path else x, action))
        return path


class Known(Dynamics):
    """Known dynamics, written in torch, and differentiable if gradients are needed.

    Args:
        step: x (B, d), u (B, n) -> x_next (B, d), reward (B,), continues (B,); u in the environment's own units.
        actions: where u lies.
        name: of the step, for messages.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], actions: Box, name: str) -> None:
        super().__init__()
        self.step, self.actions, self.name = step, actions, name

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        return Moved(*self.step(x, self.actions.decode(y)))

    def require(self, x_dim: int) -> None:
        """Raises UserError if the step does not take contexts of `x_dim` numbers, or returns other shapes than needed."""
        x, y = torch.zeros(2, x_dim), torch.zeros(2, self.actions.dim)
        try:
            shapes: list[Any] = [tuple(part.shape) for part in self(x, y)]
        except (IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            shapes = [f"{type(error).__name__}: {error}"]
        if shapes != [(2, x_dim), (2,), (2,)]:
            raise UserError(
                f"dynamics={self.name}: for x of shape {tuple(x.shape)} and u of shape {tuple(y.shape)} it gives {shapes}; "
                f"x_next, reward and continues of shapes {tuple(x.shape)}, (2,) and (2,) are needed"
            )


class Squared(nn.Module):
    """The squared error of an ensemble, whose members predict means."""

    outputs = 1  # numbers for each coordinate

    def __init__(self, coordinates: int) -> None:
        super().__init__()

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Outputs (E, B, k), targets (E, B, k) -> loss of each member (E,)."""
        return (outputs - target).square().mean((1, 2))


class Normal(nn.Module):
    """The negative log-likelihood of normals whose mean and log-variance each member predicts (Chua et al., 2018, eq. 1).

    Log-variances are bounded softly, by bounds that are learned and that a small cost draws together (their appendix A.1).

    Args:
        coordinates: k.
    """

    outputs = 2

    def __init__(self, coordinates: int) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.full((coordinates,), -10.0))
        self.high = nn.Parameter(torch.full((coordinates,), 0.5))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Outputs (E, B, 2 k), targets (E, B, k) -> loss of each member (E,)."""
        mean, log = outputs.chunk(2, -1)
        log = self.high - nn.functional.softplus(self.high - log)
        log = self.low + nn.functional.softplus(log - self.low)
        likelihood = ((mean - target).square() * (-log).exp() + log).mean((1, 2))
        return likelihood + 0.01 * (self.high - self.low).mean()


class Endless(nn.Module):
    """Tasks go on, wherever they are."""

    outputs = 0  # of a member

    def continues(self, outputs: Tensor) -> Tensor:
        """Outputs (..., 0) -> ones (...)."""
        return outputs.new_ones(outputs.shape[:-1])

    def loss(self, outputs: Tensor, ended: Tensor) -> Tensor:
        """Outputs (E, B, 0), ended (E, B, 1) -> loss of each member (E,)."""
        return outputs.new_zeros(len(outputs))


class Ending(nn.Module):
    """Where tasks end is learned, by the log-likelihood of the terminations met.

    Classes are not balanced, so that what is predicted is a probability: products of it weigh what follows.
    """

    outputs = 1  # the logit of an end

    def continues(self, outputs: Tensor) -> Tensor:
        """Outputs (..., 1) -> the probability to go on (...)."""
        return (-outputs[..., 0]).sigmoid()

    def loss(self, outputs: Tensor, ended: Tensor) -> Tensor:
        """As of `Endless`."""
        return nn.functional.binary_cross_entropy_with_logits(outputs, ended, reduction="none").mean((1, 2))


class Ensemble(Dynamics):
    """E networks of the change of state and the reward, learned from transitions; inputs and targets are standardised.

    Each member predicts (x_next - x, reward) from (x, y), and they differ by what the data leave open. What follows is their
    mean; plans are followed through each of them by itself (Chua et al., 2018, section 5: TS-infinity, without noise).

    Args:
        x_dim: d.
        y_dim: n.
        hidden: widths of the hidden layers.
        members: E.
        likelihood: `Squared` or `Normal`, what the members' outputs mean and how well they fit.
        ends: `Endless` or `Ending`, whether tasks end.
    """

    scales: Tensor
    shifts: Tensor

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden: Sequence[int],
        members: int,
        likelihood: Callable[[int], Squared | Normal] = Normal,
        ends: Callable[[], Endless | Ending] = Endless,
    ) -> None:
        super().__init__()
        self.x_dim, self.members, self.inputs, k = x_dim, members, x_dim + y_dim, x_dim + 1
        self.likelihood, self.ends = likelihood(k), ends()
        self.moving = self.likelihood.outputs * k  # outputs that say how the state moves, and the reward
        self.net = nets.Ensemble(members, self.inputs, hidden, self.moving + self.ends.outputs)
        self.register_buffer("shifts", torch.zeros(self.inputs + k))
        self.register_buffer("scales", torch.ones(self.inputs + k))

    def forward(self, x: Tensor, y: Tensor) -> Moved:
        return Moved(*(part.mean(0) for part in self.futures(x, y)))

    def futures(self, x: Tensor, y: Tensor) -> Moved:
        outputs = self._outputs(torch.cat([x, y.expand(*x.shape[:-1], -1)], -1))
        change = self.shifts[self.inputs :] + self.scales[self.inputs :] * outputs[..., : self.x_dim + 1]  # (E, B, d + 1)
        return Moved(x + change[..., :-1], change[..., -1], self.ends.continues(outputs[..., self.moving :]))

    def loss(self, pairs: Tensor) -> Tensor:
        """Pairs (E, B, d + n + d + 2) of `pairs`, for each member its own -> the sum of the members' losses."""
        inputs, target, ended = torch.split(pairs, [self.inputs, self.x_dim + 1, 1], -1)
        scaled = (target - self.shifts[self.inputs :]) / self.scales[self.inputs :]
        moving, ending = torch.split(self._outputs(inputs), [self.moving, self.ends.outputs], -1)
        losses: Tensor = self.likelihood(moving, scaled) + self.ends.loss(ending, ended)  # (E,)
        return losses.sum()

    @staticmethod
    def pairs(batch: Transitions) -> Tensor:
        """Transitions as inputs and targets, concatenated, the last of which is 1 where a task ended: (B, d + n + d + 2)."""
        ended = batch.terminated.to(batch.reward)
        return torch.cat([batch.x, batch.y, batch.x_next - batch.x, batch.reward[:, None], ended[:, None]], -1)

    @torch.no_grad()
    def standardise(self, pairs: Tensor) -> None:
        """Set the mean and standard deviation of inputs and targets to those of pairs (B, .)."""
        pairs = pairs[:, : len(self.shifts)]  # not of ends
        spread = pairs.std(0, correction=0)
        self.shifts.copy_(pairs.mean(0))
        self.scales.copy_(torch.where(spread > 1e-6, spread, 1))  # a coordinate that never moves stays at its mean

    def _outputs(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net((inputs - self.shifts[: self.inputs]) / self.scales[: self.inputs])
        return outputs


class Trajectory(Objective):
    """f(y; x) = -sum_{t < H} discount^t r_t - discount^H tail(x_H), minus the return of a plan from x (tutorial, section 4.1).

    Nothing counts after an end: continues multiplies what follows it. Of several futures the mean counts.

    Args:
        dynamics: what follows an action.
        horizon: H.
        discount: per step.
        tail: x (B, d) -> (B,), what the state after the plan is worth; None leaves it out.
    """

    def __init__(
        self, dynamics: Dynamics, horizon: int, discount: float = 1.0, tail: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.dynamics, self.horizon, self.discount, self.tail = dynamics, horizon, discount, tail

    def report(self, y: Tensor, x: Tensor) -> tuple[Tensor, Metrics]:
        path = self.dynamics.follow(x, y.reshape(len(y), self.horizon, -1).unbind(1))
        return -self.total(path).view(-1, len(y)).mean(0), {}

    def total(self, path: Sequence[Moved]) -> Tensor:
        """The return (..., B) of what followed from H actions, (..., B, d), (..., B), (..., B) of each."""
        value, weight = torch.zeros_like(path[0].reward), torch.ones_like(path[0].reward)
        for _, reward, continues in path:
            value = value + _weighed(weight, reward)
            weight = weight * self.discount * continues
        if self.tail is not None:
            value = value + _weighed(weight, self.tail(path[-1].x_next.flatten(0, -2)).view_as(weight))
        return value


def _weighed(weight: Tensor, value: Tensor) -> Tensor:
    """Their product; 0 where the weight is 0, since values after a terminal state are arbitrary, and may be NaN."""
    return torch.where(weight > 0, weight * value, 0)


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
