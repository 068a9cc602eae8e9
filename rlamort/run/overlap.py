"""The environment's step beside the updates, for actions that are one round of updates old."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlamort.adjoint import Carry
from rlamort.env import Env
from rlamort.errors import UserError
from rlamort.objective import Metrics
from rlamort.train import Updates


def require_apart(env: Env) -> None:
    """Raises UserError if an environment is stepped where updates run, so that neither could go on beside the other."""
    if env.place == env.device:
        raise UserError(
            f"overlap=true: {env.name} is stepped on {env.place}, where updates run too; device=cuda and an environment of "
            f"Gymnasium's are needed"
        )


class Overlap:
    """Rounds whose action is chosen before their updates, which a GPU computes while the environment is stepped with it.

    Args:
        updates: the rounds.
        env: what is stepped.
    """

    def __init__(self, updates: Updates, env: Env) -> None:
        self.updates = updates
        self.chosen = torch.empty(env.count, env.domain.dim, pin_memory=True)
        self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def __call__(self, improves: Sequence[bool], x: Tensor | None, h: Carry = ()) -> tuple[Metrics, Tensor | None, Carry]:
        if x is None or not improves:
            return self.updates(improves, x, h)
        _, y, h = self.updates((), x, h)
        assert y is not None
        self.chosen.copy_(y, non_blocking=True)
        self.arrived.record()
        metrics, _, _ = self.updates(improves, None, ())
        self.arrived.synchronize()  # with the copy alone: the GPU is at the updates when this returns
        return metrics, self.chosen.clone(), h
