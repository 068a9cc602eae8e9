"""Claims of a ledger about its arms: each names the runs that it needs, and what would refute it.

Each is judged once all of its runs are there. Before, it is incomplete, and says what those tell that there are for as
many seeds as all of its arms have. S seeds; D differences of one task between two arms at equal seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from rlamort.errors import UserError, nearest
from rlamort.measure.statistics import first, paired, shown, sooner, spread, tighter, within
from rlamort.measure.study import Results
from rlamort.measure.verdict import Verdict
from rlamort.score import Interval, mean, stratified_bootstrap

if TYPE_CHECKING:
    from rlamort.measure.ledger import Ledger, Run

SESSION = 60.0  # seconds by which boot times of one session may differ, as a clock is set


class View(NamedTuple):
    """The runs of a ledger with these seeds, all of them stored."""

    ledger: Ledger
    results: Results
    seeds: list[int]
    clocks: list[int]  # seeds of timed runs

    def runs(self, arm: str, env: str, steps: int | None = None, timed: bool = False) -> list[Run]:
        """One for each seed."""
        name = self.ledger.called(arm, self.results) or arm
        return [self.ledger.of(name, env, seed, steps, timed) for seed in (self.clocks if timed else self.seeds)]

    def last(self, arm: str, env: str, steps: int | None = None) -> np.ndarray:
        """(S,) last returns."""
        return np.array([self.ledger.last(run, self.results) for run in self.runs(arm, env, steps)])

    def scores(self, arm: str, envs: Sequence[str]) -> list[np.ndarray]:
        """(S,) last returns over the goal, a task each."""
        return [self.last(arm, env) / self.ledger.goal(env) for env in envs]

    def gains(self, arm: str, over: str, envs: Sequence[str]) -> list[np.ndarray]:
        """(D,) differences of scores at equal seeds, a task each."""
        return [a - b for a, b in zip(self.scores(arm, envs), self.scores(over, envs), strict=True)]

    def sessions(self, arm: str, over: str, env: str) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """Evaluations of timed runs of both, of every seed of which both ran in one session of one machine."""
        pairs = zip(self.runs(arm, env, timed=True), self.runs(over, env, timed=True), strict=True)
        stored = [tuple(self.results[self.ledger.key(run)] for run in pair) for pair in pairs]
        return [(a["evaluations"], b["evaluations"]) for a, b in stored if together(a, b)]


def together(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two stored runs were measured on one machine between two boots."""
    return bool(a["processor"] == b["processor"] and abs(a["booted"] - b["booted"]) < SESSION)


class Claim(Protocol):
    """One kind of claim."""

    @property
    def arms(self) -> list[str]:
        """Arms that it needs."""
        ...

    @property
    def envs(self) -> list[str]:
        """Environments on which it needs them."""
        ...

    def threshold(self, ledger: Ledger) -> str:
        """What passes."""
        ...

    def measure(self, view: View) -> tuple[str, bool]:
        """What was measured, and whether that passes."""
        ...


class OneArm(NamedTuple):
    """An arm on a task, which a claim is about."""

    arm: str
    env: str

    @property
    def arms(self) -> list[str]:
        return [self.arm]

    @property
    def envs(self) -> list[str]:
        return [self.env]


class Band(OneArm):
    """The arm's mean is within a standard deviation of what is published, `published: [mean, SD]` of the task."""

    def threshold(self, ledger: Ledger) -> str:
        center, deviation = ledger.tasks[self.env]["published"]
        return f"within {center - deviation:g} and {center + deviation:g}"

    def measure(self, view: View) -> tuple[str, bool]:
        center, deviation = view.ledger.tasks[self.env]["published"]
        found = float(view.last(self.arm, self.env).mean())
        return f"{found:.0f}", bool(abs(found - center) <= deviation)


class Paired(NamedTuple):
    """On one task the paired interval excludes 0 from below, for at least one of `pairs` [arm, over]."""

    pairs: list[list[str]]
    env: str

    @property
    def arms(self) -> list[str]:
        return [arm for pair in self.pairs for arm in pair]

    @property
    def envs(self) -> list[str]:
        return [self.env]

    def threshold(self, ledger: Ledger) -> str:
        return "above 0 in one" if len(self.pairs) > 1 else "above 0"

    def measure(self, view: View) -> tuple[str, bool]:
        found = {f"{a} - {b}": paired(view.last(a, self.env), view.last(b, self.env)) for a, b in self.pairs}
        return _listed(found, "+.0f"), any(one.low > 0 for one in found.values())


class Better(NamedTuple):
    """On one task the best of `arms` [arm, ...] is better than `over` on average over seeds."""

    better: list[str]
    over: str
    env: str
    steps: int | None = None

    @property
    def arms(self) -> list[str]:
        return [*self.better, self.over]

    @property
    def envs(self) -> list[str]:
        return [self.env]

    def threshold(self, ledger: Ledger) -> str:
        return "mean above 0" + (" in one" if len(self.better) > 1 else "")

    def measure(self, view: View) -> tuple[str, bool]:
        base = view.last(self.over, self.env, self.steps)
        found = {arm: paired(view.last(arm, self.env, self.steps), base) for arm in self.better}
        return _listed(found, "+.0f"), any(one.mean > 0 for one in found.values())


