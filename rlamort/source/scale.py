"""Scales of rewards, by which a replay divides them when they are sampled. N environments side by side

Statistics are kept where environments are stepped, and the divisor on the training device, always in the same memory.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlamort.env import Env
from rlamort.nets import Normaliser

Scaled = Literal["none", "return", "bounded"]


class Unscaled:
    """Rewards as they are.

    Args:
        env: where rewards come from.
        discount: of a step.
    """

    def __init__(self, env: Env, discount: float) -> None:
        pass

    def update(self, reward: Tensor, valid: np.ndarray, over: np.ndarray) -> None:
        """Take the rewards (N,) of a step into the statistics: of environments that are `valid`, whose episodes are `over`."""

    def cut(self) -> None:
        """All episodes that go on have ended."""

    def __call__(self, reward: Tensor) -> Tensor:
        """Rewards (B,), scaled."""
        return reward

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """As `state` returned it."""


class RunningReturn(Unscaled):
    """Rewards over the standard deviation of the running return G (Engstrom et al., 2020, section 3; Gymnasium's wrapper).

    G <- gamma (1 - ended) G + r in each environment, where `ended` says that the step before ended its episode, by termination
    or truncation: then no episode's return holds rewards of another. The variance is the population's, of G at all steps.
    """

    def __init__(self, env: Env, discount: float) -> None:
        self.discount, self.place = discount, env.place
        self.running = torch.zeros(env.count, dtype=torch.float64, device=env.place)  # gamma (1 - ended) G
        self.moments = Normaliser(1).to(env.place)
        self.divisor = torch.ones((), device=env.device)

    def update(self, reward: Tensor, valid: np.ndarray, over: np.ndarray) -> None:
        self.running += reward
        met = self.running if valid.all() else self.running[torch.from_numpy(valid).to(self.place)]
        if len(met):
            self.moments.update(met[:, None])
            self.divisor.fill_(float(self.size(met)))  # a launch: a copy from the CPU would wait for the updates before it
        self.running *= self.discount
        if over.any():
            self.running.masked_fill_(torch.from_numpy(over).to(self.place), 0.0)

    def size(self, met: Tensor) -> Tensor:
        """The divisor, 0-d, after returns `met` (M,)."""
        std = self.moments.variance[0].sqrt()
        return torch.where(std > 1e-6, std, 1.0)  # returns that never vary have no scale

    def cut(self) -> None:
        self.running.zero_()

    def __call__(self, reward: Tensor) -> Tensor:
        return reward / self.divisor

    def state(self) -> dict[str, Any]:
        return {"running": self.running, "divisor": self.divisor, **self.moments.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        kept = dict(state)
        for name in ("running", "divisor"):
            ours: Tensor = getattr(self, name)
            if kept[name].shape != ours.shape:
                raise ValueError(f"reward_scale {name}: shape {tuple(kept[name].shape)}; {tuple(ours.shape)} is needed")
            ours.copy_(kept.pop(name))
        self.moments.load_state_dict({name: kept[name] for name in self.moments.state_dict()})


class BoundedReturn(RunningReturn):
    """As `RunningReturn`, and by no less than what brings the largest |G| so far to `bound` (Kim et al., 2025: FlashSAC)."""

    bound = 5.0

    def __init__(self, env: Env, discount: float) -> None:
        super().__init__(env, discount)
        self.largest = torch.zeros((), dtype=torch.float64, device=env.place)

    def size(self, met: Tensor) -> Tensor:
        self.largest.copy_(torch.maximum(self.largest, met.abs().max()))
        return torch.maximum(super().size(met), self.largest / self.bound)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "largest": self.largest}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.largest.copy_(state["largest"])


SCALES: dict[str, type[Unscaled]] = {"none": Unscaled, "return": RunningReturn, "bounded": BoundedReturn}
