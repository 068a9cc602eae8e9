"""What is given is what is trained in, evaluated in, resumed and loaded; what is evaluated in is never what is trained in."""

import functools
import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from counting import SMALL, Factor, Noisy, Pay
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

import rlamort as ra
from rlamort.env.copies import Copies, play
from rlamort.env.make import open_env
from rlamort.env.record import Recorded, recorded
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume

HERE = Path(__file__).parent


def rewards(agent):
    return agent.source.sample(2_000).reward.unique().tolist()


def moves(agent):
    """How the count of steps moves within transitions: by one, unless two episodes are in one of them."""
    batch = agent.source.sample(2_000)
    return (batch.x_next - batch.x).unique().tolist()


def instance(pay):
    env = gymnasium.make("Pay-v0")
    env.unwrapped.pay = pay
    return env


def rows_with(pay):
    vector = SyncVectorEnv([Pay] * 2)
    vector.set_attr("pay", [pay] * 2)
    return vector


def wrap_pay(self):
    Factor.__init__(self, Pay(2.5))


FIVE = {
    "id and keyword": lambda: ("Pay-v0", {"env_kwargs": {"pay": 5.0}}),
    "class and keyword": lambda: (Pay, {"env_kwargs": {"pay": 5.0}}),
    "module:Class and keyword": lambda: ("counting:Pay", {"env_kwargs": {"pay": 5.0}}),
    "function": lambda: (lambda: Pay(5.0), {}),
    "function of a keyword": lambda: (lambda pay: TimeLimit(Pay(pay), 9), {"env_kwargs": {"pay": 5.0}}),
    "instance without a spec": lambda: (Pay(5.0), {}),
    "instance by a keyword": lambda: (gymnasium.make("Pay-v0", pay=5.0), {}),
    "instance with an attribute set": lambda: (instance(5.0), {}),
    "instance in a wrapper of one's own": lambda: (Factor(gymnasium.make("Pay-v0", pay=2.5)), {}),
    "a class whose wrapper is its own": lambda: (type("Own", (Factor,), {"__init__": wrap_pay}), {}),
    "vector by a keyword": lambda: (gymnasium.make_vec("Pay-v0", 2, pay=5.0), {}),
    "vector with wrappers": lambda: (gymnasium.make_vec("Pay-v0", 2, pay=2.5, wrappers=[Factor]), {}),
    "vector with an attribute set": lambda: (rows_with(5.0), {}),
    "vector of functions": lambda: (SyncVectorEnv([lambda: Pay(5.0)] * 2), {}),
    "vector with worker processes": lambda: (gymnasium.make_vec("Pay-v0", 2, "async", pay=5.0), {}),
    "vector in a wrapper": lambda: (gymnasium.wrappers.vector.TransformReward(SyncVectorEnv([Pay] * 2), lambda r: 5 * r), {}),
}  # fmt: skip


@pytest.mark.parametrize("how", FIVE)
def test_what_is_given_is_played_and_evaluated(how):
    env, fields = FIVE[how]()
    agent = ra.TD3(env, **SMALL, **fields).learn(60)
    assert rewards(agent) == [5.0]
    assert agent.score(3).returns == [35.0] * 3
    agent.learn(30)
    assert moves(agent) == [1.0]
    agent.close()