class Tighter(NamedTuple):
    """The score rises, or its spread over seeds falls and it does not, for at least one of `pairs` [arm, over].

    Each by more than noise: the 95 % interval of the gain, or of the ratio of spreads, says so. By signs alone the same arm
    would pass beside itself in three of four cases, and one that always returns 0, too.
    """

    pairs: list[list[str]]
    envs: list[str]

    @property
    def arms(self) -> list[str]:
        return [arm for pair in self.pairs for arm in pair]

    def threshold(self, ledger: Ledger) -> str:
        return "gain above 0, or spreads above 1x and no loss" + (", in one" if len(self.pairs) > 1 else "")

    def measure(self, view: View) -> tuple[str, bool]:
        told, passed = [], False
        for arm, over in self.pairs:
            gain = stratified_bootstrap(view.gains(arm, over, self.envs), mean)
            ours, theirs = (view.scores(one, self.envs) for one in (arm, over))
            closer = tighter(ours, theirs)
            spreads = f"spread {spread(ours):.3f} for {spread(theirs):.3f}, {shown(closer)}x"
            told.append(f"{arm} - {over} {shown(gain, '+.3f')}, {spreads}")
            passed |= gain.low > 0 or (closer.low > 1 and gain.high >= 0)
        return "; ".join(told), passed


class Gain(NamedTuple):
    """The gain in score over all tasks is above noise, for at least one of `gain`: its interval excludes 0 from below."""

    gain: list[str]
    over: str
    envs: list[str]

    @property
    def arms(self) -> list[str]:
        return [*self.gain, self.over]

    def threshold(self, ledger: Ledger) -> str:
        return "above 0" + (" in one" if len(self.gain) > 1 else "")

    def measure(self, view: View) -> tuple[str, bool]:
        gains = {arm: view.gains(arm, self.over, self.envs) for arm in self.gain}
        found = {arm: stratified_bootstrap(gain, mean) for arm, gain in gains.items()}
        return _listed(found, "+.3f"), any(one.low > 0 for one in found.values())


class AtEqualSeconds(NamedTuple):
    """When `over` has finished, one of `wider` scores more after as many seconds: the gain's interval excludes 0 from below.

    How far an arm is by then its timed runs tell, the slowest of them; what it returns there, the runs of all seeds.
    """

    wider: list[str]
    over: str
    envs: list[str]
    timed: bool = True

    @property
    def arms(self) -> list[str]:
        return [*self.wider, self.over]

    def threshold(self, ledger: Ledger) -> str:
        return "above 0" + (" in one" if len(self.wider) > 1 else "")

    def measure(self, view: View) -> tuple[str, bool]:
        gains = {arm: [self._gains(view, arm, env) for env in self.envs] for arm in self.wider}
        found = {arm: stratified_bootstrap(gain, mean) for arm, gain in gains.items()}
        return _listed(found, "+.3f"), any(one.low > 0 for one in found.values())

    def _gains(self, view: View, arm: str, env: str) -> np.ndarray:
        """(S,) differences of scores, NaN without a session."""
        timed = view.sessions(arm, self.over, env)
        there = [within(ours, theirs[-1]["time/seconds"], "time/seconds")["env_step"] for ours, theirs in timed]
        runs = [view.ledger.evaluations(run, view.results) for run in view.runs(arm, env)]
        then = np.array([within(run, min(there, default=0), "env_step")["eval/return"] for run in runs])
        return (then - view.last(self.over, env)) / view.ledger.goal(env) if there else np.full(len(runs), math.nan)


class Goal(OneArm):
    """On one task the arm's mean is above the goal."""

    def threshold(self, ledger: Ledger) -> str:
        return f"> {ledger.goal(self.env):g}"

    def measure(self, view: View) -> tuple[str, bool]:
        found = view.last(self.arm, self.env)
        seeds = ", ".join(f"{one:.0f}" for one in found)
        return f"{found.mean():.0f} ({seeds})", bool(found.mean() > view.ledger.goal(self.env))


class Worst(NamedTuple):
    """The arm's worst seed is under the worst of `over` on at most `misses` tasks."""

    arm: str
    over: str
    envs: list[str]
    misses: int = 0

    @property
    def arms(self) -> list[str]:
        return [self.arm, self.over]

    def threshold(self, ledger: Ledger) -> str:
        return f"under it on at most {self.misses} of {len(self.envs)}" if self.misses else "above it on all"

    def measure(self, view: View) -> tuple[str, bool]:
        worst = {env: [float(view.last(arm, env).min()) for arm in (self.arm, self.over)] for env in self.envs}
        told = ", ".join(f"{env} {ours:.0f} for {theirs:.0f}" for env, (ours, theirs) in worst.items())
        under = sum(ours < theirs for ours, theirs in worst.values())
        return told, under <= self.misses if self.misses else all(ours > theirs for ours, theirs in worst.values())


