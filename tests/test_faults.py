"""Faults of environments and agents, in real runs: what is forgiven, what is dropped, what is said, what is kept."""

import json
import re
import shutil
import warnings

import numpy as np
import odd_envs
import pytest
import torch
from test_cli import HERE, QUICK, rlamort

import rlamort as ra
from rlamort.env.make import open_env
from rlamort.errors import Diverged, Fault
from rlamort.measure.slices import evaluations
from rlamort.run.checkpoint import Checkpoints
from rlamort.run.learner import learner_class
from rlamort.run.track import last_evaluation, read_records
from rlamort.score import Score, score
from rlamort.source import Replay

SMALL = {"hidden": [16, 16], "warmup_steps": 50, "batch_size": 16, "buffer_size": 5_000, "device": "cpu"}


WORKERS = {"sync": {}, "async": {"workers": 2}}


def transitions(ring):
    batch = ring.sample(5_000)
    return batch.x, batch.x_next, batch.reward


@pytest.mark.parametrize("kind", ["Flaky", "FlakyNumbers"])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_failing_step_is_dropped_counted_and_the_episode_ends(kind, vectorization):
    env = open_env(getattr(odd_envs, kind), count=2, max_faults=1000, vectorization=vectorization)
    env.reset(0)
    ring, episodes = Replay(env, buffer_size=5_000), []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(400):
            episodes += ring.collect(lambda: torch.zeros(2, 1)).episodes
    env.close()
    assert env.faults == len([w for w in said if "a new episode begins" in str(w.message)]) >= 4
    assert 800 - 2 * env.faults <= ring.collected < 800
    x, x_next, reward = transitions(ring)
    assert (x_next - x).unique().tolist() == [1]  # within one episode, always
    assert reward.unique().tolist() == [1]
    assert {e.length for e in episodes} == {20}  # only whole episodes are reported


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_episode_that_fails_has_no_return_and_is_counted(vectorization, rows):
    """Five steps at 1 each, or none where an exception hides the last, would be better than any whole episode."""
    env = open_env(odd_envs.Fragile, count=rows, max_faults=1000, vectorization=vectorization)
    agent = ra.TD3(odd_envs.Good, **SMALL).agent
    with pytest.warns(UserWarning, match="a new episode begins"):
        found = score(agent, env, seed=0, episodes=8)
    env.close()
    breaks = [np.random.default_rng(seed).random() < 0.5 for seed in range(8)]
    failed = sum(breaks)
    assert 1 < failed < 7
    np.testing.assert_array_equal(found.returns, [np.nan if one else -20.0 for one in breaks])
    assert found.lengths == [5 if one else 20 for one in breaks]
    assert found.values() == {
        "eval/return": -20.0, "eval/length": 20.0, "eval/low": -20.0, "eval/high": -20.0,
        "eval/returns": [-20.0] * (8 - failed), "eval/failed": failed,
    }  # fmt: skip
    with pytest.raises(Fault, match=f"the environment failed in {failed} of 8 episodes; all are needed"):
        found.whole()


def test_a_score_without_failures_says_nothing_of_them():
    found = Score([1.0, 2.5], [3, 4])
    assert list(found.values()) == ["eval/return", "eval/length", "eval/low", "eval/high", "eval/returns"]
    assert found.whole() == [1.0, 2.5]
    assert Score([1.0], [3]).values() == {"eval/return": 1.0, "eval/length": 3.0, "eval/returns": [1.0]}
    assert Score([np.nan], [3]).values() == {"eval/failed": 1}


GAPPED = """
import torch
import rlamort as ra

class Gapped(ra.Problem):
    "Everything costs 1, but `failing` of 10 contexts that are held out have no answer."

    domain = ra.Box([0.0], [1.0])

    def __init__(self, failing):
        super().__init__()
        self.failing = failing

    def contexts(self, count):
        return torch.rand(count, 1)

    def held_out(self, count):
        return torch.where(torch.arange(count)[:, None] % 10 < self.failing, -1.0, 1.0)

    def cost(self, y, x):
        return torch.where(x[:, 0] < 0, torch.inf, 1 + 0 * y.sum(-1))
"""


