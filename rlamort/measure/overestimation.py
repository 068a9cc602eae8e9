"""How much critics overestimate: what they promise of actions, less the return that follows in play.

x state (N, d) · y action (N, n) · Q soft value, as the critics' targets define it · N episodes side by side
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from rlamort.agents.sac import SAC
from rlamort.host.randomness import Randomness
from rlamort.measure.study import Results, Study, Task
from rlamort.measure.verdict import Verdict
from rlamort.run.restore import load
from rlamort.score import interval

EPISODES, SEED = 5, 4_000_000  # of the play, on seeds that no training, evaluation or gap has
REMAINDER = 0.01  # of a value: a state counts if at most so much of what follows it is cut off by a time limit


class Overestimation(NamedTuple):
    """Train `row` and `baseline` with the same pessimism, and compare their returns; what their critics promise is reported.

    Both are soft actor-critics. The promise is that of the actor's objective, with its pessimism.
    """

    row: str
    env: str
    steps: int
    seeds: list[int]
    baseline: str
    pessimism: float
    overrides: list[str]

    @property
    def study(self) -> Study:
        """Its trainings."""
        alike = [f"pessimism={self.pessimism:g}", *self.overrides]
        return Study(self.row, self.env, self.steps, self.seeds, None, self.baseline, alike, promised)

    def claim(self) -> str:
        """The claim in one line."""
        return f"{self.study.claim()}, with pessimism {self.pessimism:g} in both; their overestimation is reported"

    def due(self, results: Results) -> list[Task]:
        """Runs without a stored result."""
        return self.study.due(results)

    def waiting(self, results: Results) -> str:
        """A line about missing measurements, or ""."""
        return self.study.waiting(results)

    def judge(self, results: Results) -> list[Verdict]:
        """As a study's."""
        return self.study.judge(results)

    def report(self, results: Results) -> list[str]:
        """A table of what critics promise and of what follows, over the seeds that there are."""
        study, lines = self.study, []
        for row in study.contenders():
            runs = [results[study.key(row, seed)] for seed in study.seeds_of(row, results)]
            if runs:
                cells = [_shown([run[name] for run in runs]) for name in ("promised", "played", "overestimation")]
                lines.append(f"| `{row}` | {len(runs)} | {' | '.join(cells)} |")
        head = ["| row | seeds | Q | soft return that follows | Q less that |", "|---|---|---|---|---|"]
        return (
            [f"{self.env}, {self.steps:,} steps: what the critics promise of exploring play.", "", *head, *lines]
            if lines
            else []
        )

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        """As a study's."""
        return self.study.panel(results)


def promised(directory: Path) -> dict[str, Any]:
    """Means over the play of a finished run: `promised`, Q; `played`, the soft return; and the difference, `overestimation`."""
    learner = load(directory)
    assert isinstance(learner.agent, SAC)
    env = learner.environments.another(EPISODES)
    with learner.training(), Randomness(SEED, learner.device)(), torch.no_grad():
        q, value = play(learner.agent, env, float(learner.config.values["discount"]))
    env.close()
    learner.close()
    return {"promised": float(q.mean()), "played": float(value.mean()), "overestimation": float((q - value).mean())}


def play(agent: SAC, env: Any, discount: float) -> tuple[np.ndarray, np.ndarray]:
    """Q and the discounted soft return that follows, of one exploring episode in each environment.

    The return after t is r_t + gamma (r_{t+1} - alpha log q_{t+1} + ...). States near a time limit, or a failure of the
    environment, do not count.
    """
    alpha, f = float(agent.alpha()), agent.action_cost()
    x, running = env.reset(SEED), np.ones(env.count, dtype=bool)
    steps: list[tuple[np.ndarray, ...]] = []
    while running.any():
        seen = agent.normaliser(x)
        y, logq = agent.density.sample(agent.model(seen, agent.f.oracle(seen)))
        step = env.step(y)
        # a failure cuts an episode off, as a time limit does: what the step would have paid is not known
        terminated = step.terminated & step.valid & running
        steps.append((_host(-f(y, seen)), _host(step.reward), -alpha * _host(logq), running, terminated))
        running, x = running & ~step.over, env.x
    q, reward, bonus, played, terminated = map(np.stack, zip(*steps, strict=True))  # (T, N)
    follows, value = np.zeros(env.count), np.empty_like(q)
    for t in reversed(range(len(q))):
        value[t] = reward[t] + discount * follows
        follows = np.where(played[t], value[t] + bonus[t], 0.0)
    left = played[::-1].cumsum(0)[::-1]  # steps to the end of an episode, this one included
    counts = played & (terminated.any(0) | (discount**left <= REMAINDER))
    return q[counts], value[counts]


def _host(values: Tensor) -> np.ndarray:
    host: np.ndarray = values.double().numpy(force=True)
    return host


def _shown(values: list[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" if len(values) > 1 else f"{mean:.1f}"
