"""The adapter: units, seeds, successors, and every way an environment can be wrong."""

import resource
import subprocess
import sys

import gymnasium
import numpy as np
import odd_envs
import psutil
import pytest
import torch
from conftest import Count, Identity
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from test_resume import assert_equal

from rlamort.env import capacity
from rlamort.env.base import Space, Spec
from rlamort.env.capacity import require_memory
from rlamort.env.make import open_env
from rlamort.errors import Fault, UserError


def test_spaces_that_differ_little_are_told_apart_in_the_error():
    first, second = (Spec.of(*[Space((1,), "float64", [-1.0], [high])] * 2) for high in (1.0, 1 + 1e-12))
    with pytest.raises(UserError, match=r"observation space is Box\(.*, \[1.000000000001\].*agent's is Box\(.*, \[1.\]"):
        first.require(second, "env=Second")
    plain = Spec(1, [-1.0] * 3, [1.0] * 3)
    with pytest.raises(UserError, match="action size is 1; the agent's is 3"):
        plain.require(first, "env=First")
    with pytest.raises(UserError, match=r"range of action\[1\] is \[-2.0, 1.0\]; the agent's is \[-1.0, 1.0\]"):
        plain.require(Spec(1, [-1.0, -2.0, -1.0], [1.0, 1.0, 3.0]), "env=Wider")


def test_actions_arrive_in_the_environments_units(device):
    """[-1, 1] becomes [-3, 5] by scale and offset, clipped, in the space's dtype and shape."""
    seen = []

    class Spy(Identity):
        def step(self, action):
            seen.append(action.copy())
            return super().step(action)

    env = open_env(Spy, device=device)
    env.reset(0)
    seen.clear()
    for y in (-1.0, 0.0, 1.0, 7.0):
        env.step(torch.full((1, 1), y, device=device))
    assert np.concatenate(seen).tolist() == [-3, 1, 5, 5]
    assert seen[0].dtype == np.float32


def test_tensors_are_float32_on_the_device_and_flags_on_the_host(device):
    env = open_env("HalfCheetah-v5", count=2, device=device)
    x = env.reset(0)
    step = env.step(env.domain.uniform(2))
    for tensor in (x, step.x_next, step.reward, env.x):
        assert tensor.dtype == torch.float32
        assert tensor.device.type == device.type
    assert x.shape == step.x_next.shape == (2, 17)
    assert all(isinstance(flag, np.ndarray) for flag in (step.terminated, step.truncated, step.valid))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_rows_are_seeded_apart_and_the_same_seed_plays_the_same(vectorization):
    def play(seed):
        env = open_env("Pendulum-v1", count=3, vectorization=vectorization)
        xs = [env.reset(seed)]
        for _ in range(5):
            xs.append(env.step(torch.full((3, 1), 0.3)).x_next)
        env.close()
        return torch.stack(xs)

    first = play(4)
    assert torch.equal(first, play(4))
    assert len(first[0].unique(dim=0)) == 3
    assert not torch.equal(first, play(5))


def test_worker_processes_play_what_one_process_plays():
    """However many there are: environments, seeds, episodes and saved states are those of one process."""

    def play(workers, state=None):
        env = open_env("InvertedPendulum-v5", count=5, vectorization="async" if workers else "sync", workers=workers)
        env.reset(1)
        if state is not None:
            assert env.restore(state)
        made = torch.Generator().manual_seed(0)
        steps = [env.step(torch.rand(5, 1, generator=made) * 2 - 1) for _ in range(40)]
        state = env.state()
        for row in state["rows"]:
            row["globals"] = None  # a process's own, from which these environments do not draw
        found = steps, env.x.clone(), env.episodes()
        env.close()
        return found, state

    expected, state = play(None)
    assert any(step.terminated.any() for step in expected[0])
    further, _ = play(None, state)
    for workers in (1, 2, 5):
        found, saved = play(workers)
        assert_equal(found, expected)
        assert_equal(saved, state)
        assert_equal(play(workers, state)[0], further)


@pytest.mark.parametrize(("before", "after", "exact"), [(2, 2, True), (2, 1, False), (1, 3, False)])
def test_what_draws_from_its_process_goes_on_only_beside_the_same_environments(before, after, exact):
    def opened(workers):
        env = open_env(odd_envs.Drawing, count=3, vectorization="async", workers=workers)
        env.reset(0)
        return env

    env = opened(before)
    for _ in range(3):
        env.step(torch.zeros(3, 1))
    state = env.state()
    expected = env.step(torch.zeros(3, 1)).x_next
    env.close()
    again = opened(after)
    assert again.restore(state) is exact
    assert torch.equal(again.step(torch.zeros(3, 1)).x_next, expected) is exact
    assert exact or "num_workers was another" in again.unsaved[0]
    again.close()


