"""The Python interface: learn, predict, save, load, and what it promises about seeds."""

import itertools
import json
import math
import struct
import subprocess
import sys
from fractions import Fraction

import gymnasium
import numpy as np
import odd_envs
import pytest
import torch
from conftest import Identity
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

import rlamort as ra
from rlamort.config import methods, rational
from rlamort.run.learner import learner_class
from rlamort.run.track import read_records
from rlamort.train import Clock

OURS = ["sac", "td3", "ddpg"]
SMALL = {"hidden": [32, 32], "warmup_steps": 100, "batch_size": 32, "buffer_size": 10_000, "device": "cpu"}


@pytest.mark.parametrize("method", OURS)
def test_every_agent_solves_the_identity_problem(method):
    """Best return 0; a uniformly random policy gets about -54 in these units of [-3, 5]."""
    fields = {**SMALL, "learning_rate": 3e-3, "discount": 0.5, "batch_size": 64}
    agent = learner_class(method)(Identity, seed=1, **fields).learn(1_500)
    assert np.mean(agent.score(20).returns) > -1.0


@pytest.mark.parametrize("method", OURS)
def test_same_seed_same_agent_whatever_runs_beside_it(method):
    def learn(disturb):
        agent = learner_class(method)("Pendulum-v1", seed=3, **SMALL)
        agent.learn(150)
        if disturb:
            torch.rand(17)
            learner_class(method)("Pendulum-v1", seed=9, **SMALL).learn(120)
        return agent.learn(100, reset_num_timesteps=False).agent.state_dict()

    one, other = learn(False), learn(True)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_seeds_differ():
    first, second = (ra.SAC("Pendulum-v1", seed=s, **SMALL).learn(50) for s in (0, 1))
    assert not torch.equal(first.source.y[:50], second.source.y[:50])
    assert not torch.equal(first.agent.model.net[0].weight, second.agent.model.net[0].weight)


def test_learning_leaves_the_users_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ra.TD3("Pendulum-v1", **SMALL).learn(110)
    assert torch.equal(torch.rand(3), expected)


def test_warm_up_is_random_and_without_updates():
    agent = ra.TD3("Pendulum-v1", **{**SMALL, "warmup_steps": 80, "update_after": 120})
    before = agent.agent.model.net[0].weight.clone()
    agent.learn(80)
    assert agent.source.y[:80].abs().mean() == pytest.approx(0.5, abs=0.1)  # uniform on [-1, 1]
    agent.learn(40, reset_num_timesteps=False)
    assert agent.source.y[81:120].abs().mean() < 0.4  # the untrained policy with its noise
    assert agent.clock.updates == 0
    agent.learn(10, reset_num_timesteps=False)
    assert agent.clock.updates == 10
    assert not torch.equal(before, agent.agent.model.net[0].weight)


@pytest.mark.parametrize(("num_envs", "utd"), [(1, 1), (1, 3), (4, 1), (4, 2), (1, 0.25), (4, 1 / 16), (20, 0.3), (1, "1/7")])
def test_utd_counts_updates_per_environment_step(num_envs, utd):
    agent = ra.DDPG("Pendulum-v1", **{**SMALL, "num_envs": num_envs, "utd": utd})
    agent.learn(140)
    assert agent.clock.env_step == 140
    assert agent.clock.updates == math.floor(40 * Fraction(utd).limit_denominator(100))
    assert agent.source.collected == 140


@pytest.mark.parametrize("utd", ["1", "3", "0.1", "0.3", "1/3", "1/48", "1/64", "0.015625", "7/5", "0.000001"])
@pytest.mark.parametrize("steps", [[1], [4], [16], [64], [64, 63, 0, 64, 61]], ids=str)
def test_updates_after_any_division_of_steps_are_exactly_their_floor(utd, steps):
    """Also as the float that YAML makes of it; each update has its number once, and none is early or late."""
    exact, count, numbers = rational(float(Fraction(utd))), 0, []
    assert exact == Fraction(utd)
    clock = Clock()
    for step in itertools.islice(itertools.cycle(steps), 1_000):
        due = clock.advance(exact, step)
        count, clock.updates, numbers = count + step, clock.updates + len(due), numbers + list(due)
        assert clock.updates == math.floor(Fraction(utd) * count)
        assert len(due) in (math.floor(exact * step), math.ceil(exact * step))  # few lengths of a round
    assert numbers == list(range(1, clock.updates + 1))


