"""A problem as an environment: Gymnasium's and SB3's checkers, adapters, seeds, states, and what a problem may do wrong."""

import importlib
import inspect
import math
import pkgutil
import textwrap
import warnings

import gymnasium
import numpy as np
import pytest
import rlamort.envs
import stable_baselines3
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import RescaleAction
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from stable_baselines3.common.evaluation import evaluate_policy

from rlamort.domain import Box, Euclid, Simplex, Sphere, SquashedGaussian
from rlamort.env.bandit import Bandit
from rlamort.env.gym import GymEnv
from rlamort.env.make import open_env, open_gym, spec_of
from rlamort.env.native import NativeEnv
from rlamort.env.one_step import OneStep, contexts, open_problem, problem_of, single, vector
from rlamort.errors import Diverged, Fault, UserError
from rlamort.losses import td_target
from rlamort.measure.check import check
from rlamort.problem import Problem, draw
from rlamort.run.learner import learner_class
from rlamort.run.restore import load
from rlamort.source import Batch, Replay

CPU = torch.device("cpu")


class Portfolio(Problem):
    """Expected returns against concentration, on the simplex."""

    domain = Simplex(4)

    def __init__(self, price: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("price", torch.tensor(price))

    def contexts(self, count):
        return torch.randn(count, 4, device=self.price.device)

    def cost(self, y, x):
        return -(x * y).sum(-1) + self.price * y.square().sum(-1)


class Pieces(Problem):
    """Contexts as a dict of tensors of several shapes and dtypes."""

    domain = Box([-2.0, 0.0], [2.0, 1.0])

    def contexts(self, count):
        return {"matrix": torch.randn(count, 2, 2), "kind": torch.randint(3, (count,))}

    def cost(self, y, x):
        assert x["kind"].dtype == torch.int64
        return torch.einsum("bi,bij,bj->b", y, x["matrix"], y) + x["kind"] * y.sum(-1)


class Direction(Problem):
    domain = Sphere(3)

    def contexts(self, count):
        return torch.nn.functional.normalize(torch.randn(count, 3), dim=-1)

    def cost(self, y, x):
        return -(y * x).sum(-1)


class Holes(Portfolio):
    """Its cost is no number where the first expected return is negative."""

    def cost(self, y, x):
        return super().cost(y, x) + torch.where(x[:, 0] < 0, math.nan, 0.0)


PROBLEMS = [Portfolio, Pieces, Direction]


@pytest.fixture
def registered():
    name = "rlamort/Portfolio-v0"
    gymnasium.register(name, entry_point="rlamort.env.one_step:single", vector_entry_point="rlamort.env.one_step:vector",
                       kwargs={"problem": f"{__name__}:Portfolio"})  # fmt: skip
    yield name
    del gymnasium.registry[name]


def normalised(kind):
    env = single(kind)
    return RescaleAction(env, np.float32(-1), np.float32(1)) if isinstance(env.env.domain, Box) else env


def checked(kind):
    """By Gymnasium, which would have the actions of all environments within [-1, 1]; a box is in its problem's own units."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*we recommend using a symmetric and normalized space")
        check_env(single(kind), skip_render_check=True)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_gymnasiums_and_sb3s_checkers_accept_every_problem_without_a_warning(kind):
    checked(kind)
    check_env_sb3(normalised(kind))


def test_a_registered_problem_passes_the_checkers_as_it_is_made(registered):
    env = gymnasium.make(registered, price=2.0)
    assert env.unwrapped.env.problem.price == 2
    check_env(env.unwrapped)
    rows = gymnasium.make_vec(registered, num_envs=3, price=2.0)
    assert rows.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert rows.reset(seed=0)[0].shape == (3, 4)


def test_whatever_is_registered_can_be_made():
    """By its id alone, single and vector; and steps."""
    names = [spec.id for spec in gymnasium.registry.values() if spec.namespace == "rlamort"]
    assert len(names) >= 5
    for name in names:
        env, rows = gymnasium.make(name), gymnasium.make_vec(name, num_envs=2)
        assert env.reset(seed=0)[0].shape == rows.reset(seed=0)[0].shape[1:]
        assert np.isfinite(env.step(env.action_space.sample())[1])
        assert np.isfinite(rows.step(rows.action_space.sample())[1]).all()


def test_every_problem_of_the_package_is_registered_and_passes_the_checkers():
    """Nobody keeps a list: whatever class of envs/*.py derives from Problem, and needs no argument, is there."""
    defined = {
        kind
        for module in pkgutil.iter_modules(rlamort.envs.__path__, "rlamort.envs.")
        for kind in vars(importlib.import_module(module.name)).values()
        if isinstance(kind, type) and issubclass(kind, Problem) and kind.__module__ == module.name
    }
    able = {k for k in defined if all(p.default is not p.empty for p in inspect.signature(k).parameters.values())}
    assert {kind.__name__ for kind in able} == {s.name for s in gymnasium.registry.values() if s.namespace == "rlamort"}
    for kind in able:
        checked(kind)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_reward_is_minus_the_cost_exactly(kind, device):
    """Of the native environment in Y, and of Gymnasium's, in Y too where that is a box, and else through `act`."""
    env = OneStep(kind(), 5, device)
    env.reset(3)
    x, y = env.x, env.domain.project(torch.randn(5, env.domain.inputs, device=device))
    step = env.step(y)
    assert torch.equal(step.reward, -env.problem.cost(y, env.problem.layout.unpack(x)))
    assert torch.equal(step.x_next, x)
    assert step.terminated.all()
    assert not step.truncated.any()
    assert step.valid.all()
    assert not torch.equal(env.x, x)
    assert [e.total for e in env.episodes()] == step.reward.tolist()
    assert env.episodes() == []

    rows = vector(kind().to(device), 5)
    x, _ = rows.reset(seed=1)
    rows.action_space.seed(0)
    action = rows.action_space.sample()
    _, reward, terminated, _, _ = rows.step(action)
    problem = kind().to(device)
    y = torch.from_numpy(action).to(device)
    y = y if isinstance(problem.domain, Box) else problem.domain.act(y)
    cost = problem.cost(y, problem.layout.unpack(torch.from_numpy(x).to(device)))
    assert reward.tolist() == (-cost).tolist()
    assert terminated.all()


class Wide(Problem):
    """The point of a box that is nearest to x."""

    domain = Box([-5.0, -5.0], [5.0, 5.0])

    def contexts(self, count):
        return torch.rand(count, self.domain.dim) * 10 - 5

    def cost(self, y, x):
        return (y[:, : x.shape[1]] - x).square().sum(-1)


class Everywhere(Wide):
    domain = Euclid(2)


class Spread(Wide):
    """Parameters of a density: means within 9, and logarithms of spreads, of either sign."""

    domain = SquashedGaussian(1).parameters


@pytest.mark.parametrize("kind", [Portfolio, Wide, Everywhere, Direction, Spread])
def test_what_a_problems_agent_predicts_is_the_models_answer_in_Y(kind, tmp_path):  # noqa: N802
    learner = learner_class("amortize")(kind, hidden=[16], batch_size=64, learning_rate=3e-3, seed=1).learn(300)
    learner.save(tmp_path / "kept")
    agent = learner.agent
    x = agent.problem.layout.pack(agent.problem.contexts(6))
    with torch.no_grad():
        y = agent.model(x, agent.f.oracle(x))
    assert agent.domain is learner.source.env.domain
    assert agent.domain.violation(y).max() < 1e-5
    for one in (learner, load(tmp_path / "kept", env=kind)):
        assert torch.equal(torch.from_numpy(one.predict(x.numpy())[0]), y)
        assert one.predict(x[0].numpy(), deterministic=True)[0] == pytest.approx(y[0].numpy(), abs=1e-5)
    env = NativeEnv(open_problem(kind), solutions=True)
    assert isinstance(agent.domain, Box) == (single(kind).action_space == env.action_space)
    mean, _ = evaluate_policy(learner, env, n_eval_episodes=400, warn=False)
    assert mean == pytest.approx(np.mean(learner.score(400).returns), rel=0.5, abs=0.3)


def test_a_minimum_outside_of_the_unit_box_is_found_and_given():
    learner = learner_class("amortize")(Wide, batch_size=256, seed=0).learn(1_000)
    assert learner.predict(np.array([3.0, -4.0], np.float32))[0] == pytest.approx([3.0, -4.0], abs=0.3)
    assert evaluate_policy(learner, single(Wide), n_eval_episodes=20, warn=False)[0] > -0.5


def test_the_environment_opened_for_a_user_is_the_problem_on_the_device(device):
    env = open_problem(Portfolio, count=6, env_kwargs={"price": 3.0}, device=device)
    assert env.spec.problem is env.problem
    assert (env.spec.x_dim, env.spec.low, env.spec.high) == (4, [-1.0] * 4, [1.0] * 4)
    assert env.domain is env.problem.domain
    assert env.problem.price.item() == 3
    x = env.reset(0)
    assert x.shape == (6, 4)
    assert x.dtype == torch.float32
    assert {x.device.type, env.problem.price.device.type} == {device.type}


def test_contexts_depend_on_the_seed_alone_and_disturb_nothing(device):
    def play(seed, outside=0):
        env = OneStep(Portfolio(), 3, device)
        seen = [env.reset(seed)]
        for _ in range(3):
            torch.randn(outside, device=device)
            env.step(env.domain.nearest(env.x))
            seen.append(env.x)
        return torch.stack(seen)

    assert torch.equal(play(5), play(5, outside=7))
    assert len(play(5).flatten(0, 1).unique(dim=0)) == 12
    assert not torch.equal(play(5), play(6))
    before = torch.get_rng_state(), (torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
    play(5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] is None or torch.equal(before[1], torch.cuda.get_rng_state(device))


def test_a_restored_environment_goes_on_bit_for_bit(device):
    def play(env, steps):
        return torch.stack([env.step(env.domain.nearest(env.x)).reward for _ in range(steps)])

    env = OneStep(Portfolio(), 3, device)
    env.reset(1)
    play(env, 4)
    state = env.state()
    other = OneStep(Portfolio(), 3, device)
    assert other.restore(state)
    assert torch.equal(play(env, 5), play(other, 5))
    assert env.episodes() == other.episodes()


def test_dict_contexts_become_rows_and_come_back():
    env = OneStep(Pieces(), 4, CPU)
    x = env.reset(0)
    assert x.shape == (4, 5)
    parts = env.problem.layout.unpack(x)
    assert torch.equal(env.problem.layout.pack(parts), x)
    assert parts["matrix"].shape == (4, 2, 2)


@pytest.mark.parametrize("count", [1, 3])
def test_the_adapter_for_gymnasium_gives_the_native_transitions(count):
    """Through SAME_STEP autoreset: every step a transition, its successor the context acted on."""
    space = vector(Portfolio, count)
    env = GymEnv(space, "Portfolio", spec_of("Portfolio", space.single_observation_space, space.single_action_space), CPU)
    env.reset(2)
    problem = Portfolio()
    for _ in range(4):
        x, u = env.x, env.domain.uniform(count)
        step = env.step(u)
        assert torch.equal(step.x_next, x)
        assert torch.equal(step.reward, -problem.cost(problem.domain.act(u), x))
        assert step.valid.all()
        assert step.terminated.all()
        assert not torch.isin(env.x, x).any()
    assert [e.length for e in env.episodes()] == [1] * 4 * count


def test_single_environments_go_on_to_the_next_context_without_losing_any():
    env, rows = single(Portfolio), vector(Portfolio, 1)
    first, _ = env.reset(seed=4)
    others, _ = rows.reset(seed=4)
    assert first.tolist() == others[0].tolist()
    for _ in range(3):
        action = np.zeros(4, np.float32)
        last, reward, *_ = env.step(action)
        following, rewards, _, _, info = rows.step(action[None])
        assert (reward, last.tolist()) == (rewards[0], info["final_obs"][0].tolist())
        assert env.reset()[0].tolist() == following[0].tolist()


def test_one_step_td_is_regression_on_minus_f():
    """The target of any critic is -f exactly, whatever is bootstrapped and whatever the discount."""
    torch.manual_seed(0)
    env = OneStep(Direction(), 64, CPU)
    x = env.reset(0)
    y = env.domain.project(torch.randn(64, 3))
    step = env.step(y)
    batch = Batch(x, y, step.reward, torch.full((64,), 0.99), torch.from_numpy(step.terminated), step.x_next)
    for value_next in (torch.randn(64), torch.full((64,), math.nan)):
        assert torch.equal(td_target(batch, value_next), -env.problem.cost(y, x))


@pytest.mark.parametrize("kind", PROBLEMS)
def test_an_agent_meets_a_problem_as_one_batch_with_the_spaces_and_rewards_of_gymnasium(kind, device):
    env, rows = open_env(kind, count=5, device=device), vector(kind().to(device), 5)
    assert isinstance(env, Bandit)
    assert env.spec.problem is None  # an agent that is not told the objective
    assert env.spec._replace(frozen=None) == spec_of("", rows.single_observation_space, rows.single_action_space)
    asked = []
    env.inner.f.problem.cost = lambda y, x, cost=env.inner.f.problem.cost: asked.append(len(y)) or cost(y, x)
    env.reset(0)
    for _ in range(3):
        x, u = env.x, env.domain.uniform(5)
        step = env.step(u)
        problem = env.inner.problem
        y = torch.from_numpy(env.units.decode(u.numpy(force=True))).to(device)  # as `predict` says it to a user
        y = y if isinstance(problem.domain, Box) else problem.domain.act(y)
        cost = kind().to(device).cost(y, problem.layout.unpack(x))
        torch.testing.assert_close(step.reward, -cost)
        assert step.x_next.device.type == step.reward.device.type == device.type
    assert asked == [5, 5, 5]


def test_a_run_on_a_problem_goes_on_bit_for_bit(tmp_path):
    keys = {"seed": 0, "hidden": [8], "num_envs": 3, "warmup_steps": 6, "batch_size": 8, "buffer_size": 60, "threads": 1,
            "env": "rlamort/Sphere-v0", "eval_episodes": 2, "device": "cpu", "checkpoint_every": 15}  # fmt: skip
    whole, parts = (rlamort.TD3(**keys, dir=tmp_path / name) for name in ("whole", "parts"))
    whole.learn(60)
    parts.learn(30)
    parts.close()
    again, exactness = rlamort.resume(tmp_path / "parts")
    assert exactness == "exact"
    again.learn(30, reset_num_timesteps=False)
    for ours, theirs in zip(whole.agent.state_dict().values(), again.agent.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(whole.source.env.x, again.source.env.x)


def test_a_run_that_played_a_problem_through_gymnasium_goes_on_with_new_contexts():
    def rows(open):
        made = Replay(open(Portfolio, count=3), buffer_size=60)
        made.env.reset(0)
        for _ in range(4):
            made.collect(lambda: made.env.domain.uniform(3))
        return made

    older, ours = rows(open_gym), rows(open_env)
    assert not ours.restore(older.state(), [older.frames_since(np.zeros(3, dtype=np.int64))])
    assert "Gymnasium" in ours.env.unsaved[0]
    assert len(ours) == len(older)
    ours.collect(lambda: ours.env.domain.uniform(3))
    assert len(ours) == len(older) + 3


@pytest.mark.parametrize("name", ["SAC", "TD3"])
def test_our_agents_train_on_a_problem(name):
    """Its class, as it is; the policy ends nearer to the solution than it began."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = getattr(rlamort, name)(
            Direction, seed=0, hidden=[32, 32], num_envs=8, warmup_steps=40, batch_size=64, learning_rate=1e-2, eval_episodes=16
        )
        before = np.mean(learner.score().returns)
        learner.learn(400)
        after = np.mean(learner.score().returns)
    learner.close()
    assert -1 <= before < after <= 1
    assert after > 0.3


def test_sb3_trains_on_a_problem_by_its_id(registered):
    model = stable_baselines3.PPO("MlpPolicy", registered, n_steps=64, batch_size=64, n_epochs=2, seed=0, device="cpu")
    model.learn(128)
    assert model.num_timesteps == 128


@pytest.mark.parametrize("named", [Portfolio, f"{__name__}:Portfolio"])
def test_keywords_of_a_registration_reach_the_problem_however_it_is_opened(named):
    name = "rlamort/Dear-v0"
    gymnasium.register(name, entry_point="rlamort.env.one_step:single", kwargs={"problem": named, "price": 7.0})
    try:
        assert problem_of(name).price == 7
        assert problem_of(name, {"price": 3.0}).price == 3
        assert open_env(name, count=2).inner.problem.price == 7
        assert gymnasium.make(name).unwrapped.env.problem.price == 7
    finally:
        del gymnasium.registry[name]


def test_an_instance_a_class_a_path_and_an_id_name_the_same_problem(registered, tmp_path, monkeypatch):
    (tmp_path / "own_problem.py").write_text(
        textwrap.dedent("""
        import torch
        from rlamort.domain import Box
        from rlamort.problem import Problem

        class Own(Problem):
            domain = Box([0.0], [1.0])
            def contexts(self, count): return torch.rand(count, 1)
            def cost(self, y, x): return (y - x).square().sum(-1)
        """)
    )
    monkeypatch.chdir(tmp_path)
    made = Portfolio(price=2.0)
    assert problem_of(made) is made
    assert problem_of(Portfolio, {"price": 2.0}).price == 2
    assert problem_of(registered, {"price": 2.0}).price == 2
    assert type(problem_of("own_problem:Own")).__name__ == "Own"
    env = open_env("own_problem:Own", count=2)
    env.reset(0)
    assert env.step(torch.zeros(2, 1)).terminated.all()
    env = open_env(made, count=2)
    assert env.reset(0).shape == (2, 4)


@pytest.mark.parametrize(
    ("given", "kwargs", "message"),
    [
        ("rlamort/Portfolo-v0", {}, "there is none of that name; .* Did you mean rlamort/Portfolio-v0"),
        ("Pendulum-v1", {}, "problem=Pendulum-v1: it is an environment with dynamics; a rlamort.problem.Problem is needed"),
        ("no_such_module:Mine", {}, "problem=no_such_module:Mine: no module 'no_such_module' could be imported"),
        ("rlamort.domain:Simplx", {}, "module 'rlamort.domain' has no 'Simplx'. Did you mean Simplex"),
        ("rlamort.domain:Simplex", {}, "it is the class Simplex; a class derived from rlamort.Problem is needed"),
        (Portfolio, {"prize": 1.0}, "problem=Portfolio: it cannot be made: TypeError: .*prize"),
        (Portfolio(), {"price": 1.0}, "env_kwargs: price given for a Portfolio that is made already"),
        (Simplex, {"dim": 3}, "problem: a type is given"),
    ],
)  # fmt: skip
def test_what_is_no_problem_is_named(given, kwargs, message, registered):
    with pytest.raises(UserError, match=message):
        problem_of(given, kwargs)


def test_a_problem_has_neither_workers_nor_a_clock():
    with pytest.raises(UserError, match="vectorization=async"):
        open_problem(Portfolio, vectorization="async")
    with pytest.raises(UserError, match="max_episode_steps=7"):
        open_problem(Portfolio, max_episode_steps=7)
    with pytest.raises(UserError, match="has a count of 3; 1 is needed"):
        NativeEnv(OneStep(Portfolio(), 3, CPU))


class NoDomain(Portfolio):
    domain = None


class Raises(Portfolio):
    def contexts(self, count):
        raise OSError("no such data")


class Short(Portfolio):
    def contexts(self, count):
        return super().contexts(min(count, 3))


class Column(Portfolio):
    def cost(self, y, x):
        return super().cost(y, x)[:, None]


class OtherDomain(Portfolio):
    domain = Simplex(5)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (NoDomain, UserError, "NoDomain.domain: none is given"),
        (Raises, Fault, "Raises.contexts: it raised OSError: no such data"),
        (Column, UserError, r"Column.cost: shape \(2, 1\) is returned"),
        (OtherDomain, Fault, "OtherDomain.cost: it raised RuntimeError"),
    ],
)
def test_what_a_problem_does_wrong_shows_before_work_starts(kind, error, message):
    with pytest.raises(error, match=message):
        open_problem(kind, count=8)


class Forgets(Portfolio):
    """It never says `super().__init__()`, and so do those below."""

    def __init__(self) -> None:
        self.price = torch.tensor(0.5)


class ForgetsBeforeAPart(Portfolio):
    def __init__(self) -> None:
        self.domain = Simplex(4)


class ForgetsBeforeABuffer(Portfolio):
    def __init__(self) -> None:
        self.register_buffer("price", torch.tensor(0.5))


class Unbounded(Portfolio):
    def __init__(self) -> None:
        super().__init__()
        self.domain = Box(0.0, 1.0)


USES = {
    "check": lambda kind: check(kind()), "OneStep": lambda kind: OneStep(kind(), 2, CPU), "amortize": rlamort.amortize,
    "TD3": rlamort.TD3, "problem_of": problem_of, "single": single, "vector": vector,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        *((kind, rf"^{kind.__name__}\.__init__: super\(\)\.__init__\(\) is not called")
          for kind in (Forgets, ForgetsBeforeAPart, ForgetsBeforeABuffer)),
        (Unbounded, r"^Box\.low: 0\.0 is given; a list of numbers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_a_constructor_does_wrong_is_named_wherever_it_is_used(kind, message, use):
    with pytest.raises(UserError, match=message):
        use(kind)


def test_contexts_of_another_number_are_named():
    with pytest.raises(UserError, match=r"Short.contexts\(8\): 3 are returned"):
        OneStep(Short(), 8, CPU).reset(0)


def test_a_cost_that_is_no_number_is_a_fault_that_names_the_class(device):
    env = OneStep(Holes(), 16, device)
    env.reset(0)
    with pytest.raises(Fault, match=r"Holes, step 0, item .*: its cost is nan; a finite number is needed; that is failure 1"):
        env.step(env.domain.nearest(env.x))


def test_forgiven_rows_are_no_transitions_and_their_neighbours_play_on(device):
    env = OneStep(Holes(), 16, device, max_faults=1)
    x = env.reset(0)
    with pytest.warns(UserWarning, match=r"failure 1 of 1 allowed"):
        step = env.step(env.domain.nearest(x))
    assert step.valid.tolist() == (x[:, 0] >= 0).tolist()
    assert 0 < step.valid.sum() < 16
    assert torch.equal(step.reward, torch.where(x[:, 0] < 0, 0, -Portfolio().to(device).cost(env.domain.nearest(x), x)))
    assert len(env.episodes()) == step.valid.sum()
    with pytest.raises(Fault, match="failure 2"):
        env.step(env.domain.nearest(env.x))


def test_a_network_that_has_diverged_is_told_from_a_cost_that_is_no_number():
    env = OneStep(Portfolio(), 2, CPU, max_faults=9)
    env.reset(0)
    with pytest.raises(Diverged, match="Portfolio, step 0: the solution holds nan"):
        env.step(torch.full((2, 4), math.nan))


def test_contexts_are_in_the_dtype_of_networks(device):
    class Wide(Portfolio):
        def contexts(self, count):
            return super().contexts(count).double()

    generator = np.random.default_rng(0)
    assert draw(Wide(), 2).dtype == torch.float64
    assert contexts(Wide(), 2, device, generator).dtype == torch.float32


def test_contexts_are_drawn_where_the_problem_is():
    """What a class makes without saying where is on the device, as its buffers are: meta stands for a GPU."""
    places = []

    class Placed(Wide):
        def contexts(self, count):
            x = torch.randn(count, 2)
            places.append(x.device.type)
            return x

    assert draw(Placed(), 3, torch.device("meta")).device.type == "meta"
    assert places[-1] == "meta"
    assert draw(Placed(), 3, torch.device("cpu")).device.type == places[-1] == "cpu"
