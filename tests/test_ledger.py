"""The ledger of ingredients: statistics against known answers, claims against made-up runs, a small study with real ones."""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import zlib
from collections import Counter

import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium.envs.classic_control import PendulumEnv
from scipy import stats

from rlamort.cli import main
from rlamort.config import resolve
from rlamort.errors import Fault, Preempted, UserError
from rlamort.measure import reproduce, slices
from rlamort.measure.falsifiers import claim_of, judge, together
from rlamort.measure.ledger import RUNS, Ledger, Run
from rlamort.measure.ledger_figure import draw_ledger, spaced
from rlamort.measure.reproduce import entries
from rlamort.measure.slices import Slice, launch, train
from rlamort.measure.statistics import (
    first,
    improvement,
    improvement_interval,
    paired,
    shown,
    sooner,
    spread,
    tighter,
    welch,
    within,
)
from rlamort.measure.verdict import Verdict
from rlamort.run.directory import locked
from rlamort.score import iqm, mean, stratified_bootstrap

(REAL,) = entries("ledger")
SMALL = {
    "ledger": {"plain": ["sac"], "fast": ["plain", "learning_rate=1e-3"], "faster": ["fast", "learning_rate=3e-3", "tau=0.01"]},
    "steps": 200,
    "overrides": ["warmup_steps=50", "eval_every=100", "log_every=100", "threads=1", "tau=0.02"],
    "timed_overrides": ["threads=2"],
    "tasks": {"A": {"goal": 100, "target": 50, "published": [60, 10]}, "B": {"goal": 10, "target": 5, "published": [6, 1]}},
    "blocks": [
        {"stage": 1, "arms": ["plain", "fast", "faster"], "envs": ["A", "B"], "seeds": [0, 1]},
        {"stage": 2, "arms": ["plain", "fast", "faster"], "envs": ["A", "B"], "seeds": [2]},
        {"stage": 3, "arms": ["best", "plain"], "envs": ["A"], "seeds": [3]},
        {"stage": 1, "arms": ["plain", "fast"], "envs": ["A", "B"], "seeds": [0, 1], "timed": True},
    ],
    "ranked": {"arms": ["fast", "faster"], "envs": ["A", "B"], "stage": 2},
    "reference": "plain",
    "judged": [],
    "shown": {"plain": "plain", "fast": "fast"},
}


def small(**changes):
    return Ledger("ledger", **SMALL | changes)


def stored(ledger, value, seconds=lambda run: 10.0, runs=None, **facts):
    """Results of runs whose returns rise linearly to `value(run)`, in so many seconds."""
    facts = {"processor": "P", "booted": 0.0, "versions": {}} | facts
    return {
        ledger.key(run): {
            **run._asdict(), **facts, "seconds": seconds(run),
            "evaluations": [
                {"env_step": run.steps * i // 4, "eval/return": value(run) * i / 4, "time/seconds": seconds(run) * i / 4}
                for i in range(1, 5)
            ],
        }
        for run in (ledger.runs({}) if runs is None else runs)
    }  # fmt: skip


def test_improvement_is_the_mann_whitney_statistic():
    made = np.random.default_rng(0)
    ours, theirs = ([made.integers(0, 6, count).astype(float) for count in counts] for counts in ((5, 3), (4, 6)))
    expected = [stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(ours, theirs, strict=True)]
    assert improvement(ours, theirs) == pytest.approx(np.mean(expected))
    assert improvement([np.array([3.0, 4])], [np.array([1.0, 2])]) == 1
    assert improvement([np.array([1.0, 1])], [np.array([1.0])]) == 0.5
    assert improvement_interval([np.array([3.0, 4])], [np.array([1.0, 2])]) == (1, 1, 1)
    value, low, high = improvement_interval(ours, theirs)
    assert low < value == improvement(ours, theirs) < high


def test_bootstrap_of_one_task_is_scipys_and_keeps_tasks_apart():
    values = np.random.default_rng(1).normal(0, 1, 40)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4_000, rng=0).confidence_interval
    ours = stratified_bootstrap([values], mean, draws=4_000)
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.03)
    assert stratified_bootstrap([np.full(4, 1.0), np.full(2, 4.0)], mean) == (2, 2, 2)
    assert iqm(np.array([[0.0, 1, 2, 9], [4, 4, 4, 4]])).tolist() == [1.5, 4]