def test_contexts_without_an_answer_are_in_no_mean_and_are_counted(tmp_path):
    (tmp_path / "my_module.py").write_text(GAPPED)
    small = ["hidden=[8]", "batch_size=16", "eval_episodes=10", "steps=40", "eval_every=20", "device=cpu", "compile=false"]
    runs = {}
    for failing in (0, 4, 10):
        given = ["env=my_module:Gapped", f"env_kwargs.failing={failing}", *small, f"dir={failing}"]
        runs[failing] = rlamort("train", "amortize", *given, cwd=tmp_path)
    records = {n: [r for r in read_records(tmp_path / str(n)) if any("eval" in key for key in r)] for n in runs}
    assert [r["env_step"] for r in records[10]] == [20, 40]
    assert all(r == {"env_step": r["env_step"], "eval/failed": 10} for r in records[10])
    assert all(r["eval/cost"] == 1 and r["eval/return"] == -1 and r["eval/failed"] == 4 for r in records[4])
    assert all("eval/failed" not in r and r["eval/returns"] == [-1] * 10 for r in records[0])
    assert "step 20: mean cost 1 [1, 1], lower is better\n" in runs[0].stdout
    assert "step 20: mean cost 1 [1, 1], lower is better; 4 of 10 failed\n" in runs[4].stdout
    assert "step 40: evaluation undefined; 10 of 10 failed\n" in runs[10].stdout
    assert "curve: none is drawn: 10: no evaluation with a return has been recorded yet\n" in runs[10].stdout
    assert "step 40: the evaluation is undefined, since all of its 10 episodes failed" in runs[10].stderr
    scores = [last_evaluation(tmp_path / str(n)) for n in runs]
    assert [score and score.mean for score in scores] == [1, 1, None]
    said = rlamort("eval", "4", cwd=tmp_path).stdout
    assert "mean cost, lower is better: 1, 95 % interval [1, 1] over 6 contexts; 4 of 10 failed, and are left out" in said
    assert "failed" not in rlamort("eval", "0", cwd=tmp_path).stdout
    refused = rlamort("eval", "10", cwd=tmp_path, code=3)
    assert "rlamort: 10: its evaluation is undefined, since all of its 10 episodes failed" in refused.stderr