@pytest.mark.parametrize("how", FIVE)
def test_what_is_given_is_loaded_and_resumed(how, tmp_path, recwarn):
    """By its name, or, where no name makes it again, only if it is given again; never something else without a word."""
    env, fields = FIVE[how]()
    unnamed = how in {
        "function", "function of a keyword", "instance with an attribute set", "instance in a wrapper of one's own",
        "a class whose wrapper is its own", "vector with wrappers", "vector with an attribute set", "vector of functions",
        "vector in a wrapper", "instance without a spec",
    }  # fmt: skip
    agent = ra.TD3(env, dir=str(tmp_path / "run"), **SMALL, **fields, eval_episodes=1, checkpoint_every=40).learn(60)
    agent.close()
    said = [str(warning.message) for warning in recwarn.list if "no command can make it again" in str(warning.message)]
    assert len(said) == unnamed
    if unnamed:
        assert said[0].startswith("env: ")
        with pytest.raises(ra.UserError, match=r"env: .*, so it cannot be constructed by name; pass env=\.\.\."):
            ra.load(tmp_path / "run").score(1)
        with pytest.raises(ra.UserError, match="so it cannot be constructed by name"):
            resume(tmp_path / "run")
    again = FIVE[how]()[0] if unnamed else None
    if how == "function of a keyword":
        again = lambda: Pay(5.0)  # noqa: E731
    loaded = ra.load(tmp_path / "run", env=again)
    assert loaded.score(2).returns == [35.0] * 2
    loaded.close()
    again = FIVE[how]()[0] if unnamed else None
    if how == "function of a keyword":
        again = lambda: TimeLimit(Pay(5.0), 9)  # noqa: E731
    resumed, _ = resume(tmp_path / "run", {}, env=again)
    resumed.learn(50, reset_num_timesteps=False)
    assert rewards(resumed) == [5.0]
    assert moves(resumed) == [1.0]
    assert resumed.score(2).returns == [35.0] * 2
    resumed.close()


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("around", [lambda env: env, gymnasium.wrappers.vector.DictInfoToList], ids=["plain", "list of infos"])
def test_a_users_vector_environment_is_not_the_one_that_is_evaluated_in(mode, around):
    vector = around(SyncVectorEnv([Pay] * 3, autoreset_mode=mode))
    agent = ra.TD3(vector, **SMALL).learn(31)
    for _ in range(3):
        assert agent.score().returns == [7.0] * 10
        agent.learn(32)
    assert moves(agent) == [1.0]


def test_as_many_episodes_as_were_asked_for_are_evaluated_whatever_the_rows():
    for env in (Pay, Pay(), SyncVectorEnv([Pay] * 3)):
        agent = ra.TD3(env, eval_env=SyncVectorEnv([lambda: Pay(2.0)] * 4), **SMALL)
        assert [len(agent.score(k).returns) for k in (1, 4, 7)] == [1, 4, 7]
        assert agent.score(5).returns == [14.0] * 5
    assert ra.TD3(Pay, eval_env=Pay(3.0), **SMALL).score(4).returns == [21.0] * 4
    assert ra.TD3(Pay, eval_env="Pay-v0", env_kwargs={"pay": 9.0}, **SMALL).score(2).returns == [7.0] * 2


def test_episodes_are_the_same_however_many_are_played_side_by_side():
    side_by_side, one_by_one = ra.TD3(Noisy, **SMALL), ra.TD3(Noisy, eval_env=Noisy(), **SMALL)
    assert np.allclose(side_by_side.score(6).returns, one_by_one.score(6).returns, atol=1e-5)


def test_the_same_environment_is_refused_for_both():
    env, vector = Pay(), SyncVectorEnv([Pay] * 2)
    for training, evaluation in ((env, env), (env, TimeLimit(env, 3)), (vector, vector), (vector, vector.envs[1])):
        with pytest.raises(ra.UserError, match="eval_env: it is the training environment"):
            ra.TD3(training, eval_env=evaluation, **SMALL)
    with pytest.raises(ra.UserError, match="the function returned the same environment twice"):
        ra.TD3(lambda: env, **SMALL)
    with pytest.raises(ra.UserError, match="the same environment is twice in the vector environment"):
        ra.TD3(SyncVectorEnv([lambda: env] * 2), **SMALL)


class Shared(Pay):
    """Copies of it share what they hold."""

    def __init__(self):
        super().__init__()
        self.state = {}

    def __deepcopy__(self, memo):
        other = Shared()
        other.state = self.state
        return other

    def observe(self):
        self.state["n"] = self.state.get("n", 0) + 1 if self.t else 0
        return np.array([self.state["n"]], np.float32)


class Process(Pay):
    """What it holds stays in this process."""

    def __init__(self):
        import threading

        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(("kind", "reason"), [(Shared, "its copies are not independent"), (Process, "cannot pickle")])
