"""Claims and measurements: what `rlamort reproduce` and `rlamort bench` say follows from the numbers."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from rlamort.agents.sac import SAC
from rlamort.agents.td3 import TD3
from rlamort.envs.sphere import Sphere
from test_laws import batch_for
from torch.utils.flop_counter import FlopCounterMode

from rlamort.cli import main
from rlamort.config import locate, resolve
from rlamort.critic import Critic
from rlamort.domain import SquashedGaussian
from rlamort.env import Spec, Step
from rlamort.measure import overestimation, reproduce, speed
from rlamort.measure.claims import iapo, sphere
from rlamort.measure.ledger import Ledger
from rlamort.measure.race import Race
from rlamort.measure.reproduce import Claim, entries, rows, table
from rlamort.measure.sooner import Sooner
from rlamort.measure.study import Study
from rlamort.measure.verdict import Bound, Measured, Verdict, at_least, at_most
from rlamort.objective import Cost, MaxQ, Soft, Temperature
from rlamort.parts import Critics, Full, Middle, Setting
from rlamort.score import interval, iqm, stratified_bootstrap


def kept(study, ours, theirs):
    """Runs whose last evaluations are these."""
    return {
        study.key(row, seed): {"evaluations": [{"eval/return": -500.0}, {"eval/return": value}]}
        for row, values in zip(study.contenders(), (ours, theirs), strict=False)
        for seed, value in zip(study.seeds, values, strict=True)
    }


def test_a_threshold_must_be_reached_by_every_seed():
    study = Study("sac", "Pendulum-v1", 20_000, [0, 1, 2], threshold=-200)
    assert [v.passed for v in study.judge(kept(study, [-150, -199, -200], []))] == [True]
    assert [v.passed for v in study.judge(kept(study, [-150, -201, -100], []))] == [False]


def test_a_baseline_must_not_lie_wholly_above():
    study = Study("sac", "Hopper-v5", 50_000, [0, 1, 2], baseline="sb3/sac")
    assert study.judge(kept(study, [100, 110, 120], [115, 125, 135]))[0].passed  # intervals overlap
    assert study.judge(kept(study, [200, 210, 220], [1, 2, 3]))[0].passed  # ours lies above
    assert study.judge(kept(study, [100, 101, 102], [200, 201, 202]))[0].outcome == "FAIL"


def test_intervals_that_overlap_because_they_are_wide_do_not_pass():
    """The difference of the means is told, and decides whether anything is known of it."""
    study = Study("sac", "Hopper-v5", 50_000, [0, 1, 2], baseline="sb3/sac")
    for ours, theirs, outcome, told in (
        ([300, 500, 1300], [380, 400, 420], "incomplete", "+300.0"),  # a mean far above theirs, and unknown
        ([10, 60, 110], [380, 400, 420], "FAIL", "-340.0"),
        ([100, 110, 120], [115, 125, 135], "pass", "-15.0"),
        ([100, 110, 120], [125, 135, 145], "FAIL", "-25.0"),  # their intervals overlap, and yet it is below
        ([-150, -300, -100], [-140, -141, -142], "incomplete", "-42.3"),
    ):
        (verdict,) = study.judge(kept(study, ours, theirs))
        assert verdict.outcome == outcome
        assert f"less sb3/sac's {told} [" in verdict.measured
        assert "none below sb3/sac's shown" in verdict.claim
    alone = Study("sac", "Hopper-v5", 50_000, [0], baseline="sb3/sac")
    assert alone.judge(kept(alone, [100], [1]))[0].outcome == "incomplete"  # one seed has no interval


def entries_of(kind):
    return [entry for row in rows() for entry in entries(row) if isinstance(entry, kind)]


def test_both_sides_of_a_study_are_told_the_same():
    for study in entries_of(Study):
        ours, theirs = (study.command(row, 0) for row in study.contenders())
        assert [o for o in ours if o != study.row] == [o for o in theirs if o != study.baseline]


def test_the_table_says_what_is_missing(tmp_path):
    assert "6 runs to go" in table(tmp_path)
    (tmp_path / "ddpg.json").write_text(json.dumps({}))
    for study in entries("ddpg"):
        found = json.loads((tmp_path / "ddpg.json").read_text()) | kept(study, [-100, -110, -120], [-100, -110, -120])
        (tmp_path / "ddpg.json").write_text(json.dumps(found))
    text = table(tmp_path)
    assert "**FAIL**" in text  # 950 is not reached
    assert "Over these 2 studies" in text
    assert "| `ddpg` | -Q | box | replay | full | objective | **[3 of 4 hold](#ddpg)** |" in text
    assert "| `td3` | -Q, of the first critic | box | replay | full | objective | [not measured yet](#td3) |" in text


def test_what_is_stored_is_found_by_the_present_names():
    results = Path(__file__).parent.parent / "docs" / "results"
    for row in rows():
        whole = [entry for entry in entries(row) if not isinstance(entry, Ledger | Sooner)]  # measured over days, and say so
        assert not [entry.claim() for entry in whole if entry.waiting(reproduce._read(row, results))]
    assert (results / "README.md").read_text() == table(results)


def test_the_table_says_how_many_episodes_a_return_is_the_mean_of():
    """By the commands of what is stored."""
    results = Path(__file__).parent.parent / "docs" / "results"
    preface = table(results).partition("\n## ")[0]
    for row in rows():
        stored = reproduce._read(row, results)
        counts = {int(count) for key in stored for count in re.findall(r"eval_episodes=(\d+)", key)} - {10}
        counts |= {len(one) for run in stored.values() for one in run.get("populations", {}).values()}
        if counts:
            assert f"{row} {' or '.join(map(str, sorted(counts)))}" in preface
    assert "pets 2, poplin 2 or 5)" in preface


RACE = {
    "race": {"ours": ["sac", "utd=2"], "theirs": ["sb3/sac"], "third": ["sac"]},
    "env": "Pendulum-v1", "steps": 150, "seeds": [0, 1, 2], "targets": [-1000, 0], "every": 50,
    "ours": "ours", "baseline": "theirs", "limit": 0.5, "overrides": ["warmup_steps=50"],
}  # fmt: skip


def ran(race, contender, reached, seconds):
    """Runs that return -500 from evaluation `reached`, 0, 1 or 2, of each seed on, at so many seconds an evaluation."""
    return {
        race.key(contender, seed): {
            "seconds": 3 * seconds,
            "evaluations": [
                {"env_step": 50 * (i + 1), "time/seconds": seconds * (i + 1), "eval/return": -500.0 if i >= when else -1500.0}
                for i in range(3)
            ],
        }
        for seed, when in zip(race.seeds, reached, strict=True)
    }


def test_a_race_is_won_in_seconds_and_who_never_arrives_takes_forever():
    race = Race("race", **RACE)
    assert [v.passed for v in judge_both(race, [1, 0, 2], 1.0, [1, 1, 1], 4.0)] == [True]  # 2/8, 1/8, 3/8
    assert [v.passed for v in judge_both(race, [1, 1, 1], 4.0, [1, 1, 1], 1.0)] == [False]
    assert [v.passed for v in judge_both(race, [1, 9, 9], 0.1, [1, 1, 1], 4.0)] == [False]  # two of three never
    assert [v.passed for v in judge_both(race, [1, 1, 1], 9.0, [9, 9, 9], 1.0)] == [True]
    assert [v.passed for v in judge_both(race, [9, 9, 9], 1.0, [9, 9, 9], 1.0)] == [False]
    assert race.judge(ran(race, "ours", [1, 1, 1], 1.0)) == []


def judge_both(race, ours, our_seconds, theirs, their_seconds):
    return race.judge(ran(race, "ours", ours, our_seconds) | ran(race, "theirs", theirs, their_seconds))


def test_somebody_else_than_the_baseline_is_first_at_the_last_target():
    """Told once all have run; nobody is first where nobody arrives."""
    for third, seconds, targets, passed in (
        ([1, 1, 1], 1.0, [0, -1000], True),
        ([1, 1, 1], 2.0, [0, -1000], False),
        ([0, 0, 0], 1.0, [-1000, 0], False),
    ):
        race = Race("race", **RACE | {"targets": targets})
        kept = ran(race, "ours", [9, 9, 9], 1.0) | ran(race, "theirs", [0, 0, 0], 3.0) | ran(race, "third", third, seconds)
        first = race.judge(kept)[1]
        assert first.passed == passed, first
        assert first.threshold == "not theirs"


def test_the_table_of_a_race_marks_the_fastest_and_says_inf():
    race = Race("race", **RACE)
    kept = ran(race, "ours", [1, 1, 2], 1.0) | ran(race, "theirs", [0, 0, 0], 1.5) | ran(race, "third", [0, 9, 9], 1.0)
    del kept[race.key("theirs", 2)]
    lines = race.report(kept)
    assert lines[-2] == "| ours | `sac utd=2` | **2** | 100 | inf | inf | -500.0 | -833.3 | 50.0 |"
    assert lines[-1] == "| third | `sac` | inf | inf | inf | inf | -1500.0 | -1500.0 | 50.0 |"
    assert [task.key for task in race.due(kept)] == [race.key("theirs", 2)]
    assert "1 runs to go" in race.waiting(kept)


def test_a_race_through_the_command(tmp_path, monkeypatch, capsys):
    """Real runs in processes of their own, kept by command: a second call trains nothing."""
    small = {
        "seeds": [0], "targets": [-3000, 1], "limit": 1e9,
        "race": {"ours": ["sac", "num_envs=3", "compile=false"], "theirs": ["sb3/sac"]},
        "overrides": ["warmup_steps=50", "hidden=[8,8]", "batch_size=8", "eval_episodes=1", "threads=1"],
    }  # fmt: skip
    code = (
        "from rlamort.measure import reproduce as r; from rlamort.cli import main; from rlamort.measure.race import Race\n"
        f"real, race = r.entries, Race('race', **{RACE | small!r})\n"
        "r.entries = lambda row: [race] if row == 'race' else real(row)\n"
        "main(['reproduce', 'race', '--results', 'results'])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # nobody reaches the last target
    assert done.stdout.count("running: rlamort train") == 2
    assert "pass  training seconds to a return of -3000 on Pendulum-v1, seeds [0]: ours over theirs" in done.stdout
    race = Race("race", **RACE | small)
    monkeypatch.setattr(reproduce, "entries", lambda row: [race] if row == "race" else entries(row))
    assert [verdict.passed for verdict in reproduce.reproduce("race", tmp_path / "results")] == [True, False]
    assert "running" not in capsys.readouterr().out
    kept = json.loads((tmp_path / "results" / "race.json").read_text())
    assert list(kept) == [race.key(one, 0) for one in race.race]
    for run in kept.values():
        assert [one["env_step"] for one in run["evaluations"]] in ([50, 100, 150], [51, 102, 150])
        seconds = [one["time/seconds"] for one in run["evaluations"]]
        assert 0 < seconds[0] < seconds[1] < seconds[2] == run["seconds"]
    text = (tmp_path / "results" / "README.md").read_text()
    assert "### Fastest to a return on Pendulum-v1" in text
    assert (tmp_path / "results" / "race.png").stat().st_size > 10_000
    assert "| inf | inf |" in text


def test_contenders_of_races_are_rows_and_settings_that_exist():
    for race in entries_of(Race):
        assert {race.ours, race.baseline} <= set(race.race)
        for contender in race.race:
            _, row, *given = race.command(contender, 0)
            resolve(row, {key: yaml.safe_load(value) for key, value in (one.split("=", 1) for one in given)})


def two_claims():
    figure = Figure()
    figure.subplots().plot([1, 2])
    return Measured(
        [at_most("small", 1.0, 2.0, " s"), at_least("no number", float("nan"), 0.0)], {"found": [1.0]}, {"drawn": figure}
    )


def test_a_measured_claim_keeps_its_verdicts_data_and_figures(tmp_path):
    """A number that is none fails, whatever is asked of it."""
    claim = Claim("mine", "test_claims.two_claims")
    kept = {claim.measure: json.loads(json.dumps(claim.run(tmp_path)))}
    assert [(v.claim, v.measured, v.threshold, v.passed) for v in claim.judge(kept)] == [
        ("small", "1 s", "<= 2 s", True),
        ("no number", "nan", ">= 0", False),
    ]
    assert kept[claim.measure]["data"] == {"found": [1.0]}
    assert (tmp_path / "drawn.png").stat().st_size > 1_000
    assert claim.judge({}) == []
    assert claim.waiting({}) == "two_claims: not measured yet"
    assert claim.report(kept) == ["![drawn](drawn.png)"]


def test_a_slice_measures_only_what_is_missing(tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(
        Claim, "run", lambda claim, results: measured.append(claim.measure) or {"versions": {}, "verdicts": [], "figures": []}
    )
    monkeypatch.setattr(
        reproduce,
        "entries",
        lambda row: [Claim(row, f"test_claims.{one}") for one in ("first", "second")] if row == "race" else entries(row),
    )
    (tmp_path / "race.json").write_text(json.dumps({"test_claims.first": {"versions": {}, "verdicts": [], "figures": []}}))
    main(["reproduce", "race", "--results", str(tmp_path), "--minutes", "5"])
    assert measured == ["test_claims.second"]
    main(["reproduce", "race", "--results", str(tmp_path)])
    assert measured == ["test_claims.second", "test_claims.first", "test_claims.second"]


def test_a_claim_is_reported_only_where_a_bound_shows_that_none_can_pass():
    """Whatever the bound says, what passes passes, a number that is none fails, and a bound that was exceeded is none."""
    for value, most, outcome in (
        (4.0, 60.0, "reported"), (4.0, 100.0, "FAIL"), (4.0, 300.0, "FAIL"), (4.0, np.inf, "FAIL"), (4.0, np.nan, "FAIL"),
        (4.0, 3.0, "FAIL"), (np.nan, 60.0, "FAIL"), (100.0, 60.0, "pass"), (120.0, 300.0, "pass"),
    ):  # fmt: skip
        verdict = at_least("faster", value, 100, "x", most, "f twice at least")
        assert verdict.outcome == outcome, (value, most)
        assert verdict.passed == (outcome != "FAIL")
        assert (verdict.threshold == "") == (outcome == "reported")
        assert Verdict.read(json.loads(json.dumps(verdict.values()))) == verdict
    assert at_least("faster", 4.0, 100, "x").outcome == "FAIL"  # none is known
    assert at_least("faster", 4.0, 100, "x", 300.0, "f twice").limit == ">= 100x, within what is possible: at most 300x"
    told = str(at_least("faster", 4.0, 100, "x", 60.0, "f twice at least"))
    assert told.startswith(
        "reported  faster\n      measured 4x; threshold none: at most 60x, and 100x was asked: f twice at least"
    )


def test_what_a_claim_lacks_is_stored_with_it():
    verdict = Verdict("faster", "4x", ">= 3x", False, missing="an idle machine")
    assert verdict.outcome == "incomplete"
    assert Verdict.read(json.loads(json.dumps(verdict.values()))) == verdict


@pytest.mark.parametrize(
    "bound",
    [
        None, Bound(100.0, 100, "x", "why"), Bound(300.0, 100, "x", "why"), Bound(np.nan, 100, "x", "why"),
        Bound(-np.inf, 100, "x", "why"), Bound(60.0, 100, "x", ""),
    ],
)  # fmt: skip
def test_what_no_bound_proves_is_not_reported(bound):
    """Not by whoever makes a verdict, and not by whoever edits the data."""
    with pytest.raises(ValueError, match=r"no bound that would show|does not show that what is asked for is out of reach"):
        Verdict("faster", "4x", "", True, bound)
    if bound is not None:
        with pytest.raises(ValueError, match="does not show that what is asked for is out of reach"):
            Verdict.read(["faster", "4x", "reported", bound._asdict()])


@pytest.mark.parametrize(("threshold", "passed"), [(">= 100x", True), ("", False)])
def test_what_is_reported_neither_has_a_threshold_nor_fails(threshold, passed):
    with pytest.raises(ValueError, match="has no threshold, and neither passes nor fails"):
        Verdict("faster", "4x", threshold, passed, Bound(60.0, 100, "x", "why"))


def bounded(most):
    return Measured([at_most("small", 1.0, 2.0), at_least("faster", 4.0, 100, "x", most, "f twice at least")], {}, {})


def bound_below():
    """A bound that proves it."""
    return bounded(60.0)


def bound_above():
    """A bound that does not."""
    return bounded(300.0)


@pytest.mark.parametrize(
    ("measure", "code", "summary", "line"),
    [
        (
            "bound_below", 0, "- race: [1 of 1 hold, 1 reported](#race)",
            "| faster | none: at most 60x, and 100x was asked: f twice at least | 4x | reported |",
        ),
        (
            "bound_above", 1, "- race: **[1 of 2 hold](#race)**",
            "| faster | >= 100x, within what is possible: at most 300x | 4x | **FAIL** |",
        ),
    ],
)  # fmt: skip
def test_reproduce_exits_with_1_unless_a_bound_proves_the_claim_out_of_reach(
    measure, code, summary, line, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        reproduce, "entries", lambda row: [Claim(row, f"test_claims.{measure}")] if row == "race" else entries(row)
    )
    left = 0
    try:
        main(["reproduce", "race", "--results", str(tmp_path)])
    except SystemExit as exit:
        left = exit.code
    assert left == code
    assert ("reported  faster" in capsys.readouterr().out) == (code == 0)
    text = (tmp_path / "README.md").read_text()
    assert summary in text
    assert line in text
    kept = json.loads((tmp_path / "race.json").read_text())[f"test_claims.{measure}"]["verdicts"]
    assert [("reported" in one, True in one) for one in kept] == [(False, True), (code == 0, False)]


def test_what_was_measured_before_its_module_moved_is_still_its_own(tmp_path):
    for row, former in (("sphere", "rlamort.claims.sphere."), ("anytime", "rlamort.claims.anytime.pendulum_")):
        *_, last = entries(row)
        found = former + last.measure.rpartition(".")[2].removeprefix("early_")
        (tmp_path / f"{row}.json").write_text(
            json.dumps({found: {"versions": {}, "verdicts": [[f"near {row}", "1", "<= 2", True]], "figures": []}})
        )
        assert f"| near {row} | <= 2 | 1 | pass |" in table(tmp_path)


def test_notes_of_rows_stand_below_their_claims(tmp_path):
    text = table(tmp_path)
    for row in ("sphere", "maxq", "lista"):
        note = reproduce._declared(row)["note"].strip()
        assert note in text.partition(f"\n## {row}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(("starts", "outcome"), [((4, 8), "reported"), ((64,), "FAIL")])
def test_no_choice_on_the_sphere_beats_descent_by_more_than_their_evaluations(starts, outcome, monkeypatch):
    """Seconds are counted here in points at which f is evaluated; the least is that of f at two points an item."""
    torch.manual_seed(0)
    problem = Sphere()
    evaluated, real = [0], problem.cost

    def cost(y, x):
        evaluated[0] += len(y)
        return real(y, x)

    def count(call, repeats):
        call()  # the warm one
        before = evaluated[0]
        call()
        return evaluated[0] - before

    problem.cost = cost
    monkeypatch.setattr(sphere, "least_seconds", count)
    monkeypatch.setattr(sphere, "STARTS", starts)
    f, x = Cost(problem), problem.layout.pack(problem.contexts(20))
    low = sphere.global_minimum(f, x)
    off = torch.nn.functional.normalize(low + 0.02 * torch.randn_like(low), dim=-1)

    def act(x, explore):
        f(off[: len(x)], x)
        f(off[: len(x)], x)
        return off[: len(x)]

    goals = {sphere.OURS: f(off, x).mean().item() + sphere.SLACK, sphere.LOWEST: f(low, x).mean().item() + sphere.SLACK}
    walked = sphere.walk(f, x, goals)
    assert all(walked[sphere.OURS][n] <= k for n, k in walked[sphere.LOWEST].items())
    for size in (1, 20):
        verdict, told = sphere.speed("squared distance", SimpleNamespace(act=act), f, x[:size], walked)
        needed = {goal: min(n * (k + 1) for n, k in reached.items()) for goal, reached in walked.items()}  # the first takes two
        assert needed[sphere.OURS] < needed[sphere.LOWEST]
        assert verdict.measured == f"{needed[sphere.OURS] / 2:.4g}x"
        assert verdict.outcome == outcome
        assert f"at most {needed[sphere.LOWEST] / 2:.4g}x" in verdict.limit
        assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_every_claim_names_a_function():
    for entry in entries_of(Claim):
        assert callable(locate(entry.measure))


def test_interquartile_mean_and_bootstrap_on_known_values():
    assert iqm(np.array([0.0, 1, 2, 3, 4, 5, 6, 100])) == pytest.approx(3.5)
    groups = [np.full(3, 1.0), np.full(3, 2.0)]
    assert stratified_bootstrap(groups, iqm) == (1.5, 1.5, 1.5)  # drawn within groups: their shares never change
    made = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        low, high = stratified_bootstrap([made.normal(0, 1, 30), made.normal(0, 1, 30)], iqm, draws=300)[1:]
        covered += low <= 0 <= high
    assert covered >= 50  # of 60 intervals of 95 %
    assert interval([1.0, 2.0, 3.0]).high == pytest.approx(2 + 4.302653 / np.sqrt(3))


@pytest.mark.parametrize("algorithm", ["sac", "td3", "ddpg"])
def test_the_bound_counts_the_products_that_an_update_does(algorithm):
    """Against torch's own counter; products with one column are sums there, and are left out on both sides."""
    spec = Spec(17, [-1.0] * 6, [1.0] * 6)
    ddpg = functools.partial(TD3, critic=Critics(1), smoothing_noise=0.0, actor_delay=1)
    kind = {"sac": SAC, "td3": TD3, "ddpg": ddpg}[algorithm]
    agent = kind(spec, hidden=(48, 48))
    improves = [False, True] if algorithm == "td3" else [True]
    with FlopCounterMode(display=False) as counter:
        for improve in improves:
            agent.update(batch_for(agent, 32), improve)
    counted = speed.products(algorithm, batch=32, h=48)
    flops = sum(share * 2 * c * m * k * n for share, (c, m, k, n) in counted if 1 not in (m, k, n))
    assert counter.get_total_flops() == pytest.approx(flops * len(improves), rel=1e-6)


