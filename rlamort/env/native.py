"""Native environments as Gymnasium environments. d = x_dim · n = dim of an action · B environments"""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box as BoxSpace
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from rlamort.domain import Box, Domain
from rlamort.env import Env, Step
from rlamort.errors import UserError

LARGEST = float(np.finfo(np.float32).max)  # bounds of observations: Gymnasium's checker warns of infinite ones
SEEDS = 2**31


class NativeVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """A native environment as a vector environment: observations (B, d) and actions.

    If Y is a box, actions are y (B, n) in Y; else they are u (B, inputs) in [-1, 1]^inputs, from which `env.domain.act`
    computes y, since agents of other libraries act in boxes. With `solutions` they are always y (B, n), as from `predict` of an
    amortized model, and are projected onto Y.

    At the end of an episode its last observation is in `info["final_obs"]`, and the observation is the first one of the next
    episode (SAME_STEP autoreset), so every step is a transition. Where a problem has constraints, `info["violation"]` is (B,).

    Args:
        env: the native environment; it must tolerate no faults, since Gymnasium has no flag for a step without a transition.
        solutions: whether actions are points of Y also if Y is not a box.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(self, env: Env, solutions: bool = False) -> None:
        self.env, self.num_envs = env, env.count
        self.single_observation_space, self.single_action_space, self._solution = spaces(env, solutions)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return _observed(self.env.reset(int(self.np_random.integers(SEEDS)))), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        step = _played(self.env, actions, self._solution)
        ended, info = step.terminated | step.truncated, dict[str, Any]()
        if ended.any():
            last = np.full(self.num_envs, None, dtype=object)
            for row, observation in zip(np.flatnonzero(ended), _observed(step.x_next)[ended], strict=True):
                last[row] = observation
            info = {"final_obs": last, "_final_obs": ended}
        if step.violation is not None:
            info["violation"] = step.violation.double().numpy(force=True)
        return _observed(self.env.x), step.reward.double().numpy(force=True), step.terminated, step.truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close()


class NativeEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A single native environment, as `NativeVectorEnv`.

    Args:
        env: with a count of 1.
        solutions: as there.

    Raises:
        UserError: its count is larger.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, env: Env, solutions: bool = False) -> None:
        if env.count != 1:
            raise UserError(f"env {env.name}: it has a count of {env.count}; 1 is needed here, or NativeVectorEnv for several")
        self.env = env
        self.observation_space, self.action_space, self._solution = spaces(env, solutions)
        self._waiting = False  # the episode is over, and the first context of the next one is there already

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None or not self._waiting:
            self.env.reset(int(self.np_random.integers(SEEDS)))
        self._waiting = False
        return _observed(self.env.x)[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        step = _played(self.env, action[None], self._solution)
        terminated, truncated = bool(step.terminated[0]), bool(step.truncated[0])
        self._waiting = terminated or truncated
        info = {} if step.violation is None else {"violation": float(step.violation[0])}
        return _observed(step.x_next)[0], float(step.reward[0]), terminated, truncated, info

    def close(self) -> None:
        self.env.close()


Solution = Callable[[Domain, Tensor], Tensor]  # C(x), actions -> y


def spaces(env: Env, solutions: bool = False) -> tuple[BoxSpace, BoxSpace, Solution]:
    """The spaces of observations and actions, and the map from actions to solutions.

    Args:
        env: of a problem.
        solutions: as in `NativeVectorEnv`.
    """
    observation, domain = BoxSpace(-LARGEST, LARGEST, (env.spec.x_dim,), np.float32), env.domain
    if isinstance(domain, Box):
        low, high = (bound.numpy(force=True).astype(np.float32) for bound in (domain.low, domain.high))
        return observation, BoxSpace(low, high, dtype=np.float32), _nearest
    if solutions:
        return observation, BoxSpace(-LARGEST, LARGEST, (domain.dim,), np.float32), _nearest
    return observation, BoxSpace(-1.0, 1.0, (domain.inputs,), np.float32), _act


def _nearest(domain: Domain, y: Tensor) -> Tensor:
    return domain.nearest(y)


def _act(domain: Domain, u: Tensor) -> Tensor:
    return domain.act(u)


def _observed(x: Tensor) -> np.ndarray:
    return np.array(x.numpy(force=True), dtype=np.float32)  # a copy: what users do with it is theirs


def _played(env: Env, actions: np.ndarray, solution: Solution) -> Step:
    y = torch.from_numpy(np.asarray(actions, dtype=np.float32)).to(env.device, torch.get_default_dtype())
    return env.step(solution(env.domain.at(env.x), y))