def test_improvement_intervals_cover():
    """Of two normals a standard deviation apart, whose probability is known."""
    made, truth, covered = np.random.default_rng(2), stats.norm.cdf(1 / np.sqrt(2)), 0
    for _ in range(60):
        ours, theirs = ([made.normal(shift, 1, 20) for _ in range(3)] for shift in (1, 0))
        low, high = improvement_interval(ours, theirs, draws=300)[1:]
        covered += low <= truth <= high
    assert covered >= 50  # of 60 intervals of 95 %


def test_intervals_of_unlike_seeds_are_welchs():
    ours, theirs = np.array([3.0, 5, 9, 2]), np.array([1.0, 4, 5])
    test = stats.ttest_ind(ours, theirs, equal_var=False)
    found = welch(ours, theirs)
    assert found.mean == pytest.approx(4.75 - 10 / 3)
    assert tuple(found[1:]) == pytest.approx(tuple(test.confidence_interval()))
    assert welch(np.full(3, 2.0), np.full(3, 1.0)) == (1.0, 1.0, 1.0)
    assert np.isnan(welch(np.array([3.0]), theirs).low)


def test_paired_intervals_are_students_and_spread_pools_tasks():
    ours, theirs = np.array([3.0, 5, 9]), np.array([1.0, 4, 5])
    test = stats.ttest_rel(ours, theirs)
    assert tuple(paired(ours, theirs)[1:]) == pytest.approx(tuple(test.confidence_interval()))
    assert spread([np.array([1.0, 3]), np.array([5.0, 5])]) == pytest.approx(1)
    assert np.isnan(spread([np.array([1.0])]))


def test_times_to_a_return():
    run = [
        {"eval/return": value, "env_step": step, "time/seconds": 2.0 * step} for step, value in ((1, 0.0), (2, 7.0), (3, 5.0))
    ]
    assert [first(run, target, "env_step") for target in (0, 1, 7, 8)] == [1, 2, 2, np.inf]
    assert first(run, 1, "time/seconds") == 4
    assert [within(run, seconds, "time/seconds")["eval/return"] for seconds in (0, 3, 4, 5.9, 99)] == [0, 0, 7, 7, 5]
    assert within(run, 2, "env_step")["eval/return"] == 7
    assert sooner([(5, 10), (4, 40), (2, 6)], [99, 99, 99]) == (3, False)
    assert sooner([(5, np.inf), (np.inf, 4)], [20, 20]) == (2, True)
    assert sooner([(np.inf, np.inf)], [20]) == (0, False)
    assert np.isnan(sooner([], [])[0])


def test_arms_add_to_arms():
    ledger = small()
    assert ledger.arm("plain") == ["sac"]
    assert ledger.arm("faster") == ["sac", "learning_rate=3e-3", "tau=0.01"]
    assert ledger.command(Run("faster", "A", 7, 200, True)) == [
        "train", "sac", "env=A", "steps=200", "seed=7", "warmup_steps=50", "eval_every=100", "log_every=100", "threads=2",
        "tau=0.01", "learning_rate=3e-3",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"there is no arm fasst\. Did you mean fast"):
        ledger.arm("fasst")


def test_early_stops_leave_balanced_data():
    """After any number of runs, no arm on any task is ahead of another by more than a seed within a stage."""
    ledger = small()
    order = [run for run in ledger.runs({}) if not run.timed]
    assert [run.seed for run in order] == [0] * 6 + [1] * 6 + [2] * 6 + [3]
    for end in range(len(order) - 1):
        counts = Counter((run.arm, run.env) for run in order[:end])
        assert (
            max(counts.values(), default=0) - min((counts[key] for key in itertools.product(ledger.ledger, "AB")), default=0)
            <= 1
        )
    assert len(ledger._replace(idle=True).due({})) == 8
    assert [task.key for task in ledger.due({})] == [ledger.key(run) for run in order]
    assert len({task.file for task in ledger.due({}) + ledger._replace(idle=True).due({})}) == len(order) + 8