def test_a_score_is_the_last_evaluations_alone(tmp_path):
    """A sweep must not take a run for what it was before its answers failed, nor a claim for one over other episodes."""
    records = [{"env_step": 10, "eval/return": 5.0}, {"env_step": 20, "eval/failed": 3}, {"env_step": 30, "train/return": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    assert last_evaluation(tmp_path) is None
    assert evaluations(records[:1], tmp_path) == records[:1]
    with pytest.raises(Fault, match="its evaluation at step 20 lost 3 episodes to failures of the environment"):
        evaluations(records, tmp_path)


def test_beyond_the_limit_the_run_ends_with_what_was_raised():
    env = open_env(odd_envs.Flaky, max_faults=2)
    env.reset(0)

    def play():
        for _ in range(1000):
            env.step(torch.zeros(1, 1))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(
            Fault, match="RuntimeError: the robot fell apart; that is failure 3, and max_env_faults=2 are allowed"
        ):
            play()
    assert len(said) == 2


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_worker_is_replaced_and_training_goes_on(how, tmp_path):
    kwargs = {"once": str(tmp_path / "once"), "how": how}
    agent = ra.TD3(
        odd_envs.Dies, env_kwargs=kwargs, num_envs=2, vectorization="async", env_timeout=3.0, **SMALL
    )  # fmt: skip
    reason = "died" if how == "dies" else "took more than 3 s"
    with pytest.warns(UserWarning, match=rf"index [01]: a worker process {reason}; a new episode begins"):
        agent.learn(400)
    agent.close()
    assert agent.clock.env_step in (400, 401)  # two at a time, but for one that was lost
    x, x_next, _ = transitions(agent.source)
    assert (x_next - x).unique().tolist() == [1]


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_only_the_environments_of_a_lost_worker_end_their_episodes(how, tmp_path):
    """Five in two workers: those of the other one play what they play where nothing is lost."""

    def play(once):
        limits = {"env_kwargs": {"once": str(once), "how": how}, "max_faults": 1, "timeout": 3.0}
        env = open_env(odd_envs.SecondDies, count=5, vectorization="async", workers=2, **limits)
        env.reset(0)
        steps = [env.step(torch.zeros(5, 1)) for _ in range(45)]
        following = env.x.clone()
        env.close()
        return steps, following, env.faults

    (tmp_path / "never").touch()
    expected, _, none = play(tmp_path / "never")
    with pytest.warns(UserWarning, match=r"index 0, 1, 2: a worker process (died|took more than 3 s); a new episode begins"):
        found, following, faults = play(tmp_path / "once")
    assert (none, faults) == (0, 1)
    (at,) = [i for i, step in enumerate(found) if not step.valid.all()]
    lost = ~found[at].valid
    assert lost.tolist() == [True, True, True, False, False]
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(np.asarray(a)[~lost], np.asarray(b)[~lost]) for a, b in zip(one[:5], other[:5], strict=True))
    assert found[at].over.tolist() == lost.tolist()
    assert (found[at + 1].x_next[torch.from_numpy(lost)] == 1).all()  # the first step of a new episode
    assert following.isfinite().all()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_reset_that_raises_ends_the_run_with_what_was_raised(vectorization):
    env = open_env(odd_envs.ResetsThrice, count=3, vectorization=vectorization, **WORKERS[vectorization])
    env.reset(0)

    def play():
        for _ in range(100):
            env.step(torch.zeros(3, 1))

    with pytest.raises(Fault, match="env ResetsThrice: it raised at step 61: RuntimeError: three episodes are enough"):
        play()
    env.close()


def test_faults_survive_a_resume(tmp_path):
    from test_resume import assert_equal, everything

    from rlamort.errors import Preempted
    from rlamort.run.restore import resume

    fields = {**SMALL, "max_env_faults": 1000, "steps": 300, "checkpoint_every": 1000}
    shutil.copy(HERE / "odd_envs.py", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = ra.TD3("odd_envs:Flaky", dir=str(tmp_path / "whole"), **fields).learn(300)
        broken = ra.TD3("odd_envs:Flaky", dir=str(tmp_path / "broken"), **fields)
        with pytest.raises(Preempted):
            broken.learn(300, stop=lambda: broken.clock.env_step >= 211)
        broken.close()
        again, exactness = resume(tmp_path / "broken", {})
        again.learn(300 - again.clock.env_step, reset_num_timesteps=False)
    assert exactness == "exact"
    assert whole.source.env.faults > 0
    assert_equal(everything(whole), everything(again))


def test_a_checkpoint_never_holds_nan(tmp_path):
    learner = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **SMALL).learn(100)
    with torch.no_grad():
        learner.agent.critic.ensemble.layers[0].weight[0, 0, 0] = float("nan")
    with pytest.raises(ra.Fault, match=r"critic.ensemble.layers.0.weight is no longer finite"):
        learner.durable.save()
    assert all(t.isfinite().all() for t in ra.load(tmp_path / "run").agent.state_dict().values())
    learner.agent.register_buffer("begun", torch.tensor([True, False]))  # of whatever kind
    report = json.loads(learner.durable.report_nan(ra.Fault("it diverged")).read_text())
    assert report["tensors"]["begun"] == {"finite": True, "largest": 1.0}
    assert not report["tensors"]["critic.ensemble.layers.0.weight"]["finite"]


def test_divergence_stops_with_a_report_and_the_last_good_agent(tmp_path):
    shutil.copy(HERE / "odd_envs.py", tmp_path / "my_module.py")
    common = ["env=my_module:BreaksTheAgent", "steps=3000", "checkpoint_every=10", "log_every=20", "eval_every=10000", *QUICK]
    done = rlamort("train", "td3", *common, "dir=run", cwd=tmp_path, code=3)
    assert re.search(r"rlamort: .*(nan|inf|no longer finite).*diverged", done.stderr)
    (report,) = (tmp_path / "run" / "nan_report").iterdir()
    assert '"finite": false' in report.read_text()
    kept = Checkpoints(tmp_path / "run" / "ckpt").newest()
    assert kept is not None
    assert "return" in rlamort("eval", "run", "--episodes", 1, cwd=tmp_path).stdout
    again = rlamort("train", "td3", *common, "dir=again", "on_nan=retry", "learning_rate=0.01", cwd=tmp_path, code=3)
    assert "retrying from the newest checkpoint, with learning_rate=0.005" in again.stdout
    assert np.isfinite(kept.state["clock"]["env_step"])


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Flaky", r"step \d+: it raised RuntimeError: the robot fell apart"),
        ("FlakyNumbers", r"step \d+: it returned .*nan.*"),
    ],
)
def test_an_environment_that_fails_ends_the_training_of_stable_baselines3(kind, message, vectorization):
    """It would learn from NaN, and an exception would end in a traceback."""
    if vectorization == "async":  # which says it on its way out
        message = "a worker process ended, for the reason that it said"
    fields = {"warmup_steps": 2_000, "num_envs": 2, "vectorization": vectorization, "device": "cpu", "hidden": (8,)}
    learner = learner_class("sb3/td3")(getattr(odd_envs, kind), **fields)
    with pytest.raises(Fault, match=f"env .*{kind}.*{message}; in training, Stable-Baselines3 needs an environment without"):
        learner.learn(1_000)
    learner.close()


def test_a_loss_of_stable_baselines3_that_is_not_finite_is_said(tmp_path):
    fields = {"warmup_steps": 10, "batch_size": 8, "hidden": (8,), "log_every": 20, "device": "cpu", "eval_episodes": 1}
    learner = learner_class("sb3/td3")(odd_envs.Good, dir=str(tmp_path / "run"), **fields)
    learner.learn(5)
    learner.source.model.critic.load_state_dict({k: v * torch.nan for k, v in learner.source.model.critic.state_dict().items()})
    with pytest.raises(Diverged, match=r"train/critic_loss is nan at update \d+, environment step 20"):
        learner.learn(40, reset_num_timesteps=False)
    learner.close()
