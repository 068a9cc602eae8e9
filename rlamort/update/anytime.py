"""Refinement of an action in a critic, while it is worth it and while there is time. `agent.predict(observation, refine=5)`.

x context (B, d) · y action (B, n) in Y · f = -Q, pessimistic · E members of an ensemble · times are in microseconds
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlamort.domain import Domain
from rlamort.errors import UserError
from rlamort.host.randomness import seeded
from rlamort.objective import MaxQ
from rlamort.update.base import Projected, Update
from rlamort.update.best import BestSoFar
from rlamort.update.line import LineSearch

ATTEMPTS = 5  # at the unrefined action, before a budget is said to be below it


@dataclass(frozen=True)
class Always:
    """A step is always worth it."""

    def cost(self, f: MaxQ, domain: Domain, x: Tensor, y: Tensor) -> Tensor:
        """What a step costs, in units of Q, for actions y (B, n) that are not refined yet -> (B,)."""
        return y.new_zeros(len(y))

    def gain(self, f: MaxQ, x: Tensor, y: Tensor, better: Tensor) -> Tensor:
        """What a step from y (B, n) to `better` (B, n) is predicted to gain -> (B,)."""
        return y.new_zeros(len(y))


@dataclass(frozen=True)
class Worth(Always):
    """A step is worth it if the gain that it predicts is above its cost, both in units of Q.

    The predicted gain is that by the most doubtful critic: the smallest difference of Q over all members of the ensemble, also
    over those that the actor's objective does not ask. The cost is the larger of two, neither of which reads a clock, so that
    results are reproducible: `tolerance` of the difference of f between the unrefined action and the middle of Y, the zero
    action; and the standard deviation over members of Q of the unrefined action. The first vanishes where a policy rests, and
    there steps would follow errors of the critics, which differ by about as much as they err.

    Args:
        tolerance: the first cost of a step, relative to that difference.
    """

    tolerance: float = 0.01

    def cost(self, f: MaxQ, domain: Domain, x: Tensor, y: Tensor) -> Tensor:
        middle = domain.at(x).project(y.new_zeros(len(y), domain.inputs))
        doubt: Tensor = f.critic(x, y).std(0, correction=0)
        return torch.maximum(self.tolerance * (f(y, x) - f(middle, x)).abs(), doubt)

    def gain(self, f: MaxQ, x: Tensor, y: Tensor, better: Tensor) -> Tensor:
        gains: Tensor = f.critic(x, better) - f.critic(x, y)  # (E, B)
        return gains.amin(0)


@dataclass(frozen=True)
class Anytime:
    """Steps of a solver from an action, by which f never increases.

    An item stops for good at the first step that raises f or is not worth it, and stays where it was before that step; so no
    item depends on another. At least one of `steps` and `budget_us` is needed. What an update draws is the same at every
    call.

    Args:
        steps: most steps; None takes as many as there is time for.
        budget_us: microseconds for the whole action, the unrefined one included. No step begins that would end after it if it
            took as long as the longest before; the first begins if any time is left, so the budget is exceeded by at most
            one step. None is no limit.
        worth: when a step is worth it: `Always()`, or `Worth(tolerance)`.
        update: from Y to the solver's step, whose iterates lie in Y. One that may raise f on its way, such as `Cem`, goes on
            only inside a `BestSoFar`, which keeps the best: `best` makes it so.
        clock: seconds.

    Raises:
        UserError: a value that is not allowed.
    """

    steps: int | None = None
    budget_us: float | None = None
    worth: Always = Always()
    update: Callable[[Domain], Update] = LineSearch
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        if self.steps is not None and (isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0):
            raise UserError(f"refine={self.steps}: a whole number of steps, 0 or more, auto, or an Anytime is needed")
        if self.budget_us is not None and not self.budget_us > 0:
            raise UserError(f"budget_us={self.budget_us}: microseconds, above 0, are needed")
        if self.steps is None and self.budget_us is None:
            raise UserError("refine: without a number of steps budget_us is needed, or nothing would ever end it")

    def began(self) -> float:
        """The clock, where there is a budget to compare it with."""
        return 0.0 if self.budget_us is None else self.clock()

    def require_time(self, began: float, unrefined: Callable[[], object]) -> None:
        """Say so if the budget is below the time of the unrefined action, also at its fastest.

        Args:
            began: when the action was begun.
            unrefined: computes the action once more; it is only called where the time is over already.

        Raises:
            UserError: it is.
        """
        if self.budget_us is None or self._spent(began) <= self.budget_us:
            return
        times = []
        for _ in range(ATTEMPTS):
            began = self.clock()
            unrefined()
            times.append(self._spent(began))
        if min(times) > self.budget_us:
            raise UserError(
                f"budget_us={self.budget_us:g}: the unrefined action alone takes {min(times):.0f} microseconds here, "
                f"the fastest of {ATTEMPTS}; that much and the time of some steps is needed"
            )

    @torch.no_grad()
    def __call__(self, f: MaxQ, domain: Domain, x: Tensor, y: Tensor, began: float = 0.0) -> Tensor:
        """Refine y (B, n) for contexts x (B, d) of f; `began` is when the budget began to run."""
        if self._left(began) <= 0:
            return y
        oracle, update = f.oracle(x), self.update(domain)
        with seeded(0, x.device):
            h, cost = update.start(y, x, oracle), self.worth.cost(f, domain, x, y)
            lowest, going = update.value(y, h, oracle), torch.ones_like(cost, dtype=torch.bool)
            taken, longest = 0, 0.0
            while (self.steps is None or taken < self.steps) and self._left(began) > longest:
                start = self.began()
                better, h = update(y, h, x, oracle)
                value = update.value(better, h, oracle)
                going = going & (value <= lowest) & (self.worth.gain(f, x, y, better) >= cost)
                y, lowest = better.where(going[:, None], y), value
                taken, longest = taken + 1, max(longest, self._since(start, x))
                if not going.any():
                    break
        return y

    def _left(self, began: float) -> float:
        return torch.inf if self.budget_us is None else self.budget_us - self._spent(began)

    def _since(self, start: float, x: Tensor) -> float:
        """Microseconds of a step, with what it started on the device; 0 where there is no budget."""
        if self.budget_us is None:
            return 0.0
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return self._spent(start)

    def _spent(self, began: float) -> float:
        return 1e6 * (self.clock() - began)


def best(update: Callable[[Domain], Update]) -> Callable[[Domain], Update]:
    """The same solver's step, projected onto Y, of which the best iterate so far is kept: for `Anytime.update`."""
    return lambda domain: BestSoFar(Projected(update(domain), domain), domain)


Refine = int | Literal["auto"] | Anytime | None
AUTO = Anytime(20, worth=Worth())


def anytime(refine: Refine, budget_us: float | None) -> Anytime | None:
    """What `predict` was asked for; None where nothing is to be refined.

    Args:
        refine: number of steps; auto for `AUTO`; an `Anytime`; None for none, or with a budget as many as there is time for.
        budget_us: microseconds; None for no limit, or for the one of the `Anytime`.

    Raises:
        UserError: a value that is not allowed.
    """
    chosen = AUTO if refine == "auto" else refine
    if chosen is None and budget_us is None:
        return None
    if not isinstance(chosen, Anytime):
        chosen = Anytime(chosen, budget_us)
    elif budget_us is not None:
        chosen = replace(chosen, budget_us=budget_us)
    return None if chosen.steps == 0 else chosen