def test_the_best_arms_are_known_when_all_that_may_be_have_run():
    ledger = small()
    results = stored(ledger, lambda run: {"plain": 99, "fast": 5, "faster": 7}[run.arm] * ledger.goal(run.env))
    assert ledger.ranking(results) == ["faster", "fast"]
    assert [run for run in ledger.runs(results) if run.seed == 3] == [Run("plain", "A", 3, 200), Run("faster", "A", 3, 200)]
    assert ledger.waiting(results) == "stage 3: 1 of 2 runs to go"
    results.pop(ledger.key(Run("fast", "B", 2, 200)))
    assert ledger.ranking(results) == []
    assert ledger.waiting(results) == (
        "stage 2: 1 of 6 runs to go; stage 3: 0 of 1 runs to go, and those of the best arms, which are not known yet"
    )


CLAIMS = [  # declared, returns by arm, passes
    ({"kind": "Band", "arm": "plain", "env": "A"}, {"plain": 68}, True),
    ({"kind": "Band", "arm": "plain", "env": "A"}, {"plain": 70}, False),
    ({"kind": "Paired", "pairs": [["faster", "fast"], ["fast", "plain"]], "env": "A"}, {"plain": 50, "fast": 60}, True),
    ({"kind": "Paired", "pairs": [["fast", "plain"]], "env": "A"}, {"plain": 50, "fast": 50}, False),
    ({"kind": "Better", "better": ["fast"], "over": "plain", "env": "A"}, {"plain": 50, "fast": 51}, True),
    ({"kind": "Better", "better": ["fast"], "over": "plain", "env": "A"}, {"plain": 50, "fast": 50}, False),
    ({"kind": "Tighter", "pairs": [["fast", "plain"]], "envs": ["A"]}, {"plain": 50, "fast": 49}, False),
    ({"kind": "Tighter", "pairs": [["faster", "plain"], ["fast", "plain"]], "envs": ["A"]}, {"plain": 50, "fast": 51}, True),
    ({"kind": "Gain", "gain": ["fast"], "over": "plain", "envs": ["A", "B"]}, {"plain": 50, "fast": 51}, True),
    ({"kind": "Gain", "gain": ["fast"], "over": "plain", "envs": ["A", "B"]}, {"plain": 50, "fast": 50}, False),
    ({"kind": "Goal", "arm": "best", "env": "A"}, {"faster": 98}, True),
    ({"kind": "Goal", "arm": "best", "env": "A"}, {"faster": 97}, False),
    ({"kind": "Worst", "arm": "best", "over": "plain", "envs": ["A"]}, {"faster": 60, "plain": 50}, True),
    ({"kind": "Worst", "arm": "best", "over": "plain", "envs": ["A"]}, {"faster": 60, "plain": 60}, False),
]  # fmt: skip


@pytest.mark.parametrize(("declared", "returns", "passes"), CLAIMS)
def test_claims_pass_and_fail(declared, returns, passes):
    ledger = small()

    def value(run):  # seeds differ, by as much in every arm
        return (returns.get(run.arm, 1) + run.seed) * ledger.goal(run.env) / 100

    results = stored(ledger, value)
    results |= stored(ledger, value, runs=ledger.runs(results))
    verdict = judge(ledger, {"says": "it", **declared}, results)
    assert verdict.outcome == ("pass" if passes else "FAIL"), verdict
    assert verdict.claim == ("it (best: faster)" if "best" in declared.values() else "it")


@pytest.mark.parametrize(("by", "level", "outcome"), [(0.1, 50, "pass"), (2, 50, "FAIL"), (0, 50, "FAIL"), (0.1, 0, "FAIL")])
def test_seeds_that_lie_closer_are_a_gain_too_if_nothing_is_lost(by, level, outcome):
    """By more than noise: a spread of two thirds says nothing with three seeds, and one that is always 0 has lost."""
    ledger = small()
    results = stored(ledger, lambda run: 50 + 3 * (run.seed - 1) if run.arm == "plain" else level + by * (run.seed - 1))
    declared = {"kind": "Tighter", "says": "it", "pairs": [["fast", "plain"]], "envs": ["A"]}
    assert judge(ledger, declared, results).outcome == outcome


