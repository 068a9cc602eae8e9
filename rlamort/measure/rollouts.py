"""Claims about tasks that are solved within few episodes, beside a baseline that needs many."""

import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from matplotlib.axes import Axes

from rlamort.config.imports import class_at
from rlamort.host.machine import versions
from rlamort.measure.slices import Slice
from rlamort.measure.study import Results, Task, sliced
from rlamort.measure.verdict import Verdict, at_least, at_most
from rlamort.run.learner import learner_class

HELD_OUT, STARTS = 10_000, 10  # seed of the first start that is not trained on; how many
SOLVED = 0.9  # share of these starts from which an episode must be solved


class Rollouts(NamedTuple):
    """Train `method` an episode at a time until the task is solved, at most `rollouts` times, and `baseline` to the same cost.

    An episode is solved where coordinate `angle`, a cosine, is at least `least` in each of the last `last` steps, and the task
    where `SOLVED` of the episodes from held-out starts are. The cost is what those pay. A seed that does not solve the task has
    the transitions of all its rollouts, and the cost after the last. The baseline's transitions are those of its first
    evaluation that costs no more than the method's policies did in the end, on average over seeds, or all.

    Each training is a result, but one of the method is not cut: a slice that ends before it has begins it anew.
    """

    row: str
    method: str
    env: str
    rollouts: int
    seeds: list[int]
    needed: int  # seeds
    angle: int
    least: float
    last: int
    length: int  # steps of an episode
    overrides: dict[str, Any]
    baseline: str
    steps: int  # of the baseline
    times: float  # as many transitions that it must need
    baseline_seeds: list[int]
    baseline_overrides: Sequence[str] = ()

    def claim(self) -> str:
        """The claim in one line."""
        return (
            f"{self.method} on {self.env}: solved within {self.rollouts} rollouts by {self.needed} of {len(self.seeds)} seeds, "
            f"and {self.baseline} needs {self.times:g} times its transitions to the same cost"
        )

    def key(self, seed: int) -> str:
        """Of the result of one seed."""
        return f"{self.method} {self.env} {json.dumps(self.overrides)} seed={seed}, up to {self.rollouts} rollouts"

    def tasks(self) -> list[Task]:
        """All its trainings."""
        trained = [Task(self.key(seed), functools.partial(self.solve, seed)) for seed in self.seeds]
        return trained + [sliced(self._command(seed)) for seed in self.baseline_seeds]

    def _command(self, seed: int) -> list[str]:
        return ["train", self.baseline, f"env={self.env}", f"steps={self.steps}", f"seed={seed}", *self.baseline_overrides]

    def due(self, results: Results) -> list[Task]:
        """Trainings without a stored result."""
        return [task for task in self.tasks() if task.key not in results]

    def waiting(self, results: Results) -> str:
        """A line about missing measurements, or ""."""
        left = len(self.due(results))
        return f"{self.env}, {self.method} beside {self.baseline}: {left} runs to go" if left else ""

    def solve(self, seed: int, slice: Slice) -> dict[str, Any] | None:
        """Rollouts until one seed has solved the task, with costs and shares of solved episodes after each; None if stopped."""
        started, failed = time.perf_counter(), 0
        found: list[dict[str, float]] = []
        fields = {"seed": seed, "device": "cpu", "threads": 1, "video": False, "buffer_size": 10_000, **self.overrides}
        learner = learner_class(self.method)(self.env, **fields)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                while len(found) < self.rollouts and not (found and found[-1]["solved"] >= SOLVED):
                    if slice.left < 0:
                        return None
                    learner.learn(self.length, reset_num_timesteps=False)
                    found.append(self.played(learner.agent.predict))
                    print(f"  seed {seed}, {len(found)} rollouts: {found[-1]}", flush=True)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                failed = 1
            finally:
                learner.close()
        failed += sum("Numerical" in type(one.message).__name__ for one in said)
        return {"versions": versions(), "seconds": time.perf_counter() - started, "failed": failed, "rollouts": found}

    def played(self, predict: Callable[..., tuple[np.ndarray, Any]]) -> dict[str, float]:
        """The share of solved episodes from held-out starts, and their mean cost."""
        env = class_at(self.env, "env", (gymnasium.Env,), "gymnasium.Env")()
        solved, costs = [], []
        for start in range(STARTS):
            x, _ = env.reset(seed=HELD_OUT + start)
            seen, cost = [], 0.0
            for _ in range(self.length):
                x, reward, *_ = env.step(predict(x, deterministic=True)[0])
                seen.append(x[self.angle])
                cost -= float(reward)
            solved.append(min(seen[-self.last :]) >= self.least)
            costs.append(cost)
        return {"solved": float(np.mean(solved)), "cost": float(np.mean(costs))}

    def judge(self, results: Results) -> list[Verdict]:
        """Verdicts from complete trainings."""
        runs = [results[self.key(seed)] for seed in self.seeds if self.key(seed) in results]
        if not runs:
            return []
        solved = [one["rollouts"] for one in runs if one["rollouts"] and one["rollouts"][-1]["solved"] >= SOLVED]
        missing = self.waiting(results)
        took = ", ".join(str(len(one["rollouts"])) + ("" if one["rollouts"] in solved else " without") for one in runs)
        verdicts = [
            at_least(f"{self.method} on {self.env}: seeds of {len(self.seeds)} solved within {self.rollouts} rollouts ({took})",
                     len(solved), self.needed),
            at_most(f"{self.method} on {self.env}: Cholesky factorisations that failed or needed more jitter",
                    sum(one["failed"] for one in runs), 0),
        ]  # fmt: skip
        keys = [" ".join(["rlamort", *self._command(seed)]) for seed in self.baseline_seeds]
        theirs = [results[key]["evaluations"] for key in keys if key in results]
        if theirs:
            cost = float(np.mean([one["rollouts"][-1]["cost"] if one["rollouts"] else math.inf for one in runs]))
            rollouts = [len(one["rollouts"]) if one["rollouts"] in solved else self.rollouts for one in runs]
            ours = float(np.mean(rollouts)) * self.length
            steps = [next((e["env_step"] for e in one if -e["eval/return"] <= cost), self.steps) for one in theirs]
            verdicts.append(at_least(
                f"{self.env}: transitions of {self.baseline} ({', '.join(map(str, steps))}) to a cost of {cost:.3g}, as a "
                f"multiple of {self.method}'s {ours:.0f}", float(np.mean(steps)) / ours, self.times, "x",
            ))  # fmt: skip
        return [Verdict(v.claim, v.measured, v.threshold, False, missing=missing) for v in verdicts] if missing else verdicts

    def report(self, results: Results) -> list[str]:
        """Further lines of Markdown: none."""
        return []

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        """A function that draws costs of held-out episodes over transitions."""
        runs = [results[self.key(seed)]["rollouts"] for seed in self.seeds if self.key(seed) in results]
        keys = [" ".join(["rlamort", *self._command(seed)]) for seed in self.baseline_seeds]
        theirs = [results[key]["evaluations"] for key in keys if key in results]

        def draw(axes: Axes) -> None:
            for number, run in enumerate(runs):
                steps, label = [self.length * (k + 1) for k in range(len(run))], "" if number else self.method
                axes.plot(steps, [one["cost"] for one in run], "o-", color="C0", markersize=3, label=label)
            for number, one in enumerate(theirs):
                steps = [e["env_step"] for e in one]
                axes.plot(steps, [-e["eval/return"] for e in one], color="C1", label="" if number else self.baseline)
            axes.set(title=self.env, xlabel="transitions", ylabel="cost of an episode", xscale="log")
            axes.grid(alpha=0.3)
            axes.legend()

        return draw if runs or theirs else None