def test_a_fractional_utd_delays_the_policy_by_updates_and_plays_what_the_policy_would():
    """Between updates the same parameters act, as they do without any update."""
    agent = ra.TD3("Pendulum-v1", **SMALL, actor_delay=2, utd=0.25)
    agent.learn(100 + 37)
    assert agent.agent.critic_adam.steps.item() == 9
    assert agent.agent.model_adam.steps.item() == 4
    idle = [ra.TD3("Pendulum-v1", **SMALL, seed=2, **more) for more in ({"utd": 1e-6}, {"update_after": 10_000})]
    for one in idle:
        one.learn(150)
        assert one.clock.updates == 0
    assert torch.equal(idle[0].source.y[:150], idle[1].source.y[:150])


def test_learn_continues_or_counts_anew():
    agent = ra.SAC("Pendulum-v1", **SMALL).learn(30)
    assert agent.learn(30, reset_num_timesteps=False).clock.env_step == 60
    assert agent.learn(10).clock.env_step == 10
    assert agent.source.collected == 70


def test_td3_actor_is_delayed():
    agent = ra.TD3("Pendulum-v1", **SMALL, actor_delay=3)
    agent.learn(111)
    assert agent.agent.critic_adam.steps.item() == 11
    assert agent.agent.model_adam.steps.item() == 3


@pytest.mark.parametrize("method", [*OURS, "sb3/sac"])
def test_saved_and_loaded_agents_act_the_same(method, tmp_path):
    fields = {} if method.startswith("sb3") else {**SMALL, "normalise": True}
    agent = learner_class(method)("Pendulum-v1", seed=0, **fields).learn(130)
    agent.save(tmp_path / "kept")
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["agent.json", "agent.safetensors"]
    again = ra.load(tmp_path / "kept")
    observations = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    assert np.array_equal(
        agent.predict(observations, deterministic=True)[0], again.predict(observations, deterministic=True)[0]
    )
    state, other = agent.agent.state_dict(), again.agent.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert again.clock.env_step == 130


def test_a_loaded_agent_learns_on(tmp_path):
    ra.SAC("Pendulum-v1", **SMALL).learn(130).save(tmp_path / "kept")
    again = ra.SAC.load(tmp_path / "kept").learn(150, reset_num_timesteps=False)
    assert again.clock.env_step == 280
    assert again.agent.critic_adam.steps.item() == 30 + 50


def test_what_can_be_asked_of_an_agent_is_said():
    agent = ra.TD3("Pendulum-v1", **SMALL)
    with pytest.raises(ra.UserError, match="episodes=0"):
        agent.score(episodes=0)
    with pytest.raises(ValueError, match="observation: a dict given; an array of its parts in one"):
        agent.predict({"position": np.zeros(3)})
    agent.close()


