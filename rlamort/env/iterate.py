"""A solver as an environment of many steps: the state is its iterate, the action the parameters of its next step.

I instances side by side · m decisions in a step · B = I m environments · x context (I, d) · y iterate (I, n) · h carry
· phi features (I, m, k), the observations of an agent: (B, k) · u parameters in [-1, 1]: (B, a)
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlamort.env import Env, Episode, Spec, Step
from rlamort.env.one_step import Faults, blaming, contexts
from rlamort.errors import Diverged, Fault, UserError
from rlamort.objective import Cost, Oracle
from rlamort.problem import Problem, begun, require_frozen
from rlamort.update.parametric import Fold, ParametricStep

Reward = Callable[[Tensor, Tensor, Tensor, Oracle], Tensor]


def unsolved(y: Tensor, y_next: Tensor, remains: Tensor, oracle: Oracle) -> Tensor:
    """-1 for every step after which its instance remains unsolved, (I,) (RLQP, Ichnowski et al., 2021)."""
    return -remains.to(y.dtype)


def decrease(y: Tensor, y_next: Tensor, remains: Tensor, oracle: Oracle) -> Tensor:
    """f(y) - f(y_next), (I,), so that the return is the decrease of the cost in an episode."""
    return oracle.value(y) - oracle.value(y_next)


class IterateEnv(Env):
    """A solver's iterations as an environment; a rollout has the iterates of `Unroll(init, Controlled(policy, step), ...)`.

    Every decision of every instance is an environment of its own, with its instance's reward and flags: environment i m + j is
    decision j of instance i. An episode terminates when the residual falls below `tol`, and is truncated after `horizon` steps.
    An instance with non-finite numbers is replaced: its step is no transition, and it counts as a fault.

    Args:
        problem: its class defines `residual`; it moves to `device`.
        step: the solver's step; it moves to `device`.
        init: x (I, d) -> the first iterate (I, n); a model.
        horizon: steps after which an episode is truncated.
        tol: the residual below which an instance is solved.
        reward: of a step: (y, y_next, whether it remains unsolved (I,), oracle) -> (I,).
        instances: I.
        device: of tensors.
        max_faults: number of tolerated steps with non-finite numbers.

    Raises:
        UserError: the problem defines no residual, or has parameters that are to be learned, or horizon is below 1.
        Fault: one of the problem's methods raises.

    Attributes:
        y: (I, n), the iterates.
        solving: (I, d), their contexts.
    """

    def __init__(
        self,
        problem: Problem,
        step: ParametricStep,
        init: Callable[[Tensor], Tensor],
        *,
        horizon: int,
        tol: float,
        reward: Reward = unsolved,
        instances: int = 1,
        device: torch.device | None = None,
        max_faults: int = 0,
    ) -> None:
        device = device or torch.device("cpu")
        name = type(problem).__name__
        if horizon < 1:
            raise UserError(f"horizon={horizon}: 1 or more is needed")
        if type(problem).residual is Problem.residual:
            raise UserError(
                f"{name}.residual: it is not defined, and says when an instance is solved; (y, x) -> (B,) is needed"
            )
        require_frozen(problem, f"{name}: rewards have", "the method amortize before")
        bounds = [1.0] * step.outputs
        super().__init__(Spec(step.inputs, [-bound for bound in bounds], bounds), device)
        self.problem, self.solver, self.init = begun(problem).to(device), step.to(device), init
        self.horizon, self.tol, self.reward = horizon, tol, reward
        self.fold, self.size = Fold(step.decisions), instances
        self.name, self.count = f"{type(step).__name__} on {name}", instances * step.decisions
        self.f, self.faults, self.steps = Cost(problem), Faults(name, max_faults), 0
        self._generator = np.random.default_rng(0)
        self._total, self._length = np.zeros(instances), np.zeros(instances, dtype=np.int64)
        self._finished: list[Episode] = []

    def reset(self, seed: int) -> Tensor:
        """Draw new instances, which depend on the seed and on their number."""
        self._generator = np.random.default_rng(seed)
        self._total[:], self._length[:] = 0, 0
        self._finished.clear()
        self.solving, self.y, self.h, phi = self._begin(self.size)
        if not phi.isfinite().all():
            raise Fault(f"{self.name}: the features of its first iterates are not finite")
        self.x = self.fold.rows(phi)
        return self.x

    @torch.no_grad()
    def step(self, y: Tensor) -> Step:
        """Take one step of the solver in every instance, with parameters y (B, a) in [-1, 1]."""
        x, oracle = self.solving, self.f.oracle(self.solving)
        with blaming(self.name):
            y_next, h = self.solver(self.fold.items(y), self.y, self.h, self.f.seen(x), oracle)
            y_next = self.problem.domain.at(x).nearest(y_next)
            residual = self.problem.residual(y_next, self.problem.layout.unpack(x))
            assert residual is not None, "a class that defines `residual` gives one"
            reward = self.reward(self.y, y_next, ~(residual < self.tol), oracle)
            phi = self.solver.features(y_next, h, self.f.seen(x), oracle)
        sound = reward.isfinite() & residual.isfinite() & phi.isfinite().flatten(1).all(-1)
        solved, valid = torch.stack([residual < self.tol, sound]).numpy(force=True)
        if not valid.all():
            if not y.isfinite().all():
                raise Diverged(
                    f"{self.name}, step {self.steps}: the policy's parameters are not finite; its network has diverged"
                )
            self.faults.add(~valid, self.steps, "its iterate is no longer finite")
            reward = torch.where(sound, reward, torch.zeros_like(reward))
            phi = torch.where(sound[:, None, None], phi, torch.zeros_like(phi))
        self.steps += 1
        truncated = ~solved & (self._length + 1 >= self.horizon)
        self._record(reward, valid, solved | truncated)
        self.y, self.h = y_next, h
        x_next = self.x = self.fold.rows(phi)
        over = solved | truncated | ~valid
        if over.any():
            self._replace(over, phi)
        terminated, truncated, valid = (np.repeat(flag, self.fold.decisions) for flag in (solved, truncated, valid))
        return Step(x_next, self.fold.shared(reward), terminated, truncated, valid)

    def episodes(self) -> list[Episode]:
        """Finished episodes, one per instance."""
        finished, self._finished = self._finished, []
        return finished

    def state(self) -> dict[str, Any]:
        return {
            "solving": self.solving, "y": self.y, "h": list(self.h), "x": self.x,
            "generator": self._generator.bit_generator.state, "total": self._total.copy(), "length": self._length.copy(),
            "finished": [[e.total, e.length] for e in self._finished], "steps": self.steps, "faults": self.faults.count,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> bool:
        self.solving, self.y, self.x = (state[key].to(self.device) for key in ("solving", "y", "x"))
        self.h = tuple(part.to(self.device) for part in state["h"])
        self._generator.bit_generator.state = state["generator"]
        self._total[:], self._length[:] = state["total"], state["length"]
        self._finished = [Episode(total, length) for total, length in state["finished"]]
        self.steps, self.faults.count = state["steps"], state["faults"]
        return True

    def close(self) -> None:
        """Nothing to release."""

    @torch.no_grad()
    def _begin(self, count: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
        """Draw new instances: contexts, first iterates, carries, features."""
        x = contexts(self.problem, count, self.device, self._generator)
        with blaming(self.name):
            seen, oracle = self.f.seen(x), self.f.oracle(x)
            y = self.init(seen)
            h = self.solver.start(y, seen)
            phi = self.solver.features(y, h, seen, oracle)
        needed = (count, self.solver.decisions, self.solver.inputs)
        if phi.shape != needed:
            raise UserError(
                f"{type(self.solver).__name__}.features: shape {tuple(phi.shape)} is returned; instances, decisions and "
                f"inputs, {needed}, is needed"
            )
        return x, y, h, phi

    def _replace(self, over: np.ndarray, phi: Tensor) -> None:
        at = torch.from_numpy(np.flatnonzero(over)).to(self.device)
        x, y, h, fresh = self._begin(len(at))
        self.solving, self.y = self.solving.index_copy(0, at, x), self.y.index_copy(0, at, y)
        self.h = tuple(old.index_copy(0, at, new) for old, new in zip(self.h, h, strict=True))
        self.x = self.fold.rows(phi.index_copy(0, at, fresh))

    def _record(self, reward: Tensor, valid: np.ndarray, ended: np.ndarray) -> None:
        self._total += reward.numpy(force=True)
        self._length += 1
        self._finished += [Episode(float(self._total[i]), int(self._length[i])) for i in np.flatnonzero(ended & valid)]
        over = ended | ~valid
        self._total[over], self._length[over] = 0, 0