def test_ratios_of_spreads_are_of_the_f_distribution():
    made = np.random.default_rng(3)
    ours, theirs = made.normal(0, 1, 6), made.normal(0, 3, 5)
    ratio = theirs.var(ddof=1) / ours.var(ddof=1)
    expected = np.sqrt([ratio, ratio / stats.f.ppf(0.975, 4, 5), ratio / stats.f.ppf(0.025, 4, 5)])
    assert tuple(tighter([ours], [theirs])) == pytest.approx(tuple(expected))
    cover = [tighter([made.normal(0, s, 5) for s in (1, 9)], [made.normal(0, s, 5) for s in (1, 9)]) for _ in range(200)]
    assert sum(one.low <= 1 <= one.high for one in cover) >= 180
    assert np.isnan(tighter([ours, ours[:1]], [theirs, theirs]).low)


@pytest.mark.parametrize(
    ("ours", "theirs", "top", "least", "times", "outcome"),
    [
        (10.0, 20.0, 100, 2, 1.0, "pass"), (20.0, 20.0, 100, 2, 1.0, "FAIL"), (10.0, 20.0, 100, 2, 3.0, "FAIL"),
        (10.0, 30.0, 100, 2, 3.0, "pass"), (10.0, 30.0, 40, 1, 1.0, "FAIL"),
    ],
)  # fmt: skip
def test_sooner_is_by_seconds_to_the_target(ours, theirs, top, least, times, outcome):
    """Whoever returns less than half of `top` never arrives."""
    ledger = small()
    results = stored(ledger, lambda run: top / 100 * ledger.goal(run.env), lambda run: ours if run.arm == "fast" else theirs)
    claim = {"kind": "Sooner", "says": "it", "arm": "fast", "over": "plain", "envs": ["A", "B"], "least": least, "times": times}
    assert judge(ledger, claim, results).outcome == outcome


def test_who_never_arrives_is_a_bound_with_all_its_seconds():
    ledger = small()
    results = stored(
        ledger,
        lambda run: (1.0 if run.arm == "fast" else 0.1) * ledger.goal(run.env),
        lambda run: 10.0 if run.arm == "fast" else 14.0,
    )
    claim = {"kind": "Sooner", "says": "it", "arm": "fast", "over": "plain", "envs": ["A", "B"], "least": 2, "times": 3.0}
    assert "A >= 2.8x" in judge(ledger, claim, results).measured  # 14 s, unfinished, for 5 s
    assert judge(ledger, claim, results).outcome == "FAIL"


def test_width_is_judged_at_equal_seconds():
    ledger = small()
    declared = {"kind": "AtEqualSeconds", "says": "it", "wider": ["fast"], "over": "plain", "envs": ["A", "B"]}
    for seconds, outcome in ((40.0, "FAIL"), (12.0, "pass")):  # twice the return at its end
        results = stored(
            ledger,
            lambda run: (2.0 if run.arm == "fast" else 1.0) * ledger.goal(run.env),
            lambda run, seconds=seconds: seconds if run.arm == "fast" else 10.0,
        )
        verdict = judge(ledger, declared, results)
        assert verdict.outcome == outcome
    assert verdict.measured == "fast +0.500 [+0.500, +0.500]"  # three quarters of twice the return, less the return
    late = Run("fast", "A", 1, 200, True)
    results[ledger.key(late)] |= {
        "evaluations": [one | {"time/seconds": 99.0} for one in results[ledger.key(late)]["evaluations"]]
    }
    assert judge(ledger, declared, results).outcome == "FAIL"  # by the slowest of its timed runs
    results.pop(ledger.key(late))
    assert judge(ledger, declared, results).missing == "1 of 20 runs are missing"


def test_what_lacks_runs_or_a_common_session_is_incomplete_and_does_not_pass():
    ledger = small()
    better = {"kind": "Better", "says": "it", "better": ["fast"], "over": "plain", "env": "A"}
    results = stored(ledger, lambda run: 50 + (run.arm == "fast"))
    results.pop(ledger.key(Run("fast", "A", 2, 200)))
    verdict = judge(ledger, better, results)
    assert (verdict.outcome, verdict.passed) == ("incomplete", False)
    assert verdict.measured == "2 of 3 seeds so far: fast +1 [+1, +1]"
    assert judge(ledger, better, {}).measured == "6 of 6 runs are missing"
    assert (
        "the best arm is not known yet"
        in judge(ledger, {"kind": "Goal", "says": "it", "arm": "best", "env": "A"}, results).measured
    )
    claim = {"kind": "Sooner", "says": "it", "arm": "fast", "over": "plain", "envs": ["A", "B"], "least": 2}
    apart = {key: one | {"booted": 1e6 * one["seed"] + 1e3 * (one["arm"] == "fast")} for key, one in results.items()}
    both = "not timed in one session with plain: fast on A for {0} of 2 seeds, fast on B for {0} of 2 seeds"
    assert judge(ledger, claim, apart).missing == both.format(2)
    some = {key: one | {"booted": 1e3 * (one["arm"] == "fast" and one["seed"] == 1)} for key, one in results.items()}
    assert judge(ledger, claim, some).missing == both.format(1)  # a pair is not left out without a word
    assert together({"processor": "P", "booted": 5.0}, {"processor": "P", "booted": 6.0})
    assert not together({"processor": "P", "booted": 5.0}, {"processor": "Q", "booted": 5.0})
    with pytest.raises(ValueError, match="and so does not pass"):
        Verdict("it", "1", "> 0", True, missing="a run")