def test_load_names_what_is_wrong(tmp_path):
    ra.TD3("Pendulum-v1", **SMALL).save(tmp_path / "kept")
    with pytest.raises(ra.UserError, match="an agent of td3, not of sac"):
        ra.SAC.load(tmp_path / "kept")
    with pytest.raises(ra.UserError, match="no agent is saved there"):
        ra.load(tmp_path / "nothing")
    (tmp_path / "model.zip").write_bytes(b"PK")
    with pytest.raises(ra.UserError, match="foreign format"):
        ra.load(tmp_path / "model.zip")
    tensors = tmp_path / "kept" / "agent.safetensors"
    whole = tensors.read_bytes()
    for damaged in (whole[:100], struct.pack("<Q", 2**60) + whole[8:], b""):
        tensors.write_bytes(damaged)
        with pytest.raises(ra.UserError, match="cannot be read as safetensors"):
            ra.load(tmp_path / "kept")
    tensors.write_bytes(whole)
    facts = json.loads((tmp_path / "kept" / "agent.json").read_text())
    facts["values"]["hidden"] = [16, 16]
    (tmp_path / "kept" / "agent.json").write_text(json.dumps(facts))
    with pytest.raises(ra.UserError, match="has shape"):
        ra.load(tmp_path / "kept")
    (tmp_path / "kept" / "agent.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(ra.UserError, match="format is 99; this rlamort reads format 1"):
        ra.load(tmp_path / "kept")


def test_stable_baselines3_evaluates_our_agent():
    agent = ra.SAC("Pendulum-v1", **SMALL)
    mean, _ = evaluate_policy(agent, Monitor(gymnasium.make("Pendulum-v1")), n_eval_episodes=2)
    assert -2000 < mean < 0


def test_evaluation_repeats_itself_and_leaves_the_normaliser_alone():
    agent = ra.SAC("Pendulum-v1", **SMALL, normalise=True).learn(120)
    before = agent.agent.normaliser.count.item()
    assert before == 120
    assert agent.score(4).returns == agent.score(4).returns
    assert agent.agent.normaliser.count.item() == before
    other = ra.SAC("Pendulum-v1", **{**SMALL, "seed": 8})
    other.agent = agent.agent
    assert other.score(4).returns == agent.score(4).returns  # episodes do not depend on the training seed


def test_score_is_the_return_of_whole_episodes():
    result = ra.TD3(odd_envs.Good, **SMALL).score(3)
    assert result.returns == [20.0] * 3
    assert result.lengths == [20] * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rat": 1}, "learning_rat: there is no such key. Did you mean learning_rate"),
        ({"steps": -5}, "steps=-5: a whole number >= 1 is needed"),
        ({"batch_size": 2.5}, "batch_size=2.5: a whole number >= 1"),
        ({"utd": 0}, "utd=0: a number >= 1e-06 is needed"),
        ({"utd": -1.5}, "utd=-1.5: a number >= 1e-06 is needed"),
        ({"utd": "1/0"}, "utd=1/0: a number >= 1e-06 is needed"),
        ({"discount": 1.5}, "discount=1.5: a number >= 0 and <= 1 is needed"),
        ({"learning_rate": "fast"}, "learning_rate=fast: a number > 0 is needed"),
        ({"hidden": 256}, "hidden=256: a list of a whole number >= 1 is needed"),
        ({"seed": True}, "seed=True: a whole number"),
        ({"vectorization": "threads"}, "vectorization=threads: sync, async is needed"),
        ({"compile": "maybe"}, "compile=maybe: auto or true or false is needed"),
        ({"device": "cuda"}, "device=cuda: this torch .* sees no CUDA device"),
        ({"device": "gpu"}, "device=gpu: auto, cpu, cuda or cuda:N is needed"),
        ({"device": "meta"}, "device=meta: auto, cpu, cuda or cuda:N is needed"),
        ({"device": "cpu:1"}, "device=cpu:1: auto, cpu, cuda or cuda:N is needed"),
        ({"device": "cuda:99"}, "device=cuda:99: .*(use device=cpu|there is no such GPU; allowed: auto, cpu, cuda:0)"),
        ({"buffer_size": 10**12}, "buffer_size=1000000000000: .* GiB"),
    ],
)
def test_bad_values_name_the_field_what_was_given_and_what_is_allowed(fields, message, monkeypatch):
    if fields.get("device") == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as on machines without one
    with pytest.raises(ra.UserError, match=message):
        ra.SAC("Pendulum-v1", **fields)


def test_unknown_names_come_with_their_neighbours():
    with pytest.raises(ra.UserError, match=r"env=HalfCheeta-v5: .*Did you mean HalfCheetah-v5"):
        ra.SAC("HalfCheeta-v5")
    with pytest.raises(ra.UserError, match=r"module 'odd_envs' has no 'Goood'. Did you mean Good"):
        ra.SAC("odd_envs:Goood")
    with pytest.raises(ra.UserError, match="no module 'no_such_module'"):
        ra.SAC("no_such_module:Env")


