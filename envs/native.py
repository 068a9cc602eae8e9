"""A native `Env` as Gymnasium's: the way back from gym.py. d = x_dim · n = dim of an action · B rows"""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box as BoxSpace
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from rlamort.env import Env, Step
from rlamort.errors import UserError

LARGEST = float(np.finfo(np.float32).max)  # observations are finite, and checkers warn of a space that says otherwise
SEEDS = 2**31


class NativeVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """The rows of a native environment: observations (B, d), actions (B, n) in [-1, 1]^n, which `env.domain.act` takes to Y.

    A row that ends gives its last observation in `info["final_obs"]`, and that of its next episode as the observation
    (SAME_STEP autoreset): every step is a transition, and none of what happened is lost.

    Args:
        env: what is adapted; it forgives no faults, since Gymnasium has no word for a row that was merely reset.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(self, env: Env) -> None:
        self.env, self.num_envs = env, env.count
        self.single_observation_space, self.single_action_space = _spaces(env)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return _observed(self.env.reset(int(self.np_random.integers(SEEDS)))), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        step = _played(self.env, actions)
        ended, info = step.terminated | step.truncated, {}
        if ended.any():
            last = np.full(self.num_envs, None, dtype=object)
            for row, observation in zip(np.flatnonzero(ended), _observed(step.x_next)[ended], strict=True):
                last[row] = observation
            info = {"final_obs": last, "_final_obs": ended}
        return _observed(self.env.x), step.reward.double().numpy(force=True), step.terminated, step.truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close()


class NativeEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """The single row of a native environment, as `NativeVectorEnv`.

    Args:
        env: of one row.

    Raises:
        UserError: it has several.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, env: Env) -> None:
        if env.count != 1:
            raise UserError(f"env {env.name}: it has {env.count} rows; one is needed here, or NativeVectorEnv for several")
        self.env = env
        self.observation_space, self.action_space = _spaces(env)
        self._waiting = False  # the episode is over, and the first context of the next one is there already

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None or not self._waiting:
            self.env.reset(int(self.np_random.integers(SEEDS)))
        self._waiting = False
        return _observed(self.env.x)[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        step = _played(self.env, action[None])
        terminated, truncated = bool(step.terminated[0]), bool(step.truncated[0])
        self._waiting = terminated or truncated
        return _observed(step.x_next)[0], float(step.reward[0]), terminated, truncated, {}

    def close(self) -> None:
        self.env.close()


def _spaces(env: Env) -> tuple[BoxSpace, BoxSpace]:
    d, n = env.spec.x_dim, len(env.spec.low)
    return BoxSpace(-LARGEST, LARGEST, (d,), np.float32), BoxSpace(-1.0, 1.0, (n,), np.float32)


def _observed(x: Tensor) -> np.ndarray:
    return np.array(x.numpy(force=True), dtype=np.float32)  # a copy: what users do with it is theirs


def _played(env: Env, actions: np.ndarray) -> Step:
    u = torch.from_numpy(np.asarray(actions, dtype=np.float32)).to(env.device, torch.get_default_dtype())
    return env.step(env.domain.act(u))
