"""A problem in float64, in which solutions are certified whatever the dtype of the model. x (B, d) · y (B, n)"""

import copy

import torch
from torch import Tensor

from rlamort.problem import Problem


def widened(problem: Problem, y: Tensor, x: Tensor) -> Problem:
    """A copy of the problem in float64, as the problem is now, for contexts x (B, d), B >= 1, and solutions y (B, n).

    It is the problem itself where all is float64 already, or where the cost is not computed in float64 when all that it is
    given is: with the user's own float32 tensors, say, that no buffer holds.

    It is made at every call, since nothing less sees all that can change: a number in an attribute, an entry of a list or an
    array, a parameter that a recorded graph updates without raising its version. Beside what it is for, that takes little.
    """
    own = (*problem.parameters(), *problem.buffers())
    if all(t.dtype is torch.float64 for t in (y, *own) if t.is_floating_point()):
        return problem
    try:
        twin = copy.deepcopy(problem).requires_grad_(False).double()
    except Exception:  # whatever a user's code raises
        return problem
    return twin if in_float64(twin, y, x) else problem


@torch.no_grad()
def in_float64(problem: Problem, y: Tensor, x: Tensor) -> bool:
    """Whether the problem's cost is float64 where contexts x (B, d), B >= 1, and solutions y (B, n) are."""
    with torch.random.fork_rng([y.device] if y.is_cuda else []):
        try:
            return problem.cost(y[:1].double(), problem.layout.unpack(x[:1].double())).dtype is torch.float64
        except Exception:  # as above, at a dtype that nobody asked it to take
            return False