def test_every_declared_claim_has_arms_seeds_and_settings_that_exist():
    for declared in REAL.judged:
        claim = claim_of(REAL, declared)
        asked = {False: getattr(claim, "plain", True), True: getattr(claim, "timed", False)}
        for timed in (False, True):
            seeds = REAL.declared(claim.arms, claim.envs, timed, getattr(claim, "steps", None))
            assert seeds or not asked[timed], declared["says"]
            if "best" in claim.arms:  # and not on those that chose it
                assert min(seeds, default=5) >= 5
        claim.threshold(REAL)
    assert {seed for one in REAL.stages() if one.stage <= 2 for seed in one.seeds} == {0, 1, 2, 3, 4}
    assert set(REAL.ranked["arms"]) | set(REAL.shown) - {"best"} | {REAL.reference} <= set(REAL.ledger)
    for name in REAL.ledger:
        _, row, *settings = REAL.command(Run(name, "Hopper-v5", 0, REAL.steps))
        resolve(row, {key: yaml.safe_load(value) for key, value in (one.split("=", 1) for one in settings)})
    _, row, *settings = REAL.command(Run("unit", "Hopper-v5", 0, REAL.steps))
    lean = resolve("sac_lean", {"critic.hidden": None}).leaves()
    unit = resolve(row, {key: yaml.safe_load(value) for key, value in (one.split("=", 1) for one in settings)}).leaves()
    of_run = {one.split("=")[0] for one in REAL.overrides} | {"env", "steps"}
    assert {key for key in unit if key not in of_run and unit[key] != lean[key]} == set()
    with pytest.raises(UserError, match=r"there is no kind of claim Bettr\. Did you mean Better"):
        judge(REAL, {"kind": "Bettr", "says": "it"}, {})


