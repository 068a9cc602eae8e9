"""The base class of agents, the player that acts with them, and the gradient step that all learning takes.

B batch · N environments side by side · d = x_dim · n = dim of an action · h carry, what an agent remembers of each environment
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlamort.adjoint import Carry
from rlamort.domain import Domain
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.model import Model
from rlamort.nets import FreeWeights, Normaliser, UnitWeights, Unnormalised
from rlamort.objective import MaxQ, Metrics, Soft
from rlamort.source import Batch, Contexts, Labelled
from rlamort.update import Anytime, Refine, anytime


class Adam(nn.Module):
    """Adam (Kingma and Ba, 2015, algorithm 1), with its state in tensors that travel with the agent's.

    `torch.optim.Adam` keeps its state in Python and breaks a compiled graph at every step; this one does neither.

    Args:
        parameters: the tensors that it will move, which fix the shapes of its state.
        learning_rate: step size.
        decay: beta_1 and beta_2, of the moments.
        epsilon: added to the root of the second moment.
        horizon: steps over which the step size falls to zero along a half cosine (Loshchilov and Hutter, 2017); None keeps it.
        project: projects the parameters onto a constraint, in place, after every step; None for parameters that are free.
    """

    steps: Tensor
    sound: Tensor
    corrections: Tensor
    decays: Tensor
    scales: Tensor
    powers: Tensor

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        decay: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        horizon: int | None = None,
        project: FreeWeights | UnitWeights | None = None,
    ) -> None:
        super().__init__()
        parameters = list(parameters)
        self.project = project or FreeWeights(self)
        self.learning_rate, self.decay, self.epsilon, self.horizon = learning_rate, decay, epsilon, horizon
        # new, and no arithmetic below: on the meta device, where a run's memory is added up, both would import torch's compiler
        self.mean = _state(p.new_zeros(p.shape) for p in parameters)
        self.square = _state(p.new_zeros(p.shape) for p in parameters)
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))
        # whether every loss so far was finite: noted where it is computed, and read when there is time to
        self.register_buffer("sound", torch.ones((), dtype=torch.bool), persistent=False)
        # of the next step: kept, since a compiled kernel that derived them would do so for every few numbers that it moves
        self.register_buffer("corrections", torch.tensor((learning_rate / (1 - decay[0]), (1 - decay[1]) ** -0.5)))
        for name, values in {"decays": decay, "scales": (learning_rate, 1.0), "powers": (-1.0, -0.5)}.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def step(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Update the parameters in place."""
        mean, square, (first, second) = list(self.mean), list(self.square), self.decay
        torch._foreach_lerp_(mean, gradients, 1 - first)
        torch._foreach_mul_(square, second)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - second)
        scales = torch._foreach_sqrt(square)
        torch._foreach_mul_(scales, self.corrections[1])
        torch._foreach_add_(scales, self.epsilon)
        moves = torch._foreach_div(mean, scales)
        torch._foreach_mul_(moves, self.corrections[0])
        torch._foreach_sub_(parameters, moves)
        self.project(parameters)
        self.steps += 1
        self._correct()

    @torch.no_grad()
    def _correct(self) -> None:
        """The bias corrections of the next step."""
        unbiased = 1 - self.decays ** (self.steps + 1)
        corrections = self.scales * unbiased**self.powers  # rate / (1 - beta_1^t), and the inverse root for the second moment
        if self.horizon is not None:
            done = (self.steps / self.horizon).clamp(max=1)
            corrections = corrections * torch.where(self.powers == -1, (1 + torch.cos(torch.pi * done)) / 2, 1)
        self.corrections.copy_(corrections)