def test_where_no_second_one_can_be_made_it_is_said_at_once(kind, reason, tmp_path):
    with pytest.raises(ra.UserError, match=rf"env={kind.__name__}: a second one is needed, .*{reason}.*give eval_env"):
        ra.TD3(kind(), dir=str(tmp_path / "run"), **SMALL)
    with pytest.raises(ra.UserError, match=reason):
        ra.TD3(kind(), num_envs=2, **SMALL)
    with pytest.warns(UserWarning, match=reason):
        agent = ra.TD3(kind(), **SMALL)
    with pytest.raises(ra.UserError, match=reason):
        agent.learn(40).score()
    assert ra.TD3(kind(), eval_env=kind, **SMALL).learn(40).score(1).returns == [7.0]


@pytest.mark.parametrize(
    ("env", "fields", "message"),
    [
        (Pay, {"env_kwargs": {"pay": 2}, "num_envs": 2}, None),
        (lambda: Pay(), {"max_episode_steps": 3}, None),
        (Pay(), {"max_episode_steps": 3}, None),
        (Pay(), {"env_kwargs": {"pay": 2}}, "env_kwargs=.*: Pay is given, which is made already"),
        (TimeLimit(Pay(), 5), {"max_episode_steps": 6}, "max_episode_steps=6: .* truncates its episodes after 5 steps itself"),
        (SyncVectorEnv([Pay] * 2), {"env_kwargs": {"pay": 2}}, "env_kwargs=.*made already"),
        (SyncVectorEnv([Pay] * 2), {"max_episode_steps": 3}, "max_episode_steps=3: .*made already"),
        (SyncVectorEnv([Pay] * 2), {"num_envs": 3}, "num_envs=3: the vector environment that is given has 2"),
        (SyncVectorEnv([Pay] * 2), {"vectorization": "async"}, "vectorization=async: .*made already"),
        (SyncVectorEnv([Pay] * 2), {"max_env_faults": 5}, "max_env_faults=5: .*made already"),
        (SyncVectorEnv([Pay] * 2), {"env_timeout": 5.0}, "env_timeout=5.0: .*made already"),
        (SyncVectorEnv([Pay] * 2), {"reset_options": {"a": 1}}, "reset_options=.*made already"),
    ],
)
def test_a_key_that_comes_too_late_is_refused_and_all_others_hold_everywhere(env, fields, message):
    if message:
        with pytest.raises(ra.UserError, match=message):
            ra.TD3(env, **SMALL, **fields)
        return
    agent = ra.TD3(env, **SMALL, **fields).learn(60)
    assert agent.score(1).returns == [sum(rewards(agent)) * min(7, fields.get("max_episode_steps", 7))]
    assert max(agent.source.sample(500).x_next) == fields.get("max_episode_steps", 7)


def test_an_instance_is_played_itself_and_its_like_beside_it():
    env = Pay(3.0)
    agent = ra.TD3(env, num_envs=3, **SMALL).learn(60)
    assert agent.source.env.vector.envs[0].unwrapped is env
    assert rewards(agent) == [3.0]
    env.pay = 4.0
    assert agent.score(2).returns == [28.0] * 2  # as it is now


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_every_reset_has_the_options_that_a_key_says_and_else_none(vectorization):
    """Gymnasium's API has None where nothing is asked for; vector environments fill in {} on their own."""
    for options in (None, {"level": 2}):
        env = open_env(Pay, count=2, vectorization=vectorization, reset_options=options)
        env.reset(0)
        for _ in range(8):
            env.step(torch.zeros(2, 1))
        innermost = [row["layers"][-1]["attributes"]["options"] for row in env.state()["rows"]]
        assert [one and dict(one["dict"]) for one in innermost] == [options] * 2
        env.close()
    agent = ra.TD3(Pay, reset_options={"level": 3}, **SMALL).learn(30)
    agent.score(1)
    assert agent.source.env.vector.envs[0].unwrapped.options == {"level": 3}
    assert agent.environments.evaluation(1).vector.envs[0].unwrapped.options == {"level": 3}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_stable_baselines3_trains_with_the_options_that_it_is_evaluated_with(vectorization):
    fields = {"num_envs": 2, "vectorization": vectorization, "reset_options": {"level": 3}, "device": "cpu"}
    learner = learner_class("sb3/td3")(Pay, **fields)
    theirs = learner.source.vec_env()
    theirs.reset()
    for _ in range(8):  # beyond the end of an episode
        theirs.step(np.zeros((2, 1), np.float32))
    assert [env.options for env in theirs.get_attr("unwrapped")] == [{"level": 3}] * 2
    theirs.close()
    learner.close()