def test_labels_keep_apart_and_move_as_little_as_they_can():
    assert spaced([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spaced([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spaced([0.0, 0.0, 0.02], 0.1) == pytest.approx([0.0, 0.1, 0.2])
    assert spaced([0.95, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    made = np.sort(np.random.default_rng(0).uniform(size=8)).tolist()
    assert min(np.diff(spaced(made, 0.1))) >= 0.1 - 1e-9


def test_tables_and_figure_of_made_up_runs(tmp_path):
    ledger = small()
    draw_ledger(ledger, {}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    made = {run: np.random.default_rng(zlib.crc32(repr(run).encode())).normal(50, 5) for run in ledger.runs({})}
    results = stored(ledger, made.__getitem__)
    draw_ledger(ledger, results, tmp_path / "ledger.png")
    assert (tmp_path / "ledger.png").stat().st_size > 10_000
    lines = ledger.report(results)
    last = {arm: np.array([made[Run(arm, "A", seed, 200)] for seed in range(3)]) for arm in ("plain", "fast")}
    gain, area = shown(paired(last["fast"], last["plain"]), "+.0f"), 0.625 * last["fast"].mean()
    line = next(one for one in lines if one.startswith("| fast | 3 |"))
    assert line.startswith(f"| fast | 3 | {last['fast'].mean():.0f} [")
    assert f"| {last['fast'].min():.0f} | {gain} | {gain} | {area:.0f} |" in line  # plain is the reference, and what it adds to
    assert "| fast | 2 | 20 |" in "\n".join(lines)  # timed: steps a second
    many = small(shown={str(i): str(i) for i in range(9)})
    with pytest.raises(UserError, match="at most 8 can be told apart"):
        draw_ledger(many, results, tmp_path / "ledger.png")


class Stops(PendulumEnv):
    """It asks its process to stop at its step 120, once, if there is a file that says so."""

    taken = 0

    def step(self, action):
        self.taken += 1
        if self.taken == 120 and os.path.exists("stop"):
            os.remove("stop")
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(action)


TINY = ["warmup_steps=50", "hidden=[8,8]", "batch_size=8", "threads=1", "buffer_size=1000"]
gymnasium.register("rlamort-test/Stops-v0", entry_point=Stops, max_episode_steps=50)


def here(command, ends):
    """A launch in this process."""
    code = code_of(*command)
    assert code in (0, Preempted.exit_code)
    return code == 0


def code_of(*arguments):
    """The exit code of a command in this process."""
    try:
        return main([*arguments])
    except SystemExit as end:
        return end.code


def returns(run):
    return [one["eval/return"] for one in run["evaluations"]]


def test_a_study_is_interrupted_and_resumed(tmp_path, monkeypatch, capsys):
    """Real trainings, one of which is stopped halfway; what is known then is incomplete, and exits with 1."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stop").touch()
    env = "rlamort-test/Stops-v0"
    overrides = [*TINY, "eval_every=100", "log_every=100", "eval_episodes=1"]
    ledger = small(
        overrides=overrides,
        tasks={env: {"goal": -100, "target": -9_999}},
        blocks=[{"stage": 1, "arms": ["plain", "fast"], "envs": [env], "seeds": [0, 1]}],
        ranked={"arms": ["fast"], "envs": [env], "stage": 1},
        judged=[{"kind": "Better", "says": "fast is better", "better": ["fast"], "over": "plain", "env": env}],
        launch=here,
    )
    real = entries
    monkeypatch.setattr(reproduce, "entries", lambda row: [ledger] if row == "ledger" else real(row))
    interrupted, *others = [ledger.key(run) for run in ledger.runs({})]
    assert ledger.due({})[0].run(Slice(tmp_path)) is None
    (left,) = (tmp_path / RUNS).iterdir()
    assert (left / "ckpt").is_dir()
    verdict = reproduce.reproduce("ledger", tmp_path / "results", ends=0)[0]  # no time at all
    assert (verdict.outcome, verdict.measured) == ("incomplete", "4 of 4 runs are missing")
    capsys.readouterr()
    code = code_of("reproduce", "ledger", "--results", "results", "--minutes", "5")
    said = capsys.readouterr().out
    assert said.count("running: ") == 4
    assert "resumed at step 120 (exact)" in said
    assert code == (0 if "pass  fast is better" in said else 1)
    files = sorted((tmp_path / "results" / "ledger").iterdir())
    assert [file.name for file in files] == sorted(task.file for task in ledger.due({}))
    assert not list((tmp_path / RUNS).iterdir())
    kept = {key: one for file in files for key, one in json.loads(file.read_text()).items()}
    assert set(kept) == {interrupted, *others}
    assert [one["continued"] for one in (kept[interrupted], kept[others[0]])] == [True, False]
    for one in kept.values():
        assert [record["env_step"] for record in one["evaluations"]] == [100, 200]
        assert one["seconds"] > 0
        assert one["processor"]
        assert one["threads"] == 1
    also = lambda directory: {"named": directory.name}  # noqa: E731  # of a run that is still there
    straight = train(interrupted.split()[1:], tmp_path / "straight", np.inf, False, here, also)
    assert straight["named"] == "straight"
    assert returns(kept[interrupted]) == returns(straight)  # bit for bit
    seldom = [word.replace("log_every=100", "log_every=150") for word in interrupted.split()[1:]]
    first, *_ = train(seldom, tmp_path / "seldom", np.inf, False, here)["evaluations"]
    assert (first["env_step"], first["eval/return"], "time/seconds" in first) == (100, returns(straight)[0], False)
    text = (tmp_path / "results" / "README.md").read_text()
    assert "### rlamort-test/Stops-v0" in text
    assert "![ledger](ledger.png)" in text
    assert "to go" not in text.partition("\n## ledger\n")[2].partition("\n## ")[0]
    assert ledger.due(kept) == []


def test_the_end_of_a_slice_stops_a_training(tmp_path, monkeypatch):
    """In a process of its own, which is asked to stop while it still imports; a failure is said with its message."""
    monkeypatch.chdir(tmp_path)
    assert launch(["train", "sac", "env=Pendulum-v1"], 0.0) is False
    with pytest.raises(Fault, match=r"learning_rat: there is no such key"):
        launch(["train", "sac", "learning_rat=1"], np.inf)


def test_what_cannot_be_continued_begins_anew_and_ends_when_it_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slices, "BUSY", np.inf)
    ends = []
    ledger = small(ledger=SMALL["ledger"] | {"theirs": ["sb3/sac"]}, launch=lambda command, end: ends.append(end) or False)
    for run in (Run("theirs", "A", 0, 200), Run("fast", "A", 0, 200, True), Run("fast", "A", 0, 200)):
        folder = tmp_path / ledger.folder(run)
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        assert ledger.task(run).run(Slice(tmp_path, 1e9)) is None
        whole = run != Run("fast", "A", 0, 200)
        assert folder.exists() != whole
        assert ends == [np.inf if whole else 1e9]  # what is whole or nothing ends when it does
        ends.clear()


@pytest.mark.parametrize("arm", ["theirs", "fast"])
def test_a_run_that_another_process_has_is_left_to_it(arm, tmp_path, monkeypatch, capsys):
    """Two processes share the runs of a folder, those that go on from a checkpoint, too."""
    monkeypatch.chdir(tmp_path)
    ledger = small(ledger=SMALL["ledger"] | {"theirs": ["sb3/sac"]}, launch=lambda command, ends: pytest.fail("it was begun"))
    run = Run(arm, "A", 0, 200)
    folder = tmp_path / ledger.folder(run)
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    lock = locked(folder)
    assert ledger.task(run).run(Slice(tmp_path)) is None
    assert "another process has this run" in capsys.readouterr().out
    assert (folder / "config.yaml").exists()
    os.close(lock)


def test_what_is_measured_is_not_lost_where_another_process_looks_at_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    locks = []

    def run_and_lock(command, ends):
        done = here(command, ends)
        gc.collect()  # the learner that has the lock, in this process
        locks.append(locked(tmp_path / "run"))
        return done

    command = ["train", "sac", "env=Pendulum-v1", "steps=60", "eval_every=60", "log_every=60", "eval_episodes=1", *TINY]
    assert train(command, tmp_path / "run", np.inf, False, run_and_lock)["evaluations"]
    os.close(locks[0])


def test_an_edited_arm_does_not_go_on_with_the_run_of_its_former_self():
    ledger, run = small(), Run("fast", "A", 0, 200)
    edited = small(ledger=SMALL["ledger"] | {"fast": ["plain", "learning_rate=2e-3"]})
    assert ledger.folder(run) != edited.folder(run)


def test_times_are_not_taken_beside_other_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, begun = Run("fast", "A", 0, 200, True), []
    ledger = small(launch=lambda command, ends: begun.append(command) or False)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:  # a child counts when it has ended
        assert ledger.task(run).run(Slice(tmp_path)) is None
        other.kill()
    assert not begun
    assert "cores are busy with other work; its time is taken on an idle machine" in capsys.readouterr().out


def test_idle_is_for_ledgers(tmp_path):
    with pytest.raises(UserError, match="this row has no timed runs"):
        reproduce.reproduce("race", tmp_path, idle=True)
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "mine.json").write_text("[1]")
    with pytest.raises(UserError, match=r"its ledger/mine\.json was not written by"):
        reproduce.reproduce("ledger", tmp_path)


def test_what_a_user_keeps_in_the_folder_of_an_unfinished_run_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("fast", "A", 0, 200, True)  # which begins anew
    ledger = small(launch=lambda command, ends: False)
    monkeypatch.setattr(slices, "BUSY", np.inf)
    folder = tmp_path / ledger.folder(run)
    written = ("config.yaml", "ckpt/LATEST", "ckpt/step_000000000100/state.safetensors", "agent/agent.json")
    mine = ("notes.txt", "ckpt/notes.txt", "ckpt/frames/mine.safetensors")
    for name in (*written, *mine):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert ledger.task(run).run(Slice(tmp_path)) is None
    assert {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} == set(mine)
    assert not (folder / "agent").exists()