def test_a_run_directory_that_exists_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ra.UserError, match="it exists already"):
        ra.SAC("Pendulum-v1", dir=str(tmp_path))


def test_python_runs_leave_a_directory_when_asked(tmp_path):
    ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **SMALL, eval_every=60, eval_episodes=2, log_every=50).learn(130)
    records = read_records(tmp_path / "run")
    assert [r["env_step"] for r in records if "eval/return" in r] == [60, 120, 130]
    assert [r["env_step"] for r in records if "time/seconds" in r] == [50, 100]


def test_methods_of_both_libraries_leave_evaluations(tmp_path):
    theirs = {name: {"batch_size": 32, "warmup_steps": 20} for name in methods() if name.startswith("sb3")}
    theirs["sb3/ppo"].pop("warmup_steps")  # it has none
    for method, fields in {"sac": SMALL, **theirs}.items():  # tests/test_cuda.py runs all of ours
        agent = learner_class(method)("Pendulum-v1", **fields, dir=str(tmp_path / method), eval_every=2048, eval_episodes=1)
        agent.learn(60)
        assert any("eval/return" in record for record in read_records(tmp_path / method))


def test_importing_is_light():
    heavy = "wandb", "matplotlib", "hydra", "stable_baselines3", "torch"
    code = f"import rlamort, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    heavy = *heavy[:4], "torch._dynamo", "sympy", "scipy.stats"
    made = "rlamort.SAC('Pendulum-v1', hidden=(8,), compile=False)"
    code = f"import rlamort, sys; {made}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_environment_that_cannot_be_evaluated_in_says_so_before_training(tmp_path):
    with pytest.raises(ra.UserError, match=r"env=Locked: a second one is needed, .*cannot be copied.*; give eval_env"):
        ra.TD3(odd_envs.Locked(), dir=str(tmp_path / "run"), **SMALL)
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="env=Locked: a second one is needed"):
        agent = ra.TD3(odd_envs.Locked(), **SMALL).learn(100)
    with pytest.raises(ra.UserError, match="give eval_env"):
        agent.score(1)
    assert ra.TD3(odd_envs.Locked(), eval_env=odd_envs.Good, **SMALL).learn(100).score(1).returns == [20.0]


class Corners(ra.Problem):
    """A cost that has no derivative at its minimum, which lies in a corner of the box."""

    domain = ra.Box([-1.0] * 4, [1.0] * 4)

    def contexts(self, count):
        return torch.randint(2, (count, 4)) * 2.0 - 1

    def cost(self, y, x):
        return (y - x).norm(dim=-1)


def test_a_model_of_nan_is_neither_returned_nor_saved(tmp_path):
    with pytest.raises(ra.Fault, match=r"is no longer finite.*learning has diverged"):
        ra.amortize(Corners, model="semi", steps=300, hidden=[32, 32], threads=1)


