"""L, the losses that train a model, and targets that critics regress on. B batch"""

import torch
from torch import Tensor

from rlamort.model import Model
from rlamort.objective import Metrics, Objective
from rlamort.source import Batch


def objective(model: Model, f: Objective, batch: Batch) -> tuple[Tensor, Metrics]:
    """L_obj = mean_B f(y_theta(x); x), the objective-based loss (tutorial, eq. 6)."""
    cost, metrics = f.report(model(batch.x), batch.x)
    loss = cost.mean()
    return loss, {"cost": loss.detach(), **metrics}


def td_target(batch: Batch, value_next: Tensor) -> Tensor:
    """r + gamma^m (1 - terminated) V(x_next), (B,): a truncated episode bootstraps, a terminated one does not."""
    # where, not a product: the value of a state after the end may be anything, NaN included
    future = torch.where(batch.terminated, torch.zeros_like(value_next), value_next)
    return batch.reward + batch.discount * future