def _state(tensors: Iterable[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)


def descend(loss: Tensor, parameters: Iterable[nn.Parameter], optimiser: Adam) -> None:
    """One gradient step on `loss` for exactly these parameters: no other gradient is computed, and none is stored."""
    owned: list[Tensor] = list(parameters)
    optimiser.sound.logical_and_(loss.detach().isfinite())
    optimiser.step(owned, list(torch.autograd.grad(loss, owned)))


class Agent(nn.Module):
    """Something that acts, learns f (`evaluate`) and amortizes it (`improve`).

    `evaluate` and `improve` take a batch of fixed shape and give detached 0-d tensors; nothing in them reads a value back
    to Python, so that a whole update can be captured. They draw from torch's global generator.

    One without a memory defines `act`; one that remembers something from step to step defines `start` and `play` instead.

    Args:
        spec: sizes and action bounds.
        normalise: whether observations are normalised by running statistics.

    Attributes:
        model: y_theta, where it has one.
        improve_every: calls of `evaluate` for one of `improve`.
        fit_every: environment steps between calls of `fit`; 0 never calls it.
        needs_fit: whether its actions or updates ask what only `fit` learns, so that it must come before them.
        fit_least: transitions that a fit needs at least; a run whose first one would find fewer is refused.
        fit_horizon: steps of one episode in a row, since the fit before, that a fit learns from; its field is `horizon`. A run
            whose fits would never find so many is refused.
        fit_field: the field that sets `fit_every`, for messages.
        adds_rewards: whether rewards of a model, in the environment's unit, are added to values of a critic of sampled ones.
        chosen: fields that were left to the agent, and what it chose; they are recorded with the run.
        loaded: whether it is from a file, without a replay.
    """

    model: Model
    improve_every: int = 1
    fit_every: int = 0
    needs_fit: bool = False
    fit_least: int = 0
    fit_horizon: int = 0
    fit_field: str = "fit_every"
    adds_rewards: bool = False
    loaded: bool = False

    def __init__(self, spec: Spec, *, normalise: bool) -> None:
        super().__init__()
        self.spec, self.units = spec, spec.units
        self.chosen: dict[str, Any] = {}
        self.normaliser = Normaliser(spec.x_dim) if normalise else Unnormalised()

    @property
    def domain(self) -> Domain:
        """Y, the domain of its actions: that of its environment."""
        return self.spec.domain

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device

    @property
    def acting(self) -> Model:
        """The model that acts: the one that is trained, unless a planner acts."""
        return self.model

    def start(self, count: int) -> Carry:
        """The carry of `count` environments whose episodes begin: tensors (count, ...); none without a memory."""
        return ()

    def play(self, x: Tensor, h: Carry, explore: bool) -> tuple[Tensor, Carry]:
        """As `act`, with the carry h of each environment, before and after. A pure function: h is not modified."""
        if type(self).act is Agent.act:
            raise NotImplementedError(f"{type(self).__name__}: it defines neither act nor play")
        return self.act(x, explore), h

    def act(self, x: Tensor, explore: bool) -> Tensor:
        """x (B, d), as the environment gives it -> y (B, n) in Y, where episodes begin; called without gradients."""
        return self.play(x, self.start(len(x)), explore)[0]

    def evaluate(self, batch: Any) -> Metrics:
        """Learn f."""
        raise NotImplementedError

    def improve(self, batch: Any) -> Metrics:
        """Amortize f: train y_theta on it."""
        raise NotImplementedError

    def fit(self, source: Any) -> Metrics:
        """Learn from everything that a source has collected, outside captured updates; returns detached 0-d tensors."""
        return {}

    def update(self, batch: Batch | Contexts | Labelled, improve: bool) -> Metrics:
        """One whole update on a raw batch, the unit of compilation."""
        batch = batch.through(self.normaliser)
        metrics = self.evaluate(batch)
        return metrics | self.improve(batch) if improve else metrics

    def update_from(self, sample: Callable[[], Batch | Contexts | Labelled], improve: bool) -> Metrics:
        """One whole update on the next batch of a source; no batch is drawn for an agent that does not use one."""
        return self.update(sample(), improve)

    def unsound(self) -> str:
        """What is not finite: a tensor, or the loss of one of its optimisers at some update; empty if all is finite."""
        for name, tensor in self.state_dict().items():
            if not tensor.isfinite().all():
                return name
        losses = (name for name, part in self.named_modules() if isinstance(part, Adam) and not part.sound)
        return next((f"a loss of {name}" for name in losses), "")

    def require_trained(self) -> None:
        """Raises UserError if learning would leave out something that it is to train; asked before it begins to learn."""

    def notice(self, recorded: Mapping[str, Any]) -> None:
        """Called with the metrics of every record: warn, once, where they say that something is wrong."""

    def observe(self, x: Tensor) -> None:
        """Update the observation statistics with contexts (B, d) met in play, on any device."""
        self.normaliser.update(x)

    def action_cost(self) -> MaxQ:
        """The actor's objective as a function of the action, on normalised contexts; of a soft one, without the entropy.

        Raises:
            UserError: it has no critic of actions.
        """
        f = getattr(self, "f", None)
        f = f.f if isinstance(f, Soft) else f
        if not isinstance(f, MaxQ):
            raise UserError(
                f"agent: {type(self).__name__} has no critic Q(x, y), so there is no max-Q problem to solve, and no action can "
                "be refined in it"
            )
        return f

    def refined(self, refine: Refine = None, budget_us: float | None = None) -> "Agent":
        """An agent whose actions are this one's refined, with the arguments of `predict`; itself where nothing is asked for.

        Raises:
            UserError: a value that is not allowed, or it has no critic of actions.
        """
        asked = anytime(refine, budget_us)
        return self if asked is None else Refining(self, asked)

    @torch.no_grad()
    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        *,
        refine: Refine = None,
        budget_us: float | None = None,
    ) -> tuple[np.ndarray, Any]:
        """An action in the environment's units, of a problem a solution in Y; the signature is Stable-Baselines3's.

        Args:
            observation: one observation in the shape of its space, or flat, or a batch of them along the first axis.
            state: what the call before returned; None where all episodes begin.
            episode_start: (B,) or one bool: where an episode begins, so that nothing is remembered; None where none does.
            deterministic: the policy's median action, instead of an exploring one; what is refined is always the median.
            refine: steps of refinement in the critic, from the policy's action: a number; auto, while a step is predicted to be
                worth it, see `Worth`; or an `Anytime`, with any solver. The result is never worse by the actor's objective.
            budget_us: microseconds for computing the action, without conversions; refinement ends when they are over. Without
                `refine`, there are as many steps as there is time for.

        Returns:
            Action in the shape and dtype of the action space, or a batch of them, and what the agent remembers: a tuple of
            arrays (B, ...), with B = 1 for one observation; of an agent without a memory, `state`.

        Raises:
            ValueError: the observation has another shape than the agent was trained on, or `state` another than the agent's.
            UserError: refinement without a critic, a value that is not allowed, or a budget below the unrefined action's time.
        """
        acting = self.refined(refine, budget_us)
        exact = next((p.dtype for p in self.parameters() if p.is_floating_point()), None) is torch.float64
        rows, batched = self.spec.observation.rows(observation, "observation", np.float64 if exact else np.float32)
        x = torch.from_numpy(rows).to(self.device)
        player = Player(acting, len(x))
        if player.h and state is not None:
            carry = (torch.from_numpy(np.array(part)).to(self.device) for part in state)
            player = Player(acting, len(x), tuple(carry))
            player.begin(np.broadcast_to(np.array(False if episode_start is None else episode_start, dtype=bool), len(x)))
        actions = self.units.decode(player(x, explore=not deterministic).numpy(force=True))
        state = tuple(part.numpy(force=True) for part in player.h) if player.h else state
        return (actions if batched else actions[0, ...]), state  # an array also where it has no axes


