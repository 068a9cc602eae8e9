"""Max-Q: the problem that a policy amortizes, argmin_y -Q(x, y) over the states that it visits, with a frozen critic.

x state (B, d), as the environment gives it · y action (B, n) in [-1, 1]^n · f = -(mean Q - beta std Q) · N states visited
"""

import copy
from typing import NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rlamort.agent import Agent
from rlamort.env import Env, Policy
from rlamort.errors import UserError
from rlamort.objective import MaxQ
from rlamort.problem import Problem

M = TypeVar("M", bound=nn.Module)


class Visited(NamedTuple):
    """States visited in rollouts, in the order of time within each episode."""

    x: Tensor  # (N, d)
    episode: np.ndarray  # (N,) index of the episode
    time: np.ndarray  # (N,) steps since its reset

    def split(self, held_out: int) -> tuple[Self, Self]:
        """The states of all but the last `held_out` episodes, and of those: split by episode, as states in one are correlated.

        Raises:
            UserError: one side would be empty.
        """
        episodes = int(self.episode.max()) + 1
        if not 0 < held_out < episodes:
            raise UserError(f"held_out={held_out}: of {episodes} episodes, between 1 and {episodes - 1} can be held out")
        late = self.episode >= episodes - held_out
        return self.at(~late), self.at(late)

    def at(self, which: np.ndarray) -> Self:
        """The states of a mask, or of indices."""
        return type(self)(self.x[torch.from_numpy(which).to(self.x.device)], self.episode[which], self.time[which])


@torch.no_grad()
def visit(policy: Policy, env: Env, seed: int) -> Visited:
    """Roll out one episode in each environment, from seeds seed, seed + 1, ...: every state in which `policy` acted."""
    x, running = env.reset(seed), np.ones(env.count, dtype=bool)
    met, rows, times, time = [], [], [], 0
    while running.any():
        (acting,) = np.nonzero(running)
        met.append(x[torch.from_numpy(acting).to(x.device)])
        rows.append(acting)
        times.append(np.full(len(acting), time))
        step = env.step(policy(x))
        running = running & ~step.over
        x, time = env.x, time + 1
    env.episodes()
    episode = np.concatenate(rows)
    order = np.argsort(episode, kind="stable")
    states = torch.cat(met)[torch.from_numpy(order).to(x.device)]
    return Visited(states, episode[order], np.concatenate(times)[order])


class MaxQProblem(Problem[Tensor]):
    """f(y; x) = -(mean_i Q_i - beta std_i Q_i)(x, y) on [-1, 1]^n, the objective of the actor of `agent` (tutorial, eq. 3).

    Ensemble members, pessimism and normalisation are those of the agent's own objective; of a soft one, the term that is a
    function of the action. The critic is a copy with buffers instead of parameters, so it moves with the problem and is not
    trained with a solver.

    Args:
        agent: a trained agent with an `action_cost`.
        states: (N, d), from which contexts are drawn.

    Raises:
        UserError: the agent has no critic of actions, or the states have another size.
    """

    states: Tensor

    def __init__(self, agent: Agent, states: Tensor) -> None:
        super().__init__()
        f = agent.action_cost()
        if states.ndim != 2 or states.shape[1] != agent.spec.x_dim or not len(states):
            raise UserError(f"states: shape {tuple(states.shape)} is given; (N, {agent.spec.x_dim}) with N > 0 is needed")
        self.domain = agent.spec.domain.to(states.device)
        self.critic, self.normaliser = frozen(f.critic), frozen(agent.normaliser)
        self.f = MaxQ(self.critic, f.beta, f.members)
        self.register_buffer("states", states.detach().clone())

    def contexts(self, count: int) -> Tensor:
        return self.states[torch.randint(len(self.states), (count,), device=self.states.device)]

    def cost(self, y: Tensor, x: Tensor) -> Tensor:
        return self.f(y, self.normaliser(x))


def frozen(module: M) -> M:
    """A copy with every parameter turned into a buffer."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, value.detach())
    return copied