class Takes(Pay):
    """It demands what it is given as it was given."""

    def __init__(self, gain, offset, file, pair):
        super().__init__()
        assert isinstance(gain, np.float32)
        assert isinstance(offset, np.ndarray)
        assert offset.dtype == np.float64
        assert isinstance(file, Path)
        assert pair == (1, "a")


def test_keywords_of_the_constructor_are_written_as_what_they_are(tmp_path):
    kwargs = {"gain": np.float32(2.5), "offset": np.array([0.1, 0.2]), "file": tmp_path / "x", "pair": (1, "a")}
    agent = ra.TD3(Takes, env_kwargs=kwargs, dir=str(tmp_path / "run"), **SMALL).learn(40)
    agent.save(tmp_path / "kept")
    agent.close()
    assert ra.load(tmp_path / "kept").score(1).returns == [7.0]
    again, exactness = resume(tmp_path / "run")
    assert exactness == "exact"
    again.close()


def test_keywords_that_no_file_holds_are_said_before_training(tmp_path):
    def env(wage):
        return Pay(wage())

    with pytest.warns(UserWarning, match=r"env: env is a function|env_kwargs\.wage: a function is given, which no file holds"):
        agent = ra.TD3(env, env_kwargs={"wage": lambda: 2.0}, dir=str(tmp_path / "run"), **SMALL).learn(40)
    agent.close()
    with pytest.raises(ra.UserError, match="cannot be constructed by name"):
        resume(tmp_path / "run")
    with pytest.raises(ra.UserError, match=r"reset_options\.f: a function is given; numbers, text"):
        ra.TD3(Pay, reset_options={"f": lambda: 1}, **SMALL)


def test_a_class_is_recorded_by_where_it_is_found(tmp_path):
    ra.TD3(Pay, dir=str(tmp_path / "run"), **SMALL).learn(30).close()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["env"] == "counting:Pay"


SCRIPT = """
    import gymnasium as gym, numpy as np, rlamort as ra, sys
    from rlamort.run.restore import resume

    class Mine(gym.Env):
        observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
        action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed); self.t = 0
            return np.zeros(1, np.float32), {}
        def step(self, action):
            self.t += 1
            return np.full(1, self.t, np.float32), 1.0, False, self.t == 7, {}

    K = dict(hidden=[16], batch_size=16, warmup_steps=20, buffer_size=500, threads=1, device="cpu")
"""


