"""What learned dynamics predict, beside what happened, with how far their futures spread.

T steps of an episode · H of a prediction · S futures, such as members of an ensemble · d = x_dim
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from rlamort.agent import Player
from rlamort.config import config_of
from rlamort.dynamics import Dynamics, Moved
from rlamort.errors import UserError
from rlamort.host.publish import published_file
from rlamort.host.randomness import Randomness
from rlamort.run.learner import Learner
from rlamort.run.restore import load
from rlamort.score import SEED

AHEAD, FANS, SHOWN = 20, 3, 4  # steps of a prediction, predictions one after another, and coordinates


class Fan(NamedTuple):
    """A prediction of H steps that begins at step `start` of an episode: by futures, or by a mean and a variance."""

    start: int
    mean: np.ndarray  # (H + 1, d), the first of which is the state that it begins at
    low: np.ndarray  # (H + 1, d), of a band around it
    high: np.ndarray

    @classmethod
    def of(cls, start: int, x: Tensor, path: Sequence[Moved]) -> Self:
        """The mean of futures from x (d,), and their 5 % and 95 % quantiles; `path` is what `Dynamics.follow` returns."""
        states = [x.expand(_futures(path[0]), 1, -1), *(moved.x_next.reshape(-1, 1, len(x)) for moved in path)]
        found = torch.cat(states, 1).numpy(force=True)  # (S, H + 1, d)
        low, high = np.quantile(found, (0.05, 0.95), axis=0)
        return cls(start, found.mean(0), low, high)


def _futures(moved: Moved) -> int:
    return moved.x_next.shape[:-1].numel()


def beside(run: Path, out: Path) -> str:
    """Draw `predictions` beside a run's curve, and say where they are, or why there are none; "" where nothing predicts."""
    try:
        found = predictions(run, out) if has_learned(run) else None
    except UserError as error:  # as of an environment that cannot be made here, which curves do not need
        return f"no predictions: {error}"
    return "" if found is None else str(found)


def has_learned(run: Path) -> bool:
    """Whether a run's method learns dynamics, as far as its settings say."""
    return any(key == "dynamics" for key in _keys(config_of(run)))


def _keys(tree: Mapping[str, Any]) -> Iterator[str]:
    for key, value in tree.items():
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value)


def predictions(run: Path, out: Path) -> Path | None:
    """Draw the beginning of an episode that a run's agent plays, and what its learned dynamics predict from steps of it on.

    Args:
        run: a run directory.
        out: the image.

    Returns:
        The image; None if its dynamics are not learned, or the episode is too short to predict any of it.
    """
    learner = load(run)
    models = (part for part in learner.agent.modules() if isinstance(part, Dynamics) and part.learned)
    dynamics = next(models, None)
    states, actions = (None, None) if dynamics is None else played(learner, AHEAD * FANS)
    learner.close()
    if dynamics is None or actions is None or states is None or len(actions) < 2:
        return None
    figure = drawn(states.numpy(force=True), fans(dynamics, states, actions))
    figure.suptitle(f"{learner.config.method} on {learner.config.run.env}, {learner.clock.env_step:,} steps")
    with published_file(out) as fresh:
        figure.savefig(fresh, dpi=110)
    return out


@torch.no_grad()
def played(learner: Learner, steps: int) -> tuple[Tensor, Tensor]:
    """States (T + 1, d) and actions (T, n) from the beginning of an evaluation episode, T <= `steps`, as its agent plays."""
    env = learner.environments.another(1)
    states, actions = [env.reset(SEED).to(learner.device)], [torch.empty(0, env.domain.dim, device=learner.device)]
    with Randomness(SEED, learner.device)():
        player = Player(learner.agent, 1)
        for _ in range(steps):
            y = player(states[-1], explore=False)
            step = env.step(y.to(env.place))
            if not step.valid.all():  # a failure, which has no successor
                break
            actions.append(y)
            states.append(step.x_next.to(learner.device))
            if step.over.any():
                break
    env.close()
    return torch.cat(states), torch.cat(actions)


@torch.no_grad()
def fans(dynamics: Dynamics, states: Tensor, actions: Tensor) -> list[Fan]:
    """Predictions of `AHEAD` steps each, one after another, along states (T + 1, d) and actions (T, n)."""
    found = []
    for start in range(0, len(actions), AHEAD):
        path = dynamics.follow(states[start : start + 1], list(actions[start : start + AHEAD, None]))
        found.append(Fan.of(start, states[start], path))
    return found


def drawn(states: np.ndarray, predicted: Sequence[Fan]) -> Figure:
    """States (T + 1, d) that were met, and predictions: of the coordinates whose predictions err most for their spread."""
    errors = np.concatenate([fan.mean - states[fan.start : fan.start + len(fan.mean)] for fan in predicted])
    spread = states.std(0)
    order = np.argsort(-np.abs(errors).mean(0) / np.where(spread > 1e-6, spread, 1))
    figure = Figure(figsize=(9, 2 * min(SHOWN, len(order)) + 0.6), layout="constrained")
    places = figure.subplots(min(SHOWN, len(order)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, i in zip(places, sorted(order[:SHOWN]), strict=True):
        _coordinate(axes, states[:, i], predicted, i)
    places[0].legend(fontsize="small", loc="upper left", ncols=3)
    places[-1].set(xlabel="step of the episode")
    return figure


def _coordinate(axes: Axes, met: np.ndarray, predicted: Sequence[Fan], i: int) -> None:
    axes.plot(met, "k", label="met")
    for number, fan in enumerate(predicted):
        at = np.arange(fan.start, fan.start + len(fan.mean))
        names = ("predicted from the dot on", "5 to 95 % of futures") if number == 0 else (None, None)
        axes.plot(at, fan.mean[:, i], color="C0", label=names[0])
        axes.fill_between(at, fan.low[:, i], fan.high[:, i], color="C0", alpha=0.25, linewidth=0, label=names[1])
        axes.plot(at[:1], fan.mean[:1, i], "o", color="C0", markersize=4)
    low, high = met.min(), met.max()
    margin = 0.5 * (high - low) + 1e-3
    axes.set(ylabel=f"x[{i}]", ylim=(low - margin, high + margin))  # what diverges leaves the picture, not its scale
    axes.grid(alpha=0.3)