def test_an_agent_that_diverges_says_so_when_learning_ends_and_is_not_saved(tmp_path):
    """Also in fewer steps than there are between two records."""
    agent = ra.SAC("Pendulum-v1", target_entropy=-1e38, **SMALL)
    with pytest.raises(ra.Fault, match=r"is no longer finite at environment step 160: learning has diverged"):
        agent.learn(160)
    with pytest.raises(ra.Fault, match="no longer finite"):
        agent.save(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_loss_that_was_not_finite_is_remembered_without_asking_the_device():
    from rlamort.agent import Adam, descend

    weight = torch.nn.Parameter(torch.zeros(()))
    adam = Adam([weight], 1e-3)
    descend(weight * 1.0, [weight], adam)
    assert adam.sound
    descend(weight * 0 + torch.inf, [weight], adam)  # a gradient of zero: nothing else tells
    assert weight.isfinite()
    descend(weight * 1.0, [weight], adam)
    assert not adam.sound


class Drawing(odd_envs.Good):
    """It draws from generators that everything in the process shares, also while it is made, and from its own space."""

    observation_space = gymnasium.spaces.Box(-10, 10, (2,), np.float32)

    def __init__(self):
        import random

        self.draw = (np.random.random, random.random, lambda: torch.rand(()).item())
        self.offset = sum(draw() for draw in self.draw)

    def observe(self):
        return np.array([self.offset, self.action_space.sample()[0] + sum(draw() for draw in self.draw)], np.float32)


@pytest.mark.parametrize(
    "rows", [{}, {"num_envs": 2}, {"num_envs": 2, "vectorization": "async"}], ids=["one", "two", "workers"]
)
def test_a_seed_reaches_every_generator_and_leaves_the_users_where_they_were(rows):
    import random

    def learn(seed):
        return ra.TD3(Drawing, seed=seed, **SMALL, **rows).learn(130)

    def users():
        return [np.random.random(), random.random(), torch.rand(()).item()]

    np.random.seed(0)
    random.seed(0)
    torch.manual_seed(0)
    expected = users()
    np.random.seed(0)
    random.seed(0)
    torch.manual_seed(0)
    first = learn(3)
    assert users() == expected
    users()
    second, third = learn(3), learn(4)
    state, same, other = (one.agent.state_dict() for one in (first, second, third))
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert not all(torch.equal(state[name], other[name]) for name in state)
    assert not torch.equal(first.source.x[:50], third.source.x[:50])
    for one in (first, second, third):
        one.close()


@pytest.mark.parametrize("env", [Drawing, "Pendulum-v1"])
def test_scoring_at_any_cadence_changes_nothing_and_gives_the_same_numbers(env, monkeypatch):
    """Also of an agent whose `act` draws when it does not explore."""
    from rlamort.agents import td3

    plain = td3.TD3.act
    monkeypatch.setattr(td3.TD3, "act", lambda self, x, explore: plain(self, x, explore) + 0.1 * torch.randn(len(x), 1))

    def learn(every):
        agent = ra.TD3(env, seed=3, **SMALL)
        for _ in range(0, 150, every):
            agent.learn(every, reset_num_timesteps=False)
            first = agent.score(2).returns
            assert first == agent.score(2).returns
        return agent.agent.state_dict(), agent.source.x[:100]

    (often, played), (seldom, also) = learn(10), learn(150)
    assert torch.equal(played, also)
    assert all(torch.equal(often[name], seldom[name]) for name in often)


def test_evaluating_more_often_in_a_run_changes_nothing(tmp_path):
    runs = []
    for every in (20, 75):
        agent = ra.TD3("Pendulum-v1", dir=str(tmp_path / str(every)), **SMALL, eval_every=every, eval_episodes=2).learn(150)
        runs.append(agent.agent.state_dict())
        agent.close()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    last = [[r["eval/returns"] for r in read_records(tmp_path / str(every)) if "eval/returns" in r][-1] for every in (20, 75)]
    assert last[0] == last[1]


def test_threads_are_the_runs_and_not_its_surroundings():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        agent = ra.TD3("Pendulum-v1", **{**SMALL, "threads": 1}, log_every=50)
        agent.learn(120, callback=lambda learner: seen.append(torch.get_num_threads()))
        agent.score(1)
        assert torch.get_num_threads() == 2
        assert seen == [1, 1]
    finally:
        torch.set_num_threads(before)


def test_a_callback_sees_records_evaluations_and_checkpoints_and_may_stop(tmp_path):
    seen = []

    def watch(learner):
        seen.append((learner.clock.env_step, sorted(learner.latest)[:1]))
        return learner.clock.env_step < 120

    fields = {**SMALL, "eval_every": 60, "eval_episodes": 1, "log_every": 40, "checkpoint_every": 50}
    agent = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **fields).learn(400, callback=watch)
    assert agent.clock.env_step == 120
    assert {step for step, _ in seen} == {40, 50, 60, 80, 100, 120}
    assert (60, ["eval/high"]) in seen or (60, ["eval/length"]) in seen
    agent.close()
    assert ra.load(tmp_path / "run").clock.env_step == 120
    with pytest.raises(ra.UserError, match="callback: a int is given; a function that takes the learner is needed"):
        ra.TD3("Pendulum-v1", **SMALL).learn(10, callback=3)
    with pytest.raises(ZeroDivisionError):
        ra.TD3("Pendulum-v1", **SMALL, log_every=5).learn(10, callback=lambda learner: 1 / 0)