def script(folder, text):
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(text))
    return subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_a_class_of_a_script_says_when_the_run_starts_that_no_command_finds_it(tmp_path):
    done = script(tmp_path, "ra.TD3(Mine, dir='run', **K).learn(40).close()")
    assert done.returncode == 0, done.stderr
    assert (
        "env: Mine is defined in the script that runs where no other process finds it, so no command can make it" in done.stderr
    )
    rlamort = Path(sys.executable).parent / "rlamort"
    refused = subprocess.run([rlamort, "resume", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "pass env=" in refused.stderr
    (tmp_path / "mine.py").write_text((tmp_path / "script.py").read_text().partition("ra.TD3(")[0])
    command = [rlamort, "resume", "run", "env=mine:Mine", "steps=60", "video=false"]
    resumed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 40 (exact)" in resumed.stdout


def test_worker_processes_need_no_main_guard(tmp_path):
    """They would run the script again, which would start them again; so they are not given the script."""
    done = script(
        tmp_path, "a = ra.TD3(Mine, num_envs=2, vectorization='async', **K).learn(60); print(a.score(2).returns); a.close()"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[7.0, 7.0]"
    assert not done.stderr


def test_what_worker_processes_cannot_be_given_is_said():
    held = {"lock": __import__("threading").Lock()}
    with pytest.raises(ra.UserError, match=r"vectorization=async: worker processes cannot be given this environment: .*pickle"):
        ra.TD3(lambda lock: Pay(), env_kwargs=held, vectorization="async", num_envs=2, **SMALL)


def other(**changes):
    """Pay with other spaces."""
    return type("Other", (Pay,), {"observe": lambda s: np.full(s.observation_space.shape, s.t, np.float32), **changes})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (other(action_space=Box(-2, 2, (1,), np.float32)), r"its action space is Box.*float32.*; the agent's is Box"),
        (other(action_space=Box(-1, 1, (1,), np.float64)), r"its action space is Box.*float64"),
        (other(action_space=Box(-1, 1, (1, 1), np.float32)), r"its action space is Box.*\(1, 1\)"),
        (other(observation_space=Box(0, 100, (2,), np.float32)), r"its observation space is Box.*; the agent's is Box"),
        (other(observation_space=Box(0, 99, (1,), np.float32)), r"its observation space is Box.*99"),
    ],
)  # fmt: skip
def test_other_spaces_are_refused_with_both_printed(kind, said, tmp_path):
    agent = ra.TD3(Pay, dir=str(tmp_path / "run"), **SMALL).learn(40)
    agent.close()
    agent.save(tmp_path / "kept")
    for given in (kind, kind(), SyncVectorEnv([kind] * 2)):
        with pytest.raises(ra.UserError, match=said):
            ra.load(tmp_path / "kept", env=given)
        with pytest.raises(ra.UserError, match=said):
            ra.load(tmp_path / "kept", eval_env=given)
        with pytest.raises(ra.UserError, match=said):
            ra.TD3(Pay, eval_env=given, **SMALL)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("unnamed: {}", "unnamed: {env: somewhere else}"))
    with pytest.raises(ra.UserError, match=said):
        resume(tmp_path / "run", env=kind)
    from rlamort.measure.gap import gap

    with pytest.raises(ra.UserError, match=said):
        gap(str(tmp_path / "run"), kind)


def test_an_agent_that_an_older_rlamort_saved_is_still_read(tmp_path):
    agent = ra.TD3("Pendulum-v1", **SMALL).learn(30)
    agent.save(tmp_path / "kept")
    file = tmp_path / "kept" / "agent.json"
    facts = json.loads(file.read_text())
    for name in ("unnamed", "statistics"):
        del facts[name]
    del facts["spec"]["declared"]
    for name in ("eval_env", "reset_options"):
        del facts["values"][name]
    file.write_text(json.dumps(facts))
    again = ra.load(tmp_path / "kept")
    x = np.ones(3, np.float32)
    assert np.array_equal(again.predict(x, deterministic=True)[0], agent.predict(x, deterministic=True)[0])
    assert len(again.score(2).returns) == 2


@pytest.mark.parametrize("env", [Pay, Pay(), SyncVectorEnv([Pay] * 2), AsyncVectorEnv])
def test_scoring_with_another_count_leaves_nothing_open(env):
    import psutil

    if env is AsyncVectorEnv:
        env = AsyncVectorEnv([Pay] * 2)
    agent = ra.TD3(env, **SMALL).learn(30)
    agent.score(1)
    before = len(psutil.Process().children())
    for k in (2, 3, 2):
        first = agent.environments.evaluation(k)
        agent.score(k)
    agent.score(5)
    assert len(psutil.Process().children()) == before
    assert agent.environments.evaluation(5) is not first
    agent.close()


# actions and observations, in every shape and dtype


