"""The space and step size of gradient refinement, chosen by trial.

Steps in Y reach solutions at its boundary, where many problems have them. If the gradient grows without bound towards the
boundary they fail; in the chart, the unconstrained coordinates v with y = project(v), the boundary is infinitely far away.

x context (B, d) · y solution (B, n) · v (B, inputs)
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlamort.adjoint import Adjoint
from rlamort.domain import Domain, Euclid
from rlamort.model import Full, Latent, Model, Unroll, itself
from rlamort.nets import Zeros
from rlamort.objective import Objective
from rlamort.update import Gradient

Space = Literal["solution", "chart"]
SPACES: tuple[Space, ...] = ("solution", "chart")
RATES = [10 ** (k / 2) for k in range(-6, 7)]
TRIED, STEPS = 64, 30  # contexts, and steps from the middle of Y
WORTH = 1e-3  # relative advantage that the chart must have, since boundaries are reached in Y alone
CLIP = 1e3  # largest gradient norm, per item


class Trial(NamedTuple):
    """The result of gradient steps of the best size in one space."""

    rate: float
    cost: float  # mean cost of the best iterates; infinite if none is finite


class Refinement(NamedTuple):
    """The better space, and the results of both."""

    space: Space
    trials: dict[Space, Trial]


def steps_in(
    space: Space, net: nn.Module, domain: Domain, rate: float | nn.Module, steps: int, adjoint: Adjoint | None, keep_best: bool
) -> Model:
    """Gradient steps after the prediction project(net(x)).

    Args:
        space: solution takes steps in Y, each followed by the Euclidean projection; chart in v.
        net: (B, d) -> (B, domain.inputs).
        domain: Y.
        rate: step size, or a module that computes it.
        steps: K.
        adjoint: how losses differentiate through them; None unrolls.
        keep_best: whether each iterate is the best so far.
    """
    update = Gradient(rate, clip=CLIP)
    if space == "solution":
        return Unroll(Full(net, domain), update, steps, domain, adjoint, keep_best=keep_best)
    chart = Euclid(domain.inputs)
    return Latent(itself, Unroll(Full(net, chart), update, steps, chart, adjoint, keep_best=keep_best), domain)


def refinement(f: Objective, domain: Domain, x: Tensor) -> Refinement:
    """Try steps of many sizes from the middle of Y in both spaces, for contexts x (B, d), and compare their final costs.

    Torch's generator state is unchanged.
    """
    x = x[:TRIED]
    if x.is_meta:  # nothing has a value while sizes alone are asked
        return Refinement("solution", {space: Trial(RATES[0], math.inf) for space in SPACES})
    with _aside(x):
        trials = {space: _trial(f, domain, x, space) for space in SPACES}
        start = f(domain.project(x.new_zeros(len(x), domain.inputs)), x).nan_to_num(torch.inf).mean().item()
    inside, chart = trials["solution"].cost, trials["chart"].cost
    space: Space = "chart" if chart < inside - WORTH * (start - min(inside, chart)) else "solution"
    return Refinement(space, trials)


def _trial(f: Objective, domain: Domain, x: Tensor, space: Space) -> Trial:
    found = []
    for rate in RATES:
        model = steps_in(space, Zeros(domain.inputs), domain, rate, STEPS, None, keep_best=True)
        try:
            cost = f(model(f.seen(x), f.oracle(x)), x).nan_to_num(torch.inf).mean().item()
        except Exception:  # whatever a user's cost raises where such large steps lead
            cost = math.inf
        found.append(Trial(rate, cost))
    return min(found, key=lambda trial: trial.cost)


@contextlib.contextmanager
def _aside(x: Tensor) -> Iterator[None]:
    """A context without gradients, with torch's generator state restored, and without warnings, which training repeats."""
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def repeats(f: Objective, domain: Domain, x: Tensor) -> bool:
    """Whether f is deterministic; a random one cannot tell which iterate is the best."""
    x = x[:TRIED]
    if x.is_meta:
        return True
    with _aside(x):
        y = domain.project(x.new_zeros(len(x), domain.inputs))
        return torch.equal(f(y, x), f(y, x))
