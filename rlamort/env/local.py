"""Vector environments that are stepped in this process."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rlamort.env.snapshot import FAULT, Snapshot


class LocalVectorEnv(VectorEnv[Any, Any, Any]):
    """Environments stepped in sequence in this process, with less overhead than `gymnasium.vector.SyncVectorEnv`.

    Args:
        makers: functions that make one environment each.
    """

    first: list[int] = []  # noqa: RUF012  # environments that keep a process's global generators: none
    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(self, makers: Sequence[Callable[[], Snapshot]]) -> None:
        self.envs = [make() for make in makers]
        self.num_envs = len(self.envs)
        self.single_observation_space, self.single_action_space = self.envs[0].observation_space, self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._observations: list[Any] = [None] * self.num_envs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        for row in range(self.num_envs) if options is None else np.flatnonzero(options["reset_mask"]):
            self._observations[row], _ = self.envs[row].reset(seed=None if seed is None else seed + int(row))
        return self._observations, {}

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        outcomes = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        self._observations, rewards, terminated, truncated, infos = map(list, zip(*outcomes, strict=True))
        faults = {row: info[FAULT] for row, info in enumerate(infos) if FAULT in info}
        return self._observations, rewards, terminated, truncated, {FAULT: faults}

    def call(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every environment, each with its own arguments."""
        return [getattr(env, name)(*one) for env, one in zip(self.envs, arguments, strict=True)]

    def close_extras(self, **kwargs: Any) -> None:
        for env in self.envs:
            env.close()
