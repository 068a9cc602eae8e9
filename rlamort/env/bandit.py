"""A `Problem` for agents that do not know its objective: a contextual bandit, whose contexts stay on their device.

B contexts side by side · d numbers in a context · u action in [-1, 1]^inputs
"""

from typing import Any

from torch import Tensor

from rlamort.env.base import Env, Episode, Space, Spec, Step
from rlamort.env.native import spaces
from rlamort.env.one_step import OneStep
from rlamort.errors import UserError


class Bandit(Env):
    """Actions u (B, inputs) in [-1, 1]^inputs are the solutions y = domain.act(u), and the reward is -f(y; x).

    Its spaces are those of the problem as a Gymnasium environment (`rlamort.env.native`): agents of one play in the other.

    Args:
        inner: the problem's environment, which takes y in Y.

    Raises:
        UserError: the problem has constraints, of which rewards would say nothing.
    """

    def __init__(self, inner: OneStep) -> None:
        if inner.constraints is not None and not inner.problem.violation_penalty > 0:
            raise UserError(
                f"{inner.name}.violation_penalty: {inner.problem.violation_penalty:g} is given; it has constraints, of which "
                "an agent that sees nothing but rewards would not know: a weight above 0 is needed"
            )
        observation, action, _ = spaces(inner)
        spec = Spec.of(Space.of(observation), Space.of(action))
        super().__init__(spec._replace(frozen=inner.spec.frozen), inner.device)
        self.inner, self.name, self.count = inner, inner.name, inner.count

    @property
    def x(self) -> Tensor:  # type: ignore[override]  # the contexts that stand are the problem's
        """(B, d), the contexts to act on now."""
        return self.inner.x

    def reset(self, seed: int) -> Tensor:
        return self.inner.reset(seed)

    def step(self, y: Tensor) -> Step:
        return self.inner.step(self.inner.domain.at(self.x).act(y))

    def episodes(self) -> list[Episode]:
        return self.inner.episodes()

    def state(self) -> dict[str, Any]:
        return self.inner.state()

    def restore(self, state: dict[str, Any]) -> bool:
        if "generator" not in state:  # of a run that played it through Gymnasium
            self.unsaved = ("it was saved by a version that played problems through Gymnasium",)
            self.inner.reset(state["steps"])
            return False
        return self.inner.restore(state)

    def held_out(self) -> "Bandit":
        return Bandit(self.inner.held_out())

    def close(self) -> None:
        self.inner.close()