class Refining(Agent):
    """An agent without exploration whose actions are refined in its critic.

    Args:
        agent: whose actions and critic they are.
        steps: how they are refined.

    Raises:
        UserError: the agent has no critic of actions.
    """

    def __init__(self, agent: Agent, steps: Anytime) -> None:
        super().__init__(agent.spec, normalise=False)
        self.agent, self.steps, self.f = agent, steps, agent.action_cost()

    def start(self, count: int) -> Carry:
        return self.agent.start(count)

    def play(self, x: Tensor, h: Carry, explore: bool) -> tuple[Tensor, Carry]:
        began = self.steps.began()
        y, after = self.agent.play(x, h, explore=False)
        self.steps.require_time(began, lambda: self.agent.play(x, h, explore=False))
        return self.steps(self.f, self.domain, self.agent.normaliser(x), y, began), after


class Player:
    """An agent acting in environments side by side, with the carry of each.

    Args:
        agent: who plays.
        count: N.
        h: what it remembers of them; None where all episodes begin.

    Raises:
        ValueError: h has not the shapes of what this agent remembers.
    """

    def __init__(self, agent: Agent, count: int, h: Carry | None = None) -> None:
        self.agent, self.count = agent, count
        start = agent.start(count)
        self.h = start if h is None else h
        ours, theirs = ([tuple(part.shape) for part in carry] for carry in (start, self.h))
        if ours != theirs:
            raise ValueError(f"state: the agent remembers tensors of shapes {_listed(ours)}; {_listed(theirs)} given")

    @torch.no_grad()
    def __call__(self, x: Tensor, explore: bool) -> Tensor:
        """x (N, d), on any device -> y (N, n), on the agent's."""
        y, self.h = self.agent.play(x.to(self.agent.device), self.h, explore)
        return y

    def begin(self, begins: np.ndarray) -> None:
        """Reset the carry of the environments in which an episode begins, (N,) bool; the others' is unchanged."""
        if self.h and begins.any():
            where = torch.from_numpy(np.array(begins)).to(self.h[0].device)
            fresh = zip(self.agent.start(self.count), self.h, strict=True)
            self.h = tuple(torch.where(where.view(-1, *[1] * (old.ndim - 1)), new, old) for new, old in fresh)


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes)) or "none"
