"""The space and step size of gradient refinement, chosen by trial.

Steps in Y reach solutions at its boundary, where many problems have them. If the gradient grows without bound towards the
boundary they fail; in the chart, the unconstrained coordinates v with y = project(v), the boundary is infinitely far away.

x context (B, d) · y solution (B, n) · v (B, inputs) · z iterate, y or v
"""

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlamort.domain import Domain
from rlamort.objective import Objective
from rlamort.solve.classical import iterates
from rlamort.update import BestSoFar, Gradient, InChart, InY, Projected, Space

RATES = [10 ** (k / 2) for k in range(-6, 7)]
TRIED, STEPS = 64, 30  # contexts, and steps from the middle of Y
WORTH = 1e-3  # relative advantage that the chart must have, since boundaries are reached in Y alone
CLIP = 1e3  # largest gradient norm, per item


class Trial(NamedTuple):
    """The result of gradient steps of the best size in one space."""

    space: Space
    rate: float
    cost: float  # mean cost of the best iterates; infinite if none is finite


class Refinement(NamedTuple):
    """The trials in both spaces."""

    inside: Trial  # in Y
    chart: Trial
    start: float  # mean cost of the middle of Y

    @property
    def better(self) -> Trial:
        """That in the chart if its advantage is worth it."""
        worth = WORTH * (self.start - min(self.inside.cost, self.chart.cost))
        return self.chart if self.chart.cost < self.inside.cost - worth else self.inside

    def of(self, space: str) -> Trial:
        """The trial in the space of that name."""
        (found,) = (trial for trial in (self.inside, self.chart) if trial.space.name == space)
        return found


def refinement(f: Objective, domain: Domain, x: Tensor) -> Refinement:
    """Try steps of many sizes from the middle of Y in both spaces, for contexts x (B, d), and compare their final costs.

    Torch's generator state is unchanged.
    """
    x = x[:TRIED]
    inside, chart = InY(domain), InChart(domain)
    if x.is_meta:  # nothing has a value while sizes alone are asked
        return Refinement(Trial(inside, RATES[0], math.inf), Trial(chart, RATES[0], math.inf), math.inf)
    with _aside(x):
        start = _mean(f(domain.at(x).project(x.new_zeros(len(x), domain.inputs)), x))
        return Refinement(_trial(f, x, inside), _trial(f, x, chart), start)


def _trial(f: Objective, x: Tensor, space: Space) -> Trial:
    try:
        costs = _costs(f, x, space, RATES)
    except Exception:  # whatever a user's cost raises where such large steps lead: by itself, every other rate may do
        costs = [_alone(f, x, space, rate) for rate in RATES]
    return min((Trial(space, rate, cost) for rate, cost in zip(RATES, costs, strict=True)), key=lambda trial: trial.cost)


def _alone(f: Objective, x: Tensor, space: Space, rate: float) -> float:
    try:
        return _costs(f, x, space, [rate])[0]
    except Exception:
        return math.inf


def _costs(f: Objective, x: Tensor, space: Space, rates: Sequence[float]) -> list[float]:
    """The mean cost that steps of each size end at, all of them side by side."""
    each = Each(x.new_tensor(rates).repeat_interleave(len(x)))
    update = BestSoFar(Projected(Gradient(each, clip=CLIP), space.domain), space.domain)
    z = space.begin(x.new_zeros(len(x), space.whole.inputs), x).expand(len(rates), -1, -1)
    ys = next(itertools.islice(iterates(f.oracle(x), z, update, space), STEPS - 1, None))
    return [_mean(f(y, x)) for y in ys]


class Each(nn.Module):
    """A step size for each item.

    Args:
        rates: (B,).
    """

    def __init__(self, rates: Tensor) -> None:
        super().__init__()
        self.rates = rates

    def forward(self, y: Tensor, k: Tensor) -> Tensor:
        """As `Fixed`."""
        return self.rates[:, None].expand(-1, 1)


def _mean(costs: Tensor) -> float:
    return costs.nan_to_num(torch.inf).mean().item()


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
        y = domain.at(x).project(x.new_zeros(len(x), domain.inputs))
        return torch.equal(f(y, x), f(y, x))
