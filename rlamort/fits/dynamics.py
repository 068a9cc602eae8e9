"""Fits of learned dynamics. E members · B batch · C sequences of L transitions · d = x_dim"""

import torch
from torch import Tensor, nn

from rlamort.agent import Adam, descend
from rlamort.dynamics import Dynamics, Ensemble, GaussianProcess
from rlamort.errors import UserError
from rlamort.objective import Metrics
from rlamort.source import Batch, Replay

MEASURED = 256  # sequences on which learned dynamics are measured


def require_fits(dynamics: Dynamics, fit_every: int, key: str = "") -> None:
    """Raises UserError if learned dynamics are never fitted, or known ones are; `key` is what stands before the fields."""
    if isinstance(dynamics, GaussianProcess):
        raise UserError(f"{key}dynamics=gp: only pilco fits Gaussian processes; {key}dynamics=ensemble is needed")
    if dynamics.learned != bool(fit_every):
        kind, needed = type(dynamics).__name__, "1 or more" if fit_every == 0 else "0"
        raise UserError(f"{key}fit_every={fit_every}: with {key}dynamics={kind} {needed} is needed")


def fit(ensemble: Ensemble, adam: Adam, batch: Batch, epochs: int, batch_size: int) -> Metrics:
    """Train each member on a bootstrap of its own, drawn from `batch` with replacement (Chua et al., 2018, section 4).

    Args:
        ensemble: what learns.
        adam: of its parameters.
        batch: one-step transitions, on which inputs and targets are standardised as well.
        epochs: passes over each member's bootstrap.
        batch_size: of each step.

    Returns:
        The loss of a member in the last pass.
    """
    pairs = ensemble.pairs(batch)  # (B, .)
    ensemble.standardise(pairs)
    resamples = torch.randint(len(pairs), (ensemble.members, len(pairs)), device=pairs.device)
    losses: list[Tensor] = []
    for _ in range(epochs):
        order = torch.rand_like(resamples, dtype=pairs.dtype).argsort(-1)
        losses = []
        for index in torch.split(resamples.gather(-1, order), batch_size, -1):
            loss = ensemble.loss(pairs[index])  # of (E, batch, .)
            descend(loss, ensemble.parameters(), adam)
            losses.append(loss.detach() / ensemble.members)
    return {"dynamics/loss": torch.stack(losses).mean()}


def fit_steps(ensemble: Ensemble, adam: Adam, batch: Batch, steps: int, batch_size: int) -> Metrics:
    """Train each member for a number of steps, so that a fit does not take longer the more there are to learn from.

    Args:
        ensemble: what learns.
        adam: of its parameters.
        batch: one-step transitions, on which inputs and targets are standardised as well.
        steps: gradient steps.
        batch_size: transitions in a step, drawn uniformly for every member.

    Returns:
        The mean loss of a member.
    """
    pairs = ensemble.pairs(batch)
    ensemble.standardise(pairs)
    losses: list[Tensor] = []
    for _ in range(steps):
        index = torch.randint(len(pairs), (ensemble.members, batch_size), device=pairs.device)
        loss = ensemble.loss(pairs[index])
        descend(loss, ensemble.parameters(), adam)
        losses.append(loss.detach() / ensemble.members)
    return {"dynamics/loss": torch.stack(losses).mean()}


class Fits(nn.Module):
    """The fits of dynamics, if they are learned; of known ones nothing is fitted.

    Args:
        dynamics: what learns.
        every: environment steps between fits; 0 for known dynamics.
        steps: gradient steps in a fit.
        batch_size: transitions in a step, drawn for every member.
        learning_rate: Adam's step size.
        key: what stands before the fields, for messages.

    Raises:
        UserError: learned dynamics are never fitted, or known ones are, or they have no gradients.
    """

    def __init__(
        self, dynamics: Dynamics, every: int, steps: int, batch_size: int, learning_rate: float, key: str = ""
    ) -> None:
        super().__init__()
        if not dynamics.differentiable:
            raise UserError(
                f"{key}dynamics={type(dynamics).__name__}: it has no gradients with respect to actions; {key}dynamics=own, "
                f"where the environment's equations are known, or ensemble, which is learned, is needed"
            )
        require_fits(dynamics, every, key)
        self._of = (dynamics,)  # in a tuple, so that its tensors are not registered here, too
        self.every, self.steps, self.batch_size = every, steps, batch_size
        self.adam = Adam(dynamics.parameters(), learning_rate)

    def __call__(self, source: Replay, length: int = 1) -> Metrics:
        """Fit to all transitions, after measuring the error `length` steps ahead on those that are new."""
        (dynamics,) = self._of
        if not isinstance(dynamics, Ensemble):
            return {}
        found = measured(dynamics, source, length, self.every // source.rows)
        return found | fit_steps(dynamics, self.adam, source.everything(n_step=1), self.steps, self.batch_size)


def measured(ensemble: Ensemble, source: Replay, length: int, latest: int) -> Metrics:
    """`open_loop` over `length` steps of the latest transitions of each environment, before a fit learns of them.

    A measurement, so the draws of training are the same without it; empty where no episode has so many.
    """
    if source.longest(latest) < length:
        return {}
    with torch.random.fork_rng(devices=[source.device] if source.device.type == "cuda" else []):
        return open_loop(ensemble, source.sequences(MEASURED, length, latest=latest))


@torch.no_grad()
def open_loop(ensemble: Ensemble, sequences: Batch) -> Metrics:
    """The error of the state that members predict L actions ahead, without looking at what was met on the way.

    Args:
        ensemble: what predicts.
        sequences: of leading axes (C, L), as from `Replay.sequences`.

    Returns:
        The root mean square over members, sequences and coordinates, these in units of their standard deviation at that step:
        the mean state would have an error of 1.
    """
    last = sequences.x_next[:, -1]  # (C, d)
    met = ensemble.follow(sequences.x[:, 0], sequences.y.unbind(1))[-1].x_next  # (E, C, d)
    spread = last.std(0, correction=0)
    error = (met - last) / torch.where(spread > 1e-6, spread, 1)
    return {"dynamics/open_loop_error": error.square().mean().sqrt()}