def reacting(observation, action):
    """An environment of these spaces, which asserts what it is given."""

    class Strict(gymnasium.Env):
        observation_space, action_space, length = observation, action, 11

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.t = 0
            return self.observe(), {}

        def step(self, given):
            assert np.asarray(given) in self.action_space, given
            assert given.dtype == self.action_space.dtype
            self.t += 1
            return self.observe(), float(np.sum(given)), False, self.t == self.length, {}

        def observe(self):
            return self.np_random.uniform(-1, 1, self.observation_space.shape).astype(self.observation_space.dtype)

    return Strict


SHAPES = {
    "matrix of actions": (Box(-1, 1, (3,), np.float32), Box(-1, 1, (2, 2), np.float32)),
    "a single number": (Box(-1, 1, (), np.float32), Box(-1, 1, (), np.float32)),
    "one number in a vector": (Box(-1, 1, (1,), np.float64), Box(-3, 5, (1,), np.float32)),
    "three axes": (Box(-1, 1, (2, 3, 2), np.float32), Box(-1, 1, (1, 2, 1), np.float64)),
    "bounds that float32 rounds outwards": (Box(-1, 1, (2,), np.float64), Box(-0.1, 0.1, (2,), np.float64)),
    "bounds far from zero": (Box(-1, 1, (2,), np.float64), Box(1e8, 1e8 + 1, (2,), np.float64)),
    "half precision": (Box(-1, 1, (2,), np.float16), Box(-0.1, 0.3, (2,), np.float16)),
    "bounds of each coordinate": (
        Box(-1, 1, (2,), np.float32),
        Box(np.array([-7, 0.1]), np.array([-6.9, 1e6]), dtype=np.float64),
    ),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("method", ["TD3", "SAC"])
def test_actions_lie_in_the_space_and_have_its_shape_and_dtype(case, method, tmp_path):
    observation, action = SHAPES[case]
    kind = reacting(observation, action)
    agent = getattr(ra, method)(kind, **SMALL, **({"exploration_noise": 3.0} if method == "TD3" else {})).learn(300)
    assert agent.source.env.faults == 0
    assert len(agent.score(2).returns) == 2
    agent.save(tmp_path / "kept")
    for one in (agent, ra.load(tmp_path / "kept")):
        single, batch = observation.sample(), np.stack([observation.sample() for _ in range(5)])
        assert np.shape(one.predict(single)[0]) == action.shape
        many, _ = one.predict(batch, deterministic=True)
        assert many.shape == (5, *action.shape)
        assert many.dtype == action.dtype
        assert all(np.asarray(each) in action for each in many)
        again = [one.predict(each, deterministic=True)[0] for each in batch]
        assert np.allclose(np.array(again, np.float64), many.astype(np.float64), rtol=1e-4, atol=1e-5)
    evaluate_policy(agent, Monitor(kind()), n_eval_episodes=2)
    with pytest.raises(ValueError, match="observation: shape"):
        agent.predict(np.zeros((*observation.shape, 7, 7)))


def test_actions_reach_both_ends_of_bounds_far_from_zero():
    kind = reacting(*SHAPES["bounds far from zero"])
    env = open_env(kind)
    assert env.units.decode(np.array([[-1.0, 0.5]], np.float32)).tolist() == [[1e8, 1e8 + 0.75]]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Box(0, 1, (1,), np.int8), r"action space is Box\(0, 1, \(1,\), int8\); a Box of bounded floats is needed"),
        (Box(0, 255, (2,), np.uint8), "a Box of bounded floats is needed"),
        (gymnasium.spaces.MultiBinary(2), "a Box of bounded floats is needed"),
        (Box(-1e300, 1e300, (1,), np.float64), r"its action bounds are -1e\+300 and 1e\+300; bounds of at most 3.40282e\+38"),
        (Box(-np.inf, np.inf, (1,), np.float32), "its action bounds are infinite"),
        (Box(-1, 1, (0,), np.float32), "which holds no numbers"),
    ],
)
def test_actions_that_cannot_be_chosen_are_refused(action, message):
    with pytest.raises(ra.UserError, match=message):
        ra.TD3(reacting(Box(-1, 1, (1,), np.float32), action), **SMALL)


