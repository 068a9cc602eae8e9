"""Imitation: how many labels of an expert a policy needs to be nearly as good, and how much faster it decides.

The share of an expert's return is 0 at the return of uniformly random actions and 1 at the expert's own.
"""

import functools
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from rlamort.agent import Agent
from rlamort.host.machine import versions
from rlamort.measure.slices import Slice
from rlamort.measure.study import Results, Task, training
from rlamort.measure.verdict import Verdict, at_least, at_most
from rlamort.run.learner import Learner, learner_class
from rlamort.run.restore import load
from rlamort.score import Interval, interval

VARIANTS = ("loss", "model")  # keys that tell policies of one row apart in the figure
REPEATS = 101  # decisions, whose median is reported


class Imitation(NamedTuple):
    """Train every row of `budgets` with each of its label budgets and each seed on an expert's labels.

    Claims are of `row`: that with its largest budget it has `share` of the expert's return, on average over seeds; with
    `fewer`, that it needs at most so many times the labels of `beside` for that; with `faster`, that it decides so many times
    faster. Whoever is good enough with its smallest budget may need fewer labels than that, so the second is incomplete where
    this would decide it.

    An expert `sac` is trained here, once, and kept in runs/experts; `planner` needs no training.
    """

    row: str
    imitation: str  # id of the environment
    expert: str  # sac or planner
    budgets: dict[str, list[int]]  # rising
    seeds: list[int]
    steps: int
    episodes: int  # in an evaluation
    share: float = 0.95
    expert_steps: int = 0
    expert_keys: Sequence[str] = ()  # of its training
    beside: str | None = None
    fewer: float | None = None
    faster: float | None = None
    fields: Mapping[str, Any] = {}
    of: Mapping[str, Mapping[str, Any]] = {}  # further fields, by row

    def claim(self) -> str:
        """The claim in one line."""
        parts = [f"at least {self.share:.0%} of the return of {self.expert}"]
        parts += [] if self.fewer is None else [f"with at most {self.fewer:g} times the labels of {self.beside}"]
        parts += [] if self.faster is None else [f"{self.faster:g} times faster decisions"]
        variant = "".join(f", {which}" for which in self.variant)
        return f"{self.imitation}{variant}, {len(self.seeds)} seeds: {', '.join(parts)}"

    @property
    def variant(self) -> list[str]:
        """The keys that tell its policies from those of the row."""
        return [f"{name}={self.fields[name]}" for name in VARIANTS if name in self.fields]

    @property
    def path(self) -> str:
        """The expert as a value of the key `expert`."""
        return self.expert if not self.expert_steps else f"runs/experts/{self.expert}-{self.imitation}-{self.expert_steps}"

    def expert_key(self) -> str:
        return f"{self.path} on {self.imitation}, {self.episodes} episodes"

    def values(self, row: str, budget: int, seed: int) -> dict[str, Any]:
        own = {"expert": self.path, "label_budget": budget, "steps": self.steps, "seed": seed}
        return {"env": self.imitation, **own, **self.fields, **self.of.get(row, {})}

    def key(self, row: str, budget: int, seed: int) -> str:
        """The command of one run, and how it is evaluated."""
        words = " ".join(f"{name}={_typed(value)}" for name, value in self.values(row, budget, seed).items())
        return f"rlamort train {row} {words} eval_episodes={self.episodes}"

    def due(self, results: Results) -> list[Task]:
        """Tasks without a stored result, the expert first; all of them after a policy that is trained anew."""
        tasks = [Task(self.expert_key(), lambda _: self._expert())]
        for seed in self.seeds:
            for row, budgets in self.budgets.items():
                for budget in budgets:
                    tasks.append(Task(self.key(row, budget, seed), functools.partial(self._run, row, budget, seed)))
        known = results.get(self.expert_key(), {}).get("policy")
        left = [task for task in tasks if task.key not in results or results[task.key].get("policy") != known]
        anew = bool(self.expert_steps) and (known is None or known != self._policy())  # an expert that is not there, or another
        return tasks if left and anew else left

    def _expert(self) -> dict[str, Any]:
        """Returns of the expert and of random actions; a policy is trained if it is not there yet."""
        if self.expert_steps:
            own = [f"env={self.imitation}", f"steps={self.expert_steps}", *self.expert_keys, f"dir={self.path}", "resume=auto"]
            training(["train", self.expert, *own]).run(Slice(Path()))
            learner = load(self.path)
        else:
            learner = learner_class("mpc")(self.imitation, threads=1)
        returns, random = learner.score(self.episodes).whole(), _random(learner, self.episodes)
        learner.close()
        return {"versions": versions(), "returns": returns, "random": random, "policy": self._policy()}

    def _policy(self) -> str | None:
        """What tells a trained expert from others; None for a planner, and where there is none yet."""
        found = sorted(Path(self.path).rglob("agent.safetensors")) if self.expert_steps else []
        return hashlib.sha256(found[-1].read_bytes()).hexdigest()[:16] if found else None

    def _run(self, row: str, budget: int, seed: int, slice: Slice) -> dict[str, Any]:
        values = self.values(row, budget, seed)
        learner = learner_class(row)(values.pop("env"), **values, threads=1)
        learner.learn(self.steps)
        found = {
            "versions": versions(), "returns": learner.score(self.episodes).whole(), "labels": learner.source.labels,
            "policy": self._policy(),
            "steps": learner.clock.env_step, "seconds": self._decisions(learner),
        }  # fmt: skip
        learner.close()
        return found

    def _decisions(self, learner: Learner) -> dict[str, float]:
        """Processor seconds of a decision for one state: the policy's, and the expert's."""
        env = learner.environments.another(1)
        x = env.reset(0)
        expert = learner.source.expert.advice(env)
        agent = learner.agent
        with learner.training():
            return {
                "policy": _median(lambda: agent.act(x, explore=False), REPEATS),
                "expert": _median(lambda: expert(x), REPEATS // 10),
            }

    def _policies(self, row: str) -> str:
        return " ".join([row, *self.variant])

    def waiting(self, results: Results) -> str:
        """A line about missing measurements, or ""."""
        left = len(self.due(results))
        return f"{self.imitation}, {self.expert}: {left} runs to go" if left else ""

    def shares(self, row: str, budget: int, results: Results) -> list[float]:
        """The share of the expert's return, of each seed; empty until all are there."""
        keys = [self.key(row, budget, seed) for seed in self.seeds]
        if self.expert_key() not in results or not all(key in results for key in keys):
            return []
        best, worst = (float(np.mean(results[self.expert_key()][name])) for name in ("returns", "random"))
        return [(float(np.mean(results[key]["returns"])) - worst) / (best - worst) for key in keys]

    def curve(self, row: str, results: Results) -> dict[int, Interval]:
        """The mean share over seeds by budget, of those that are there."""
        found = {budget: self.shares(row, budget, results) for budget in self.budgets[row]}
        return {budget: interval(shares) for budget, shares in found.items() if shares}

    def needed(self, row: str, results: Results) -> float:
        """The smallest budget from which on the mean share is enough; inf if the largest is not."""
        found = math.inf
        for budget, one in sorted(self.curve(row, results).items(), reverse=True):
            if one.mean < self.share:
                break
            found = budget
        return found

    def _told(self, row: str, need: float) -> str:
        return f"at most {need:,}" if need == self.budgets[row][0] else f"{need:,}"

    def judge(self, results: Results) -> list[Verdict]:
        """Verdicts, once everything is measured."""
        if self.due(results):
            return []
        largest, where = (
            self.budgets[self.row][-1],
            f"{self._policies(self.row)} of {self.path} on {self.imitation}, seeds {self.seeds}",
        )
        mean, low, high = self.curve(self.row, results)[largest]
        between = f" [{low:.3f}, {high:.3f}]" if len(self.seeds) > 1 else ""
        about = f"{where}, {largest:,} labels: share of the expert's return over random actions'{between}"
        verdicts = [at_least(about, mean, self.share)]
        if self.fewer is not None and self.beside is not None:
            ours, theirs = self.needed(self.row, results), self.needed(self.beside, results)
            most = self.budgets[self.beside][-1]
            said = self._told(self.beside, theirs) if theirs < math.inf else f"more than {most:,}, which counts as so many"
            first = self._told(self.row, ours)
            about = f"{where}: labels to a share of {self.share:g}, {first}, over those of {self.beside}, {said}"
            verdict = at_most(about, ours / min(theirs, most), self.fewer, "x")
            doubtful, need = (self.beside, theirs) if verdict.passed else (self.row, ours)  # fewer of whose labels reverse it
            lacking = f"runs of {doubtful} with fewer than {need:,} labels" if need == self.budgets[doubtful][0] else ""
            verdicts.append(replace(verdict, passed=verdict.passed and not lacking, missing=lacking))
        if self.faster is not None:
            seconds = [results[self.key(self.row, largest, seed)]["seconds"] for seed in self.seeds]
            times = statistics.median(one["expert"] / one["policy"] for one in seconds)
            policy, expert = (1e3 * statistics.median(one[who] for one in seconds) for who in ("policy", "expert"))
            about = f"{where}: processor time of a decision, the expert's {expert:.3g} ms over the policy's {policy:.3g} ms"
            verdicts.append(at_least(about, times, self.faster, "x"))
        return verdicts

    def report(self, results: Results) -> list[str]:
        """A table of the share by row and budget."""
        curves = {row: self.curve(row, results) for row in self.budgets}
        if not any(curves.values()):
            return []
        best, worst = (interval(results[self.expert_key()][name]) for name in ("returns", "random"))
        lines = [
            f"{self.imitation}, {self.path}: {best.mean:.1f} [{best.low:.1f}, {best.high:.1f}], random actions "
            f"{worst.mean:.1f}, {self.episodes} episodes; mean share over seeds {self.seeds} and its interval.",
            "",
            "| row | labels | share of the expert's return |",
            "|---|---|---|",
        ]
        for row, curve in curves.items():
            for budget, (mean, low, high) in curve.items():
                between = "" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]"  # a single seed has no interval
                lines.append(f"| `{self._policies(row)}` | {budget:,} | {mean:.3f}{between} |")
        return lines

    def panel(self, results: Results) -> Callable[[Axes], None] | None:
        """A function that draws returns against labels: of all runs with this expert, whichever row's claims they are for."""
        begin, expert = [f"env={self.imitation}", f"expert={self.path}"], results.get(self.expert_key())
        policy = None if expert is None else expert.get("policy")  # runs are not drawn beside another expert than their own
        found: dict[str, dict[int, list[float]]] = {}
        for key, one in results.items():
            _, _, row, *words = key.split() if key.startswith("rlamort train") else ["", "", "", ""]
            if words[:2] == begin and one.get("policy") == policy:
                budgets = found.setdefault(" ".join([row, *(word for word in words if word.split("=")[0] in VARIANTS)]), {})
                budgets.setdefault(one["labels"], []).append(float(np.mean(one["returns"])))
        if expert is None or not found or self.variant:  # variants are in the panel of the row
            return None
        best, worst = (float(np.mean(expert[name])) for name in ("returns", "random"))

        def draw(axes: Axes) -> None:
            for number, (name, budgets) in enumerate(sorted(found.items())):
                labels, color = sorted(budgets), f"C{number}"
                ends = [interval(budgets[count]) for count in labels]
                bars = np.nan_to_num([[end.mean - end.low, end.high - end.mean] for end in ends]).T
                axes.errorbar(labels, [end.mean for end in ends], bars, fmt="o-", color=color, capsize=3, label=name)
                for count in labels:
                    axes.plot([count] * len(budgets[count]), budgets[count], ".", color=color, alpha=0.4)
            axes.axhline(best, color="k", linewidth=0.8, label="expert")
            enough = worst + self.share * (best - worst)
            axes.axhline(enough, color="k", linewidth=0.8, linestyle="--", label=f"{self.share:.0%} of it")
            counts = sorted({count for budgets in found.values() for count in budgets})
            lowest = min(enough, *(value for budgets in found.values() for values in budgets.values() for value in values))
            axes.set(title=f"{self.imitation}, expert {self.expert}", xscale="log", xlabel="labels", ylabel="return")
            axes.set(xticks=counts, xlim=(0.7 * counts[0], 1.4 * counts[-1]))
            axes.set_xticklabels([f"{count:,}" for count in counts])
            axes.minorticks_off()
            axes.set_ylim(lowest - 0.2 * (best - lowest), best + 0.2 * (best - lowest))
            axes.legend(fontsize=8)

        return draw


class Uniform(Agent):
    """Uniformly random actions, as in a warm-up."""

    def act(self, x: Tensor, explore: bool) -> Tensor:
        return self.domain.uniform(len(x), x.device)


def _random(learner: Learner, episodes: int) -> list[float]:
    own, learner.agent = learner.agent, Uniform(learner.agent.spec, normalise=False)
    try:
        return learner.score(episodes).whole()
    finally:
        learner.agent = own


def _median(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of this thread's processor time."""
    seconds = []
    with torch.no_grad():
        work()
        for _ in range(repeats):
            started = time.thread_time()
            work()
            seconds.append(time.thread_time() - started)
    return statistics.median(seconds)


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