def test_a_progress_bar_may_be_asked_for(capsys):
    ra.TD3("Pendulum-v1", **SMALL, log_every=50).learn(110, progress_bar=True)
    assert "step 100 of 110" in capsys.readouterr().out


def test_those_who_come_from_stable_baselines3_are_told_what_comes_first():
    message = r"MlpPolicy names a policy of Stable-Baselines3's.*rlamort\.SAC\(env, hidden=\[256, 256\]\)"
    with pytest.raises(ra.UserError, match=message):
        ra.SAC("MlpPolicy", "Pendulum-v1")
    with pytest.raises(ra.UserError, match="the environment comes first, and nothing else"):
        ra.SAC("Pendulum-v1", 3)


def test_help_shows_every_field():
    import inspect
    import pydoc

    said = pydoc.plain(pydoc.render_doc(ra.SAC))
    for text in (
        "Soft actor-critic",
        "temperature: initial alpha",
        "hidden: widths",
        "seed: of all randomness",
        "learning_rate",
    ):
        assert text in said, text
    parameters = inspect.signature(ra.SAC).parameters
    assert parameters["learning_rate"].default == 3e-4
    assert next(iter(parameters)) == "env"


def test_learning_too_little_after_loading_is_said(tmp_path):
    ra.TD3("Pendulum-v1", **SMALL).learn(130).save(tmp_path / "kept")
    agent = ra.load(tmp_path / "kept")
    with pytest.warns(UserWarning, match=r"learn\(60\): the agent is as it was loaded\. Its replay began empty, .* 100 steps"):
        agent.learn(60, reset_num_timesteps=False)


@pytest.mark.parametrize("method", ["SAC", "TD3", "DDPG"])
def test_an_agent_can_be_drawn_without_taking_memory(method):
    """So that what a file describes is compared with its tensors before it is believed."""
    agent = getattr(ra, method)("Pendulum-v1", **SMALL)
    with torch.device("meta"):
        drawn = agent._fresh_agent(agent.agent.spec)
    assert {tensor.device.type for tensor in drawn.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("fields", [{"hidden": [10**6, 10**6]}, {"hidden": [10**6] * 6, "critic.members": 10**6}])
def test_networks_that_no_memory_holds_are_refused_before_they_are_made(fields):
    with pytest.raises(ra.UserError, match=r"sac: networks of these sizes take .* smaller ones are needed"):
        ra.SAC("Pendulum-v1", **fields)


def test_a_saved_agent_of_absurd_sizes_is_refused_before_anything_is_allocated(tmp_path):
    ra.SAC("Pendulum-v1", **SMALL).save(tmp_path / "kept")
    file = tmp_path / "kept" / "agent.json"
    facts = json.loads(file.read_text())
    for change in ({"hidden": [2**31, 2**31]}, {"critics": 10**9}):
        file.write_text(json.dumps(facts | {"values": facts["values"] | change}))
        with pytest.raises(ra.UserError, match=r"has shape|is on one side only|too large to exist|at most 1000000"):
            ra.load(tmp_path / "kept")
    file.write_text(json.dumps(facts | {"spec": facts["spec"] | {"x_dim": 10**12, "declared": []}}))
    with pytest.raises(ra.UserError, match="has shape"):
        ra.load(tmp_path / "kept")
    file.write_text(json.dumps(facts))
    wide = [facts["spec"]["declared"][0], facts["spec"]["declared"][1] | {"shape": [10**12]}]
    file.write_text(json.dumps(facts | {"spec": facts["spec"] | {"declared": wide}}))
    with pytest.raises(ra.UserError, match="its description lacks sizes that agree"):
        ra.load(tmp_path / "kept")
