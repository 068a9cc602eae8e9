"""Claims and measurements: what `rlamort reproduce` and `rlamort bench` say follows from the numbers."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rlamort.agents.sac import SAC
from rlamort.agents.td3 import TD3
from test_laws import batch_for
from torch.utils.flop_counter import FlopCounterMode

from rlamort import speed
from rlamort.config import locate
from rlamort.env import Spec
from rlamort.reproduce import Claim, Study, _measure, entries, judge, judged, rows, studies, table
from rlamort.score import interval, iqm, stratified_bootstrap
from rlamort.verdict import Measured, at_least, at_most


def kept(study, ours, theirs):
    """Runs whose last evaluations are these."""
    return {
        study.key(row, seed): {"evaluations": [{"eval/return": -500.0}, {"eval/return": value}]}
        for row, values in zip(study.contenders(), (ours, theirs), strict=False)
        for seed, value in zip(study.seeds, values, strict=True)
    }


def test_a_threshold_must_be_reached_by_every_seed():
    study = Study("sac", "Pendulum-v1", 20_000, [0, 1, 2], threshold=-200)
    assert [v.passed for v in judge(study, kept(study, [-150, -199, -200], []))] == [True]
    assert [v.passed for v in judge(study, kept(study, [-150, -201, -100], []))] == [False]


def test_a_baseline_must_not_lie_wholly_above():
    study = Study("sac", "Hopper-v5", 50_000, [0, 1, 2], baseline="sb3/sac")
    assert judge(study, kept(study, [100, 110, 120], [115, 125, 135]))[0].passed  # intervals overlap
    assert judge(study, kept(study, [200, 210, 220], [1, 2, 3]))[0].passed  # ours lies above
    assert not judge(study, kept(study, [100, 101, 102], [200, 201, 202]))[0].passed


def test_both_sides_of_a_study_are_told_the_same():
    for study in (study for row in rows() for study in studies(row)):
        ours, theirs = (study.command(row, 0) for row in study.contenders())
        assert [o for o in ours if o != study.row] == [o for o in theirs if o != study.baseline]


def test_the_table_says_what_is_missing(tmp_path):
    assert "6 runs to go" in table(tmp_path)
    (tmp_path / "ddpg.json").write_text(json.dumps({}))
    for study in studies("ddpg"):
        found = json.loads((tmp_path / "ddpg.json").read_text()) | kept(study, [-100, -110, -120], [-100, -110, -120])
        (tmp_path / "ddpg.json").write_text(json.dumps(found))
    text = table(tmp_path)
    assert "**FAIL**" in text  # 950 is not reached
    assert "Over these 2 studies" in text


def two_claims():
    figure = Figure()
    figure.subplots().plot([1, 2])
    return Measured(
        [at_most("small", 1.0, 2.0, " s"), at_least("no number", float("nan"), 0.0)], {"found": [1.0]}, {"drawn": figure}
    )


def test_a_measured_claim_keeps_its_verdicts_data_and_figures(tmp_path):
    """A number that is none fails, whatever is asked of it."""
    claim = Claim("mine", "test_claims.two_claims")
    kept = {claim.measure: json.loads(json.dumps(_measure(claim, tmp_path)))}
    assert [(v.claim, v.measured, v.threshold, v.passed) for v in judged(claim, kept)] == [
        ("small", "1 s", "<= 2 s", True),
        ("no number", "nan", ">= 0", False),
    ]
    assert kept[claim.measure]["data"] == {"found": [1.0]}
    assert (tmp_path / "drawn.png").stat().st_size > 1_000
    assert judged(claim, {}) == []


def test_every_claim_names_a_function():
    for entry in (entry for row in rows() for entry in entries(row) if isinstance(entry, Claim)):
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
    ddpg = functools.partial(TD3, critics=1, smoothing_noise=0.0, actor_delay=1)
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
        "from rlamort import contestant as c; import json\n"
        "c.WARM, c.TIMED, c.UPDATES, c.ACTIONS = 1010, 20, 4, 5\n"
        f"print(json.dumps(c.measure({library!r}, 'td3', 'Pendulum-v1', 1)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(value > 0 for key, value in found.items() if key != "first_updates_s")
    assert found["replay_bytes_per_transition"] == {"rlamort": 4 * 5 + 7, "sb3": 4 * (2 * 3 + 1 + 1 + 1 + 1)}[library]