class Sooner(NamedTuple):
    """To each task's target the arm takes at most 1 / `times` of the seconds of `over`, on at least `least` tasks.

    How many times sooner is a median over seeds of ratios within one session of one machine. A run of `over` that never
    returns the target counts with all its seconds: it would have taken longer.
    """

    arm: str
    over: str
    envs: list[str]
    least: int
    times: float = 1.0
    timed: bool = True
    plain: bool = False

    @property
    def arms(self) -> list[str]:
        return [self.arm, self.over]

    def threshold(self, ledger: Ledger) -> str:
        what = "sooner" if self.times == 1 else f">= {self.times:g}x sooner"
        return f"{what} on {'all' if self.least == len(self.envs) else f'at least {self.least} of {len(self.envs)}'}"

    def measure(self, view: View) -> tuple[str, bool]:
        found = {}
        for env in self.envs:
            target, sessions = float(view.ledger.tasks[env]["target"]), view.sessions(self.arm, self.over, env)
            pairs = [tuple(first(one, target, "time/seconds") for one in session) for session in sessions]
            found[env] = sooner(pairs, [theirs[-1]["time/seconds"] for _, theirs in sessions])
        told = ", ".join(f"{env} {'>= ' if bound else ''}{value:.3g}x" for env, (value, bound) in found.items())
        reached = [value >= self.times if self.times > 1 else value > 1 for value, _ in found.values()]
        return told, sum(reached) >= self.least


KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (Band, Paired, Better, Tighter, Gain, AtEqualSeconds, Goal, Worst, Sooner)
}


def claim_of(ledger: Ledger, declared: dict[str, Any]) -> Claim:
    """A declared claim, {kind, says, and the fields of that kind}.

    Raises:
        UserError: there is no such kind.
    """
    kind = declared["kind"]
    if kind not in KINDS:
        raise UserError(f"{ledger.row}: there is no kind of claim {kind}. {nearest(kind, KINDS)}")
    claim: Claim = KINDS[kind](**{key: value for key, value in declared.items() if key not in ("kind", "says")})
    return claim


def judge(ledger: Ledger, declared: dict[str, Any], results: Results) -> Verdict:
    """The verdict on one declared claim: incomplete while runs are missing, or were not timed together."""
    claim = claim_of(ledger, declared)
    steps: int | None = getattr(claim, "steps", None)
    timed, plain = bool(getattr(claim, "timed", False)), bool(getattr(claim, "plain", True))
    places = {arm: found for arm in claim.arms if (found := ledger.called(arm, results)) != arm}
    says = declared["says"] + "".join(f" ({place}: {arm})" for place, arm in places.items() if arm)
    seeds, clocks = (
        ledger.declared(claim.arms, claim.envs, kind, steps) if asked else [] for kind, asked in ((False, plain), (True, timed))
    )
    view = View(ledger, results, seeds, clocks)
    pairs = [(arm, env) for arm in claim.arms for env in claim.envs]
    needed = {run for arm, env in pairs for kind in (False, True) for run in view.runs(arm, env, steps, kind)}
    missing = {run for run in needed if run.arm in places or ledger.key(run) not in results}
    lost = {(run.seed, run.timed) for run in missing}
    whole = View(ledger, results, [s for s in seeds if (s, False) not in lost], [s for s in clocks if (s, True) not in lost])
    some = bool(whole.seeds) >= plain and bool(whole.clocks) >= timed
    measured, passed = claim.measure(whole) if some else ("", False)
    if missing:
        unknown = " and ".join(place for place, arm in places.items() if arm is None)
        lacking = f"the {unknown} arm is not known yet" if unknown else f"{len(missing)} of {len(needed)} runs are missing"
        here, all = (whole.clocks, clocks) if whole.clocks and not whole.seeds else (whole.seeds, seeds)
        so_far = f"{len(here)} of {len(all)} seeds so far: {measured}" if some else lacking
        return Verdict(says, so_far, claim.threshold(ledger), False, missing=lacking)
    apart = [
        f"{arm} on {env} for {len(clocks) - together} of {len(clocks)} seeds"
        for arm, env in pairs
        if timed and (together := len(view.sessions(arm, claim.arms[-1], env))) < len(clocks)
    ]
    lacking = f"not timed in one session with {claim.arms[-1]}: {', '.join(apart)}" if apart else ""
    return Verdict(says, measured, claim.threshold(ledger), passed and not apart, missing=lacking)


def _listed(found: dict[str, Interval], digits: str) -> str:
    return "; ".join(f"{what} {shown(value, digits)}" for what, value in found.items())
