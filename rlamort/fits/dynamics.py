"""Fits of dynamics that are `Trained`. E members · B batch · C sequences of L transitions · d = x_dim"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlamort.agent import Adam, descend
from rlamort.dynamics import LARGE, Conditioned, Dynamics, Trained, lacking
from rlamort.dynamics.trajectory import diverged
from rlamort.errors import UserError
from rlamort.nets import spread
from rlamort.objective import Metrics
from rlamort.source import Batch, Replay

MEASURED = 256  # sequences on which learned dynamics are measured


def trained(dynamics: Dynamics, fit_every: int, key: str = "") -> Trained | None:
    """The dynamics as what is fitted of them; None of known ones.

    Raises:
        UserError: learned dynamics are never fitted, or known ones are, or they do not say how they learn; `key` is what
            stands before the fields.
    """
    kind, missing = type(dynamics).__name__, lacking(dynamics, Trained)
    if dynamics.learned and missing:
        other = "" if lacking(dynamics, Conditioned) else "; pilco fits it"
        raise UserError(
            f"{key}dynamics={kind}: it does not say how it learns from batches of transitions, since it has no "
            f"{' and no '.join(missing)} (rlamort.dynamics.Trained); {key}dynamics=ensemble has all{other}"
        )
    if dynamics.learned != bool(fit_every):
        needed = "1 or more" if fit_every == 0 else "0"
        raise UserError(f"{key}fit_every={fit_every}: with {key}dynamics={kind} {needed} is needed")
    return cast(Trained, dynamics) if dynamics.learned else None


def fit(dynamics: Trained, adam: Adam, batch: Batch, epochs: int, batch_size: int) -> Metrics:
    """Train each member on a bootstrap of its own, drawn from `batch` with replacement (Chua et al., 2018, section 4).

    Args:
        dynamics: what learns.
        adam: of its parameters.
        batch: one-step transitions, for which the dynamics are prepared as well.
        epochs: passes over each member's bootstrap.
        batch_size: of each step.

    Returns:
        The loss of a member in the last pass.

    Raises:
        UserError: there are too few transitions.
    """

    def drawn(count: int) -> Iterator[Tensor]:
        resamples = torch.randint(count, (dynamics.members, count), device=batch.x.device)
        for _ in range(epochs):
            order = torch.rand_like(resamples, dtype=batch.x.dtype).argsort(-1)
            yield from torch.split(resamples.gather(-1, order), batch_size, -1)

    losses = _stepped(dynamics, adam, batch, drawn)
    return {"dynamics/loss": losses[-(len(losses) // epochs) :].mean()}


def fit_steps(dynamics: Trained, adam: Adam, batch: Batch, steps: int, batch_size: int) -> Metrics:
    """Train each member for a number of steps, so that a fit does not take longer the more there are to learn from.

    Args:
        dynamics: what learns.
        adam: of its parameters.
        batch: one-step transitions, for which the dynamics are prepared as well.
        steps: gradient steps.
        batch_size: transitions in a step, drawn uniformly for every member.

    Returns:
        The mean loss of a member.

    Raises:
        UserError: there are too few transitions.
    """

    def drawn(count: int) -> Iterator[Tensor]:
        for _ in range(steps):
            yield torch.randint(count, (dynamics.members, batch_size), device=batch.x.device)

    return {"dynamics/loss": _stepped(dynamics, adam, batch, drawn).mean()}


def _stepped(dynamics: Trained, adam: Adam, batch: Batch, drawn: Callable[[int], Iterator[Tensor]]) -> Tensor:
    """The losses of a member (steps,), where `drawn` gives the transitions (E, .) of each step, of so many."""
    if len(batch.x) < dynamics.least:
        raise UserError(
            f"warmup_steps, fit_every: a fit of the dynamics finds {len(batch.x)} transitions; at least {dynamics.least} are "
            "needed"
        )
    items = dynamics.prepare(batch)  # (B, .)
    losses: list[Tensor] = []
    for index in drawn(len(items)):
        loss = dynamics.loss(items[index])  # of (E, ., .)
        descend(loss, dynamics.parameters(), adam)
        losses.append(loss.detach() / dynamics.members)
    return torch.stack(losses)


class Fits(nn.Module):
    """The fits of dynamics, if they are learned; of known ones nothing is fitted.

    Args:
        dynamics: what learns.
        every: environment steps between fits; 0 for known dynamics.
        steps: gradient steps in a fit.
        batch_size: transitions in a step, drawn for every member.
        learning_rate: Adam's step size.
        key: what stands before the fields, for messages.

    Attributes:
        least: transitions that a fit needs at least; 0 of known dynamics.

    Raises:
        UserError: as of `trained`, or they have no gradients.
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
        learner = trained(dynamics, every, key)
        self.least = 0 if learner is None else learner.least
        self._of = (dynamics, learner)  # in a tuple, so that its tensors are not registered here, too
        self.every, self.steps, self.batch_size = every, steps, batch_size
        self.adam = Adam(dynamics.parameters(), learning_rate)

    def __call__(self, source: Replay, length: int = 1) -> Metrics:
        """Fit to all transitions, after measuring the error `length` steps ahead on those that are new."""
        dynamics, learner = self._of
        if learner is None:
            return {}
        found = measured(dynamics, source, length, self.every // source.rows)
        return found | fit_steps(learner, self.adam, source.everything(n_step=1), self.steps, self.batch_size)


class Refits:
    """As `Fits`, by passes over all transitions; values alone may be asked of the dynamics. Whole episodes may be held out.

    Args:
        dynamics: what learns.
        adam: of its parameters.
        every: environment steps between fits; 0 for known dynamics.
        epochs: passes in a fit.
        batch_size: transitions in a step, drawn for every member.
        hold_out: every so-many-th episode of each environment is held out from all fits, to measure them on; 0 holds out none.

    Attributes:
        least: transitions that a fit needs at least; 0 of known dynamics.

    Raises:
        UserError: as of `trained`, or every episode would be held out.
    """

    def __init__(self, dynamics: Dynamics, adam: Adam, every: int, epochs: int, batch_size: int, hold_out: int) -> None:
        self.learner = trained(dynamics, every)
        if hold_out == 1:
            raise UserError("fit_hold_out=1: every episode would be held out, and nothing learned; 0, or 2 or more, is needed")
        self.least = 0 if self.learner is None else self.learner.least
        self.dynamics, self.adam, self.warned = dynamics, adam, False
        self.every, self.epochs, self.batch_size, self.hold_out = every, epochs, batch_size, hold_out

    def __call__(self, source: Replay, length: int) -> Metrics:
        """Fit to all transitions; measure errors `length` steps ahead before, and on what is held out before and after.

        Raises:
            UserError: there are too few transitions.
        """
        dynamics, learner = self.dynamics, self.learner
        if learner is None:
            return {}
        found, batch = measured(dynamics, source, length, self.every // source.rows), source.everything(n_step=1)
        episode = source.episodes()
        held = held_out(episode, source.rows, self.hold_out)
        aside, learned = windows(batch, torch.where(held, episode, -1), length), _picked(batch, ~held)
        if len(learned.x) < learner.least <= len(batch.x) and self.adam.steps:
            warnings.warn(
                "buffer_size, fit_hold_out: what is stored is of episodes that are held out, and nothing was learned in a fit; "
                "a larger buffer_size, or fit_hold_out=0, helps",
                stacklevel=2,
            )
            return found
        found |= _named(open_loop(dynamics, aside), "before_fit") if len(aside.x) else {}
        found |= fit(learner, self.adam, learned, self.epochs, self.batch_size)
        found |= _named(open_loop(dynamics, aside), "after_fit") if len(aside.x) else {}
        return found | {"dynamics/diverged": adrift(dynamics, batch.x_next[-MEASURED:], batch.y.shape[-1], length)}

    def notice(self, recorded: Mapping[str, Any]) -> None:
        """Warn, once, where plans through the fitted dynamics diverge."""
        share = recorded.get("dynamics/diverged", 0)
        if share and not self.warned:
            self.warned = True
            warnings.warn(
                f"dynamics: {share:.2%} of random plans from states that were met diverge in the learned model, to values that "
                "are not finite or beyond a million; such plans rank last, and dynamics/diverged goes on counting. A shorter "
                "horizon or more data help",
                stacklevel=2,
            )


def held_out(episode: Tensor, rows: int, every: int) -> Tensor:
    """Which of these episodes (B,), numbered as by `Replay.episodes`, are held out (B,): a question of their number alone.

    Every so-many-th of each row is, at offsets that are spread over the rows: every so-many-th of all. 0 holds out none.
    """
    if not every:
        return torch.zeros_like(episode, dtype=torch.bool)
    return (episode // rows + episode % rows * every // rows) % every == every - 1


def windows(batch: Batch, episode: Tensor, length: int) -> Batch:
    """Up to `MEASURED` sequences of consecutive transitions of one episode, spread evenly: of leading axes (C, L).

    Args:
        batch: transitions in order (B,).
        episode: the number of each one's (B,); negative where they are left out.
        length: L.
    """
    last = episode[length - 1 :]
    begins = ((episode[: len(last)] == last) & (last >= 0)).nonzero()[:, 0]
    begins = begins[:: max(1, len(begins) // MEASURED)][:MEASURED]
    return _picked(batch, begins[:, None] + torch.arange(length, device=begins.device))


def _picked(batch: Batch, index: Tensor) -> Batch:
    return Batch(*(part[index] for part in batch))


def _named(metrics: Metrics, when: str) -> Metrics:
    return {f"{name.replace('dynamics/', 'held_out/')}_{when}": value for name, value in metrics.items()}


@torch.no_grad()
def adrift(dynamics: Dynamics, x: Tensor, n: int, horizon: int) -> Tensor:
    """The share of plans (), of H uniformly random actions each from x (B, d), in which a future diverges."""
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        path = dynamics.follow(x, list(2 * torch.rand(horizon, len(x), n, dtype=x.dtype, device=x.device) - 1))
    return diverged(path).view(-1, len(x)).any(0).to(x).mean()


def measured(dynamics: Dynamics, source: Replay, length: int, latest: int) -> Metrics:
    """`open_loop` over `length` steps of the latest transitions of each environment, before a fit learns of them.

    A measurement, so the draws of training are the same without it; empty where no episode has so many.
    """
    if source.longest(latest) < length:
        return {}
    with torch.random.fork_rng(devices=[source.device] if source.device.type == "cuda" else []):
        return open_loop(dynamics, source.sequences(MEASURED, length, latest=latest))


@torch.no_grad()
def open_loop(dynamics: Dynamics, sequences: Batch) -> Metrics:
    """The error of the state that futures predict L actions ahead, without looking at what was met on the way.

    Args:
        dynamics: what predicts.
        sequences: of leading axes (C, L), as from `Replay.sequences`.

    Returns:
        The root mean square over futures, sequences and coordinates, these in units of their standard deviation at that step:
        the mean state would have an error of 1. Where a future has diverged, its error counts as `LARGE`.
    """
    last = sequences.x_next[:, -1]  # (C, d)
    met = dynamics.follow(sequences.x[:, 0], sequences.y.unbind(1))[-1].x_next  # (E, C, d), or (C, d) without members
    error = (met - last) / spread(last)
    return {"dynamics/open_loop_error": error.nan_to_num(LARGE, LARGE, -LARGE).clamp(-LARGE, LARGE).square().mean().sqrt()}