def test_the_bound_is_a_rate():
    torch.set_num_threads(1)
    small, large = (speed.bound(speed.products("sac", 64, width), seconds=0.3) for width in (64, 256))
    assert 0 < large < small


@pytest.mark.parametrize("library", ["rlamort", "sb3"])
def test_a_contestant_measures_itself(library, tmp_path):
    code = (
        "from rlamort.measure import speed_worker as c; import json\n"
        "c.WARM, c.TIMED, c.UPDATES, c.ACTIONS = 1010, 20, 4, 5\n"
        f"print(json.dumps(c.measure({library!r}, 'td3', 'Pendulum-v1', 1)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(value > 0 for key, value in found.items() if key != "first_updates_s")
    assert found["replay_bytes_per_transition"] == {"rlamort": 4 * 5 + 7, "sb3": 4 * (2 * 3 + 1 + 1 + 1 + 1)}[library]


@pytest.mark.slow
def test_a_profile_knows_the_parts_of_an_update_by_the_names_that_the_compiler_gives_them(tmp_path):
    code = (
        "import json; from rlamort.measure import speed\n"  # of its own: it changes how everything is compiled
        "print(json.dumps(speed.profile('sac', 'Pendulum-v1', updates=4).data['update_us']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(taken > 0 for taken in json.loads(done.stdout.splitlines()[-1]).values())


class Ticking:
    """Two environments side by side with a reward of 1 for every step: one terminates after 3 steps, one is cut off after 4."""

    count = 2

    def reset(self, seed):
        self.time, self.x = 0, torch.zeros(2, 2)
        return self.x

    def step(self, y):
        self.time += 1
        self.x = torch.full((2, 2), float(self.time))
        ends = np.array([self.time == 3, False]), np.array([False, self.time == 4])
        return Step(self.x, torch.ones(2), *ends, np.ones(2, bool))


def test_what_critics_promise_is_compared_with_the_soft_return_that_follows(monkeypatch):
    """Entropies are of the actions after the first, an end is worth nothing, and what a time limit cuts off does not count."""
    agent = SAC(Spec(2, [-1.0], [1.0]), hidden=(4,), temperature=0.5)
    monkeypatch.setattr(overestimation, "REMAINDER", 0.3)  # 0.5^2: the cut-off episode's states with 2 steps left count
    logs, sample = [], agent.density.sample
    agent.density.sample = lambda lam: logs.append(sample(lam)) or logs[-1]
    with torch.no_grad():
        q, value = overestimation.play(agent, Ticking(), 0.5)
    bonus = [-0.5 * logq.double() for _, logq in logs]
    expected = {2: [1.0, np.nan]}
    for t in (1, 0):
        expected[t] = [1 + 0.5 * (expected[t + 1][0] + float(bonus[t + 1][0])), np.nan]
    cut = 1.0
    for t in (2, 1, 0):
        cut = 1 + 0.5 * (cut + float(bonus[t + 1][1]))
        expected[t][1] = cut
    np.testing.assert_allclose(value, np.concatenate([expected[t] for t in range(3)]))
    with torch.no_grad():
        found = -agent.action_cost()(logs[1][0], torch.full((2, 2), 1.0))
    np.testing.assert_allclose(q[2:4], found.numpy(), rtol=1e-6)


def test_a_failure_cuts_off_what_critics_are_compared_with_as_a_time_limit_does(monkeypatch):
    class Failing(Ticking):
        """The second fails where it was cut off, and says that this is an end."""

        def step(self, y):
            x, reward, terminated, truncated, valid, *_ = super().step(y)
            return Step(x, reward, terminated | truncated, np.zeros(2, bool), valid & ~truncated)

    agent = SAC(Spec(2, [-1.0], [1.0]), hidden=(4,), temperature=0.5)
    monkeypatch.setattr(overestimation, "REMAINDER", 0.3)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        expected = overestimation.play(agent, Ticking(), 0.5)
        torch.manual_seed(0)
        found = overestimation.play(agent, Failing(), 0.5)
    np.testing.assert_array_equal(found, expected)


class Valley(Critic):
    """Q(x, y) = -(y - x)^2, of two members alike."""

    def __init__(self):
        super().__init__(1, 1, (1,), 2)

    def forward(self, x, y, members=None):
        return -(y - x).square().sum(-1).expand(2, -1)


def test_learned_steps_are_judged_by_what_they_leave_of_the_direct_policys_gap(monkeypatch):
    torch.manual_seed(0)
    for name, small in {"SCORED": 8, "ASKED": 4, "SEARCHED": 25}.items():
        monkeypatch.setattr(iapo, name, small)
    density, x = SquashedGaussian(1), torch.linspace(-0.8, 0.8, 8)[:, None]
    setting = Setting(density.parameters, 1, (4,))
    direct = Middle()(setting)  # the prior, for every state
    on = iapo.Frozen(Soft(MaxQ(Valley()), density, Temperature(0.01)), direct, setting, x, x)
    with torch.no_grad():
        best, worst = iapo.search(on, [on.prior(), on.prior()]), torch.full((8, 2), 1.5)
    begun = [on.prior(), *[best] * (iapo.LONGER - 1)]
    paths = {iapo.PRIOR: torch.stack([*begun, best]), iapo.POLICY: torch.stack([*begun, worst])}
    found = iapo.judged("Valley-v0", 5, on, direct, paths)
    assert [one.passed for one in found.verdicts] == [True, True, True, True, True, False]
    assert min(min(after) for after in found.data["gap after k steps"].values()) >= 0
    still = {who: torch.stack([on.prior()] * (iapo.LONGER + 1)) for who in paths}
    assert [one.passed for one in iapo.judged("Valley-v0", 5, on, direct, still).verdicts] == [False, False, True] * 2


def test_whoever_learns_on_a_frozen_critic_asks_it_equally_often(monkeypatch):
    """The direct policy; steps from the prior; and a policy of half of that together with the steps that begin in it."""
    for name, small in {"SCORED": 4, "ASKED": 2, "SEARCHED": 2, "UPDATES": 4, "LONGER": 6, "BATCH": 3}.items():
        monkeypatch.setattr(iapo, name, small)
    torch.manual_seed(0)
    critic, density, x = Valley(), SquashedGaussian(1), torch.linspace(-0.8, 0.8, 8)[:, None]
    setting = Setting(density.parameters, 1, (4,))
    on = iapo.Frozen(Soft(MaxQ(critic), density, Temperature(0.01)), Full()(setting), setting, x, x)
    monkeypatch.setattr(iapo, "critic_of", lambda env, steps: on)
    rows, asked, learned, real = [0], [], [], iapo.learn
    forward = critic.forward

    def counting(x, y, members=None):
        rows[0] += y[..., 0].numel()
        return forward(x, y, members)

    def learn(model, *arguments):
        before = rows[0]
        begun = {name: value.clone() for name, value in model.state_dict().items()}
        found = real(model, *arguments)
        asked.append(rows[0] - before)
        learned.append((begun, {name: value.clone() for name, value in found.state_dict().items()}))
        return found

    critic.forward = counting
    monkeypatch.setattr(iapo, "learn", learn)
    found = iapo.measured("Valley-v0", 9)
    direct, prior, half, steps = asked
    assert direct == prior == half + steps
    assert half == steps
    ended, begun = learned[2][1], learned[3][0]
    for name, value in ended.items():
        assert torch.equal(begun[f"init.{name}"], value)
        assert torch.equal(learned[2][0][name], learned[0][0][name])  # from the policy that was trained with the critic
    assert any(iapo.POLICY in verdict.claim and iapo.DIRECT in verdict.claim for verdict in found.verdicts)