def test_more_environments_than_fit_are_refused_before_they_are_made(monkeypatch):
    with pytest.raises(UserError, match="num_workers=5: at most one for each of num_envs=4 environments is needed"):
        open_env(odd_envs.Good, count=4, vectorization="async", workers=5)
    with pytest.raises(UserError, match="num_workers=2: vectorization=sync has no worker processes"):
        open_env(odd_envs.Good, count=4, workers=2)
    with pytest.raises(UserError, match=r"num_envs=900000: they take \d+.\d GiB; .* at most \d+ environments fit"):
        open_env(odd_envs.Holds, env_kwargs={"size": 40}, count=900_000)
    with pytest.raises(UserError, match=r"num_workers=900000: the processes alone take .* so at most \d+ fit"):
        require_memory(odd_envs.Good, 900_000, 900_000, 2**30)
    monkeypatch.setattr(capacity, "free_memory", lambda: 2**30)
    with pytest.raises(UserError, match=r"num_envs=900000: they take \d.\d GiB; 1.0 GiB"):  # though a few take no page
        require_memory(odd_envs.Good, 900_000, 0, 2**30)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 100, most[1]))
        with pytest.raises(UserError, match=r"num_envs=200: they would have 200 worker processes, .* files .* leaves 12"):
            open_env(odd_envs.Good, count=200, vectorization="async", workers=200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


def test_action_space_is_seeded_too():
    env = open_env("Pendulum-v1")
    env.reset(3)
    first = env.vector.action_space.sample()
    env.reset(3)
    assert np.array_equal(first, env.vector.action_space.sample())


def test_successor_is_the_true_one_and_the_next_context_the_new_episodes():
    env = open_env(lambda: Count((1,)))
    first = env.reset(0).clone()
    step = env.step(torch.zeros(1, 1))
    assert first[0, 1] == 0
    assert step.x_next[0].tolist() == [first[0, 0], 1]
    assert env.x[0].tolist() == [first[0, 0] + 1, 0]


def test_returned_tensors_are_never_written_again():
    env = open_env("Pendulum-v1", count=2)
    kept = [env.reset(0)]
    copies = [kept[0].clone()]
    for _ in range(5):
        step = env.step(torch.ones(2, 1))
        kept += [step.x_next, step.reward]
        copies += [step.x_next.clone(), step.reward.clone()]
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_an_environment_that_reuses_its_array_is_named_and_played_right():
    with pytest.warns(UserWarning, match="Reuses reuses its observation array"):
        env = open_env(odd_envs.Reuses)
    env.reset(0)
    steps = [env.step(torch.zeros(1, 1)).x_next for _ in range(3)]
    assert [x[0, 0].item() for x in steps] == [1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("NaNObservation", Fault, "NaNObservation: reset returned an observation with nan"),
        ("NaNReward", Fault, "NaNReward: step returned reward nan"),
        ("WrongShape", Fault, r"shape \(3,\); it declares shape \(2,\)"),
        ("WrongDtype", Fault, "dtype <U1; it declares.*float32"),
        ("AList", Fault, "type list; an array of shape"),
        ("Raises", Fault, "RuntimeError: the robot fell apart"),
        ("FourTuple", Fault, "must return .observation, reward, terminated, truncated, info."),
        ("Discrete", UserError, r"action space is Discrete\(3\); a Box of bounded floats is needed"),
        ("Unbounded", UserError, "action bounds are infinite"),
        ("DictObservation", UserError, "FlattenObservation"),
        ("NotAnEnv", UserError, "makes a NotAnEnv; a gymnasium.Env is needed"),
        ("Needs", UserError, "cannot be made: TypeError.*size"),
    ],
)
def test_what_is_wrong_with_an_environment_shows_at_once(kind, error, message):
    with pytest.raises(error, match=message):
        open_env(getattr(odd_envs, kind))


def test_constructor_keywords_reach_the_environment():
    assert open_env(odd_envs.Needs, env_kwargs={"size": 3}).spec.x_dim == 2


def test_an_episode_that_never_ends_is_named_and_can_be_cut(monkeypatch):
    monkeypatch.setattr("rlamort.env.make.PATIENCE", 50)
    env = open_env(odd_envs.Endless)
    env.reset(0)
    for _ in range(49):
        env.step(torch.zeros(1, 1))
    with pytest.raises(Fault, match=r"has not ended after 50 steps.*max_episode_steps=N"):
        env.step(torch.zeros(1, 1))
    cut = open_env(odd_envs.Endless, max_episode_steps=7)
    cut.reset(0)
    steps = [cut.step(torch.zeros(1, 1)) for _ in range(7)]
    assert steps[-1].truncated.item()
    assert not steps[-1].terminated.item()
    assert cut.episodes() == [(7.0, 7)]


def test_an_action_that_is_no_number_is_caught_before_the_simulator_hides_it():
    env = open_env("HalfCheetah-v5")
    env.reset(0)
    with pytest.raises(Fault, match=r"HalfCheetah-v5, step 0: the agent's action is .*nan.*diverged"):
        env.step(torch.full((1, 6), float("nan")))


def test_a_vector_environment_must_declare_how_it_resets():
    vector = SyncVectorEnv([Count])
    vector.metadata = {}
    with pytest.raises(UserError, match=r"declares no 'autoreset_mode'.*NEXT_STEP"):
        open_env(vector)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_gymnasium_vector_environments_are_taken_as_they_are(mode):
    kwargs = {"autoreset_mode": mode}
    vector = gymnasium.make_vec("InvertedPendulum-v5", 2, vectorization_mode="sync", vector_kwargs=kwargs)
    env = open_env(vector)
    assert env.count == 2
    env.reset(0)
    finished = []
    for _ in range(60):
        env.step(torch.ones(2, 1))
        finished += env.episodes()
    assert finished
    assert all(e.length < 60 for e in finished)


def test_an_instance_that_cannot_be_copied_serves_once_and_its_class_as_often_as_needed():
    assert open_env(odd_envs.Good()).count == 1
    assert open_env(odd_envs.Good(), count=2).count == 2  # by copies
    assert open_env(odd_envs.Locked()).count == 1
    with pytest.raises(UserError, match=r"env=Locked: a second one is needed, .*cannot be copied \(TypeError: cannot pickle"):
        open_env(odd_envs.Locked(), count=2)
    assert open_env(odd_envs.Good, count=2).count == 2


def test_mujoco_says_each_warning_once_and_keeps_no_file_of_them(tmp_path):
    """By itself it would at every opening, and HalfCheetah-v5's model has one to say."""
    code = "from rlamort.env.make import open_env\nfor _ in range(3): open_env('HalfCheetah-v5', count=2)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == len(set(lines)) <= 1
    assert not list(tmp_path.iterdir())
