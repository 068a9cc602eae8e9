"""A problem in float64, in which solutions are certified whatever the dtype of the model. x (B, d) · y (B, n)"""

import copy

import torch
from torch import Tensor

from rlamort.problem import Problem


class Widened:
    """Copies of problems in float64, made again only after their tensors changed.

    Args:
        problem: the user's.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self._twin = problem, problem
        self._stamp: tuple[tuple[int, int], ...] = ()

    def at(self, y: Tensor, x: Tensor) -> Problem:
        """The problem in float64 for contexts x (B, d), B >= 1, and solutions y (B, n).

        It is the problem itself where all is float64 already, or where the cost is not computed in float64 when all that it is
        given is: with the user's own float32 tensors, say, that no buffer holds.
        """
        own = (*self.problem.parameters(), *self.problem.buffers())
        if all(t.dtype is torch.float64 for t in (y, *own) if t.is_floating_point()):
            return self.problem
        stamp = tuple((id(tensor), tensor._version) for tensor in own)
        if self._twin is self.problem or stamp != self._stamp:
            self._stamp, self._twin = stamp, _widened(self.problem, y, x)
        return self._twin


def _widened(problem: Problem, y: Tensor, x: Tensor) -> Problem:
    with torch.random.fork_rng([y.device] if y.is_cuda else []), torch.no_grad():
        try:
            twin = copy.deepcopy(problem).requires_grad_(False).double()
            exact = twin.cost(y[:1].double(), twin.layout.unpack(x[:1].double())).dtype is torch.float64
        except Exception:  # whatever a user's code raises at a dtype that nobody asked it to take
            return problem
    return twin if exact else problem