def test_the_remedy_for_infinite_bounds_is_one():
    kind = reacting(Box(-1, 1, (1,), np.float32), Box(-np.inf, np.inf, (2,), np.float64))
    with pytest.raises(ra.UserError) as refused:
        ra.TD3(kind, **SMALL)
    remedy = str(refused.value).partition("as by ")[2]
    assert remedy.startswith("gymnasium.wrappers.TransformAction(env, ")
    bounded = eval(remedy, {"gymnasium": gymnasium, "env": kind()})
    ra.TD3(bounded, **SMALL).learn(40)


def test_images_are_not_flattened_without_a_word():
    kind = reacting(Box(0, 255, (8, 8, 3), np.uint8), Box(-1, 1, (1,), np.float32))
    with pytest.warns(
        UserWarning, match=r"its observations are images, Box\(.*uint8\); networks here see them flattened, as 192"
    ):
        ra.TD3(kind, **SMALL)


def test_a_number_beyond_float32_is_called_what_it_is():
    class Large(Pay):
        observation_space = Box(-np.inf, np.inf, (1,), np.float64)

        def observe(self):
            return np.array([1e39 if self.t == 3 else 0.0])

    agent = ra.TD3(Large, max_env_faults=0, **SMALL)
    with pytest.raises(ra.Fault, match=r"observation holds 1e\+39; numbers of float32, up to 3\.40282e\+38, are needed"):
        agent.learn(20)


def test_forgiveness_is_what_was_asked_for_also_of_an_instance():
    class Fails(Pay):
        def step(self, action):
            if self.np_random.random() < 0.05:
                raise RuntimeError("the robot fell apart")
            return super().step(action)

    with pytest.warns(UserWarning, match="of 10000 allowed"):
        agent = ra.TD3(Fails(), max_env_faults=10_000, **SMALL).learn(300)
    assert agent.source.env.faults > 3
    assert moves(agent) == [1.0]


@pytest.mark.parametrize("rows", [0, 2])
def test_copies_of_mujoco_instances_are_what_was_given(rows):
    """Gymnasium copies these from their constructor's arguments alone, which loses what was changed in them since."""
    env = SyncVectorEnv([lambda: gymnasium.make("Hopper-v5")] * rows) if rows else gymnasium.make("Hopper-v5")
    assert recorded(env, None, None) == Recorded("Hopper-v5", None, None)
    for row in env.envs if rows else [env]:
        row.unwrapped._forward_reward_weight = 100.0
        row.unwrapped.model.opt.gravity[2] = -3.0
    assert recorded(env, None, None).unnamed
    copied = Copies(env)()
    for one, other in zip(*(given.envs if rows else [given] for given in (env, copied)), strict=True):
        assert one is not other
        assert play([one]) == play([other])
        other.unwrapped.model.opt.gravity[2] = -9.81
        assert one.unwrapped.model.opt.gravity[2] == -3.0


def jump(x_velocity, action):
    return 7.0, {}


