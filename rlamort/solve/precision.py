"""A problem in float64, in which solutions are certified whatever the dtype of the model. x (B, d) · y (B, n)"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlamort.domain import Domain
from rlamort.problem import Parts, Problem

LARGE = 2**16  # numbers in a tensor or an array from which on it is no longer copied at every call


class Widening(dict[str, Tensor | None]):
    """A module's buffers, each of which becomes float64 when it is first read."""

    def __getitem__(self, name: str) -> Tensor | None:
        found = super().__getitem__(name)
        if found is not None and found.is_floating_point() and found.dtype is not torch.float64:
            found = self[name] = found.double()
        return found

    def get(self, name: str, default: Any = None) -> Any:
        return default if super().get(name) is None else self[name]

    def items(self) -> Any:  # lazily, as who looks for a device reads but the first
        return ((name, self[name]) for name in self)

    def values(self) -> Any:
        return (self[name] for name in self)


def widened(problem: Problem, y: Tensor, x: Tensor) -> Problem:
    """A copy of the problem in float64, as the problem is now, for contexts x (B, d), B >= 1, and solutions y (B, n).

    It is the problem itself where all is float64 already, or where the cost is not computed in float64 when all that it is
    given is: with the user's own float32 tensors, say, that no buffer holds.

    It is made at every call, since nothing less sees all that can change: a number in an attribute, an entry of a list or an
    array, a tensor that `.data` or a recorded graph updates without raising its version. So that this takes little, large
    tensors and arrays that are no parameters are not copied but shared, and a large buffer is widened only where the copy reads
    it, which data that contexts are drawn from never are; what is drawn from the copy is drawn by the problem as it is.
    """
    own = (*problem.parameters(), *problem.buffers())
    if all(t.dtype is torch.float64 for t in (y, *own) if t.is_floating_point()):
        return problem
    try:
        _ = problem.layout  # which the copy has then, too, without drawing contexts
        twin = _twin(problem)
    except Exception:  # whatever a user's code raises
        return problem
    return twin if in_float64(twin, y, x) else problem


def _twin(problem: Problem) -> Problem:
    """The copy, with `Widening` buffers in modules that have large ones."""
    shared = {id(one): one for module in problem.modules() for one in _large(vars(module), set())}
    twin = copy.deepcopy(problem, dict(shared)).requires_grad_(False)
    # a domain is asked for all of its data, and copies them between modules of its own
    holders = [module for module in twin.modules() if not isinstance(module, Domain)]
    whole = {id(buffer) for module in twin.modules() if isinstance(module, Domain) for buffer in module.buffers(recurse=False)}
    late = {id(one) for module in holders for one in module.buffers(recurse=False) if id(one) in shared} - whole
    twin._apply(lambda t: t.double() if t.is_floating_point() and id(t) not in late else t)  # type: ignore[no-untyped-call]
    for module in holders if late else ():
        vars(module)["_buffers"] = Widening(module._buffers)

    def drawing(name: str) -> Callable[[int], Parts]:
        # of a copy again, and of its arrays: what draws may count, have a generator, or shuffle
        kept = {id(one): one for one in (*shared.values(), *problem.parameters()) if isinstance(one, Tensor)}
        return lambda count: getattr(copy.deepcopy(problem, dict(kept)), name)(count)

    vars(twin).update({name: drawing(name) for name in ("contexts", "held_out")})
    return twin


def _large(value: object, seen: set[int]) -> Iterator[Any]:
    """The large tensors and arrays in a value, or in lists, tuples and dicts of it; no parameters, which move in place.

    Containers in `seen`, to which it adds, are passed over: they may hold each other.
    """
    if isinstance(value, dict | list | tuple):
        if id(value) in seen:
            return
        seen.add(id(value))
        for one in value.values() if isinstance(value, dict) else value:
            yield from _large(one, seen)
    elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        yield from [value] if value.numel() >= LARGE else []
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield from [value] if value.size >= LARGE else []


@torch.no_grad()
def in_float64(problem: Problem, y: Tensor, x: Tensor) -> bool:
    """Whether the problem's cost is float64 where contexts x (B, d), B >= 1, and solutions y (B, n) are."""
    with torch.random.fork_rng([y.device] if y.is_cuda else []):
        try:
            return problem.cost(y[:1].double(), problem.layout.unpack(x[:1].double())).dtype is torch.float64
        except Exception:  # as above, at a dtype that nobody asked it to take
            return False