CHANGES = {
    "a function": lambda env: setattr(env, "_get_rew", jump),
    "a function of its own": lambda env: setattr(env, "_get_rew", lambda x_velocity, action: jump(x_velocity, action)),
    "a method": lambda env: setattr(env, "_get_rew", types.MethodType(lambda self, *args: jump(*args), env)),
    "a partial function": lambda env: setattr(env, "_get_rew", functools.partial(jump)),
    "bounds of actions": lambda env: setattr(env, "action_space", Box(-0.1, 0.1, (3,), np.float32)),
    "bounds of observations": lambda env: setattr(env, "observation_space", Box(-9, 9, (11,), np.float64)),
    "steps of the solver": lambda env: setattr(env.model.opt, "iterations", 1),
    "switches of the simulator": lambda env: setattr(env.model.opt, "disableflags", 1),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_copies_of_mujoco_instances_have_whatever_was_changed(what, inside):
    """Also what no checkpoint can hold, which a copy can; and the run is not taken for one in what its id makes."""
    env = gymnasium.make("Hopper-v5")
    if not inside:
        CHANGES[what](env.unwrapped)
        one, other, plain = env, Copies(env)(), gymnasium.make("Hopper-v5")
        assert recorded(env, None, None).unnamed
    else:
        nested, named = Around(env), Around(gymnasium.make("Hopper-v5"))
        CHANGES[what](env.unwrapped)
        one, other, plain = nested.sim, Copies(nested)().sim, named.sim
    assert one.unwrapped is not other.unwrapped
    assert other.unwrapped.data.model is other.unwrapped.model
    assert play([one]) == play([other])
    assert (one.observation_space, one.action_space) == (other.observation_space, other.action_space)
    assert what == "bounds of observations" or play([plain]) != play([other])


class Around(gymnasium.Env):
    """An environment that plays another, in an attribute."""

    def __init__(self, sim):
        self.sim, self.observation_space, self.action_space = sim, sim.observation_space, sim.action_space

    def reset(self, *, seed=None, options=None):
        return self.sim.reset(seed=seed)

    def step(self, action):
        return self.sim.step(action)


def test_an_instance_without_gymnasiums_checker_has_its_name():
    assert recorded(gymnasium.make("Hopper-v5", disable_env_checker=True), None, None) == Recorded("Hopper-v5", None, None)


class Odd(Pay):
    """What it returns is not what it should be: `step` says what."""

    def __init__(self, **answer):
        super().__init__()
        self.answer = {"observation": np.zeros(1, np.float32), "reward": 1.0, "terminated": False} | answer

    def step(self, action):
        super().step(action)
        return *self.answer.values(), self.t == 7, {}


class Old(Pay):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class Bare(gymnasium.Env):
    pass


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (Odd(observation=[0.0]), "env Odd: step returned an observation of type list; an array of shape"),
        (Odd(observation=np.zeros(1, np.int64)), "env Odd: step returned an observation of dtype int64; it declares shape"),
        (Odd(reward=np.ones(1)), r"env Odd: step returned reward array\(\[1\.\]\); a finite number is needed"),
        (Odd(reward="1.0 and more"), "env Odd: step returned reward '1.0 and more'; a finite number is needed"),
        (Odd(reward=None), "env Odd: step returned reward None; a finite number is needed"),
        (Odd(terminated=0), "env Odd: step returned terminated=0; a bool is needed"),
        (Old(), r"env Old: reset must return \(observation, info\), got array"),
        (Bare(), "env=Bare: its observation_space is None; a gymnasium.spaces.Box is needed"),
    ],
)
def test_what_is_wrong_with_an_instance_shows_at_once_as_with_a_class(env, message):
    """Not at the first evaluation, in which its copies are tested, after all training."""
    with pytest.raises((ra.Fault, ra.UserError), match=message):
        ra.TD3(env, **SMALL)
    with pytest.raises((ra.Fault, ra.UserError), match=message):
        ra.TD3(Pay, eval_env=env, **SMALL)


def test_rewards_of_another_shape_are_named_also_of_a_vector_environment():
    class Column(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            observation, reward, *more = self.env.step(actions)
            return observation, reward[:, None], *more

    with pytest.raises(
        ra.Fault, match=r"env Column, step 1: reward is \[\[1\.\]\n \[1\.\]\], term.* a number and two flags for each of 2"
    ):
        ra.TD3(Column(SyncVectorEnv([Pay] * 2)), **SMALL).learn(30)


def test_copies_are_called_by_the_name_of_what_they_are_of():
    assert ra.TD3(Pay(), **SMALL).environments.evaluation(1).name == "Pay"


def test_an_instance_that_was_drawn_is_copied_all_the_same():
    pytest.importorskip("pygame")
    env = gymnasium.make("Pendulum-v1", render_mode="rgb_array", g=3.0)
    env.reset(seed=0)
    env.render()
    copied = Copies(env)()
    assert play([copied]) == play([env])
    assert copied.unwrapped.screen is None
    copied.reset(seed=0)
    assert copied.render().shape == (500, 500, 3)
