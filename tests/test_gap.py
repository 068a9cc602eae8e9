"""A policy as an amortization model: its max-Q problem, its gap in the critic, and what the environment says of it."""

import itertools
import json
import re

import numpy as np
import odd_envs
import pytest
import stable_baselines3
import torch
from rlamort.envs.maxq import MaxQProblem, Visited, visit

import rlamort as ra
from rlamort.agent import Agent
from rlamort.cli import main
from rlamort.domain import unit_box
from rlamort.env.make import open_env
from rlamort.env.simulate import EnvSimulator, RolloutSimulator, save
from rlamort.losses import objective
from rlamort.measure.claims import maxq
from rlamort.measure.gap import by_episode, gap, in_critic, max_q, refine, search
from rlamort.measure.time_to_match import FROM, Tried, _walk, settings, tutorial
from rlamort.objective import Cost
from rlamort.problem import Problem, draw
from rlamort.run.learner import learner_class
from rlamort.score import interval, score
from rlamort.solve.classical import iterates
from rlamort.source import Batch
from rlamort.update import Gradient, InY, Projected

SMALL = {"episodes": 2, "states": 8, "resimulated": 4, "horizon": 5, "acting": 1, "patience": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method in ("TD3", "SAC"):
        learner = getattr(ra, method)(
            "Pendulum-v1", seed=0, hidden=(32, 32), warmup_steps=100, batch_size=32, normalise=True, max_episode_steps=30
        )
        learner.learn(200)
        learner.save(folder / method)
        learner.close()
    stable_baselines3.TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [32]}, device="cpu", seed=0).save(
        folder / "sb3.zip"
    )
    return folder


def opened(name, count):
    return open_env(name, count=count)


def on_problem(runs, method, device=None, dtype=torch.float64):
    """An agent, its problem and 16 states."""
    agent = ra.load(runs / method).agent
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 4.0])
    device = device or torch.device("cpu")
    problem = MaxQProblem(agent, x).to(device, dtype)
    return agent.to(device, dtype), problem, x.to(device, dtype)


def test_the_gradient_at_the_policy_is_that_of_the_actor_in_td3(runs, device):
    agent, problem, x = on_problem(runs, "TD3", device)
    none = torch.zeros(16, device=device)
    batch = Batch(x=agent.normaliser(x), y=x[:, :1], reward=none, x_next=x, terminated=none.bool(), discount=none)
    loss, _ = objective(agent.model, agent.f, batch)
    weights = list(agent.model.parameters())
    actor = torch.autograd.grad(loss, weights)
    y = agent.act(x, explore=False)
    slope = Cost(problem).oracle(x).grad(y.detach())  # df/dy at y = policy(x)
    chained = torch.autograd.grad(y, weights, slope / len(x))
    assert sum(float(part.norm()) for part in actor) > 0
    for ours, theirs in zip(chained, actor, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["TD3", "SAC"])
def test_the_critic_is_frozen_whole_and_the_agents_own(method, runs):
    agent, problem, x = on_problem(runs, method)
    assert not list(problem.parameters())
    y = torch.rand(16, 1, dtype=torch.float64) * 2 - 1
    q = agent.critic(agent.normaliser(x), y)  # (E, 16)
    expected = -q[0] if method == "TD3" else -q.min(0).values
    torch.testing.assert_close(problem.cost(y, x), expected)
    with torch.no_grad():
        for p in agent.critic.parameters():
            p.add_(1.0)
    torch.testing.assert_close(problem.cost(y, x), expected)  # a copy: the agent may learn on


def test_refinement_never_raises_the_cost_and_stays_in_the_box(runs):
    _, problem, x = on_problem(runs, "SAC")
    f, y = Cost(problem), torch.rand(16, 1, dtype=torch.float64) * 2 - 1
    costs = [f(refine(f, x, y, steps), x) for steps in range(6)]
    assert all((after <= before).all() for before, after in itertools.pairwise(costs))
    assert (costs[5] < costs[0]).any()
    assert refine(f, x, y, 5).abs().max() <= 1
    alone = torch.cat([refine(f, x[i : i + 1], y[i : i + 1], 5) for i in range(16)])
    torch.testing.assert_close(refine(f, x, y, 5), alone, rtol=1e-9, atol=1e-9)


def test_the_search_finds_the_best_of_a_fine_grid(runs):
    _, problem, x = on_problem(runs, "TD3")
    f = Cost(problem)
    grid = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    lowest = torch.stack([f(point.expand(16, 1), x) for point in grid]).amin(0)
    start = torch.zeros(16, 1, dtype=torch.float64)
    found = f(search(f, x, start), x)
    assert (found <= lowest + 1e-4).all()


class Bowl(Problem):
    """|y - x|^2 on the box: the nearest of its points to x."""

    def __init__(self):
        super().__init__()
        self.domain = unit_box(2)

    def contexts(self, count):
        return torch.randn(count, 2)

    def cost(self, y, x):
        return (y - x).square().sum(-1)


@pytest.mark.parametrize("setting", settings(200), ids=lambda one: one.solver.name)
def test_every_solver_that_is_timed_finds_the_nearest_point_of_the_box(setting, device):
    problem = Bowl().to(device)
    x = torch.tensor([[0.3, -0.2], [0.5, 2.0], [-3.0, 4.0]], device=device)
    f, nearest = Cost(problem), x.clamp(-1, 1)
    least = f(nearest, x)
    torch.manual_seed(0)
    tried = _walk(f, problem.domain, x, setting, (least.mean() + 0.05).item())
    assert [one.starts for one in tried] == list(FROM)
    assert tried[-1].iterations((least.mean() + 0.05).item()) is not None
    alone, more = tried[0].mean, tried[-1].mean
    assert (more <= alone).all()  # the first of several starts is the only one of one
    assert (alone.diff() <= 0).all()
    assert (alone >= least.double().mean() - 1e-5).all()  # none leaves the box


def test_no_action_outside_the_box_is_the_best():
    """A policy that leaves it is cheaper than all that may be played, and is no reference for it."""
    problem = Bowl()
    x = torch.tensor([[0.3, -0.2], [0.5, 2.0], [-3.0, 4.0], [0.1, 0.1]])
    met = Visited(x, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    found = in_critic(problem, lambda given: given, met, patience=8)
    best = Cost(problem)(x.clamp(-1, 1), x)
    np.testing.assert_allclose(found.costs["best"], best.double().numpy(), atol=1e-5)
    assert found.costs["policy"].max() == 0


def test_iterations_are_counted_to_the_first_that_is_low_enough():
    one = Tried(settings(8)[0], 1, torch.tensor([3.0, 2.0, 2.0, 1.0]))
    assert [one.iterations(cost) for cost in (3.0, 2.0, 1.5, 0.5)] == [1, 2, 4, None]


def test_projected_steps_are_those_of_the_solver_and_stay_in_the_box():
    problem, x = Bowl(), torch.tensor([[0.3, -0.2], [-3.0, 4.0]])
    update = Projected(Gradient(0.25), problem.domain)
    path = iterates(Cost(problem).oracle(x), torch.zeros(1, 2, 2), update, InY(problem.domain))
    (first,), (second,) = itertools.islice(path, 2)
    torch.testing.assert_close(first, (0.5 * x).clamp(-1, 1))
    torch.testing.assert_close(second, (first + 0.5 * (x - first)).clamp(-1, 1))


def test_the_tutorials_protocol_leaves_the_box_and_so_beats_what_is_best_in_it():
    problem, x = Bowl(), torch.tensor([[0.3, -0.2], [1.5, 1.2]])
    f, best = Cost(problem), x.clamp(-1, 1)
    costs = {"policy": f(best, x).numpy(), "zero": f(torch.zeros_like(x), x).numpy()}
    found = tutorial(f, x, lambda given: given.clamp(-1, 1), costs).data
    assert found["v"] == pytest.approx(costs["policy"].mean() / (costs["zero"] - costs["policy"]).mean(), rel=0.1)
    assert found["outside"] == 0.5
    assert found["times_the_policy"] > 0


def test_a_solver_that_is_not_named_does_not_count_and_one_that_never_arrives_fails():
    solver = {"kind": "projected gradient", "goal": "a gap of 1 %", "batch": 8, "times": 1.0}
    solvers = [solver, {**solver, "kind": "Adam", "times": 5.0}, {**solver, "kind": "CEM", "times": 7.0}]
    assert maxq.fastest(solvers, "a gap of 1 %", 8)["times"] == 5.0
    assert np.isnan(maxq.fastest(solvers[:1], "a gap of 1 %", 8)["times"])


@pytest.mark.parametrize(
    ("gain", "said"),
    [([1.0, 1.1, 1.2], "the return rises"), ([-1.0, -1.1, -1.2], "the return falls"), ([1.0, -1.0, 0.5], "does not")],
)
def test_whether_the_return_follows_is_said_by_the_interval_of_paired_episodes(gain, said):
    policy = [100.0, -300.0, 20.0]
    better = [own + more for own, more in zip(policy, gain, strict=True)]
    returns = {"policy": policy, "policy + 5 gradient steps": better, "8 starts x 20 gradient steps": policy}
    sentence = maxq.follows("agent", {"acting": {"returns": returns}})
    assert said in sentence
    assert "does not change" in sentence


def test_states_are_those_of_whole_episodes_and_are_split_by_them():
    env = opened("Pendulum-v1", 3)
    met = visit(lambda x: torch.zeros(len(x), 1), env, seed=5)
    assert met.x.shape == (600, 3)
    assert (np.bincount(met.episode) == 200).all()
    np.testing.assert_array_equal(met.time, np.tile(np.arange(200), 3))
    single = open_env("Pendulum-v1")
    torch.testing.assert_close(met.x[200:400], visit(lambda x: torch.zeros(len(x), 1), single, seed=6).x)
    training, held_out = met.split(1)
    assert set(training.episode) == {0, 1}
    assert set(held_out.episode) == {2}
    with pytest.raises(ra.UserError, match="held_out=3: of 3 episodes, between 1 and 2 can be held out"):
        met.split(3)
    with pytest.raises(ra.UserError, match=r"states: shape \(5, 2\) is given; \(N, 3\)"):
        MaxQProblem(ra.SAC("Pendulum-v1", hidden=(8,)).agent, torch.zeros(5, 2))


def hopping(x):
    """Some policy that keeps a hopper or a cheetah moving."""
    return (x[:, -3:] if x.shape[1] == 11 else x[:, -6:]).tanh()


@pytest.mark.parametrize("name", ["Pendulum-v1", "Hopper-v5"])
def test_the_same_action_from_a_saved_state_gives_the_same_return(name):
    policy = hopping if name == "Hopper-v5" else lambda x: x[:, :1]
    env = opened(name, 2)
    met = visit(policy, env, seed=0)
    episode, time = np.array([0, 1, 1]), np.array([3, 0, 9])
    saved = save(policy, env, 0, episode, time)
    for i in range(3):
        torch.testing.assert_close(saved.x[i], met.at((met.episode == episode[i]) & (met.time == time[i])).x[0], rtol=0, atol=0)
    stepped = EnvSimulator(opened(name, 3), saved)
    first, again = (stepped.returns(policy(saved.x), policy, 500, 1.0) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    # from its first state on, an episode is the one that was played
    played = score_of(policy, name, seed=1)
    assert first[1] == pytest.approx(played, rel=1e-6)
    other = stepped.returns(-policy(saved.x), policy, 500, 1.0)
    assert (other != first).all()


def score_of(policy, name, seed):
    class Playing(Agent):
        def act(self, x, explore):
            return policy(x)

    env = opened(name, 1)
    return score(Playing(env.spec, normalise=False), env, seed).returns[0]


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Hopper-v5"])
def test_mujocos_rollout_is_the_environment(name):
    episode, time = np.array([0, 1]), np.array([7, 2])
    saved = save(hopping, opened(name, 2), 0, episode, time)
    stepped = EnvSimulator(opened(name, 2), saved)
    y = hopping(saved.x) * 0.5
    with RolloutSimulator(opened(name, 1), saved) as rolled:
        for horizon, tolerance in ((1, 1e-6), (12, 1e-5)):  # rewards come in float32
            given, exact = (sim.returns(y, hopping, horizon, 0.99) for sim in (rolled, stepped))
            np.testing.assert_allclose(given, exact, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(*(rolled.returns(y, hopping, 30, 0.99) for _ in range(2)))


def test_mujocos_rollout_ends_where_the_environment_does():
    falling = lambda x: torch.ones(len(x), 3)  # noqa: E731
    saved = save(falling, opened("Hopper-v5", 2), 0, np.array([0, 1]), np.array([0, 4]))
    stepped = EnvSimulator(opened("Hopper-v5", 2), saved)
    with RolloutSimulator(opened("Hopper-v5", 1), saved) as rolled:
        ended = [sim.returns(falling(saved.x), falling, 100, 1.0) for sim in (rolled, stepped)]
    assert (ended[1] < 100).all()  # each step that it is healthy gives 1: it has fallen
    np.testing.assert_allclose(*ended, rtol=1e-4)


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv"])
def test_a_time_limit_ends_a_rollout_too(name):
    """Also of an environment that is not registered, so that its wrapper alone knows of it."""
    still = lambda x: torch.zeros(len(x), 6)  # noqa: E731
    envs = [open_env(name, count=count, max_episode_steps=10) for count in (1, 1, 1)]
    saved = save(still, envs[0], 0, np.array([0]), np.array([7]))
    stepped = EnvSimulator(envs[1], saved).returns(still(saved.x), still, 50, 1.0)
    with RolloutSimulator(envs[2], saved) as rolled:
        np.testing.assert_allclose(rolled.returns(still(saved.x), still, 50, 1.0), stepped, rtol=1e-5)


def test_rollouts_are_refused_where_rewards_are_not_known():
    still = lambda x: torch.zeros(len(x), 1)  # noqa: E731
    saved = save(still, opened("Pendulum-v1", 1), 0, np.array([0]), np.array([0]))
    with pytest.raises(ra.UserError, match="env=Pendulum-v1: its state cannot be set"):
        RolloutSimulator(opened("Pendulum-v1", 1), saved)


def test_a_rollout_that_fails_has_no_return_and_nothing_of_the_next_episode():
    still = lambda x: torch.zeros(len(x), 1)  # noqa: E731
    envs = [open_env(odd_envs.Fragile, count=2, max_faults=9) for _ in range(3)]  # of seeds 1 and 2 the second breaks
    with pytest.warns(UserWarning, match="a new episode begins"):
        met = visit(still, envs[0], seed=1)
    assert np.bincount(met.episode).tolist() == [20, 5]
    saved = save(still, envs[1], 1, np.array([0, 1]), np.array([2, 3]))
    simulator = EnvSimulator(envs[2], saved)
    np.testing.assert_array_equal(simulator.returns(still(saved.x), still, 1, 1.0), [-1, -1])
    with pytest.warns(UserWarning, match="a new episode begins"):
        np.testing.assert_array_equal(simulator.returns(still(saved.x), still, 10, 1.0), [-10, np.nan])


def test_a_gap_leaves_out_what_fails_and_says_so(tmp_path):
    learner = ra.TD3(odd_envs.Good, hidden=(8,), warmup_steps=50, batch_size=8, max_env_faults=1000).learn(60)
    learner.save(tmp_path / "agent")
    with pytest.warns(UserWarning, match="a new episode begins"):
        report = gap(
            tmp_path / "agent", odd_envs.Fragile, **{**SMALL, "episodes": 8, "states": 80, "resimulated": 80, "acting": 0}
        )
    left = re.search(r"(\d+) of (\d+) states are left out: the environment failed in a rollout", "\n".join(report.lines))
    assert left
    assert 0 < int(left[1]) < int(left[2])
    assert report.data["environment"]["states"] == int(left[2]) - int(left[1])
    assert np.isfinite(report.data["environment"]["best"]["gained"]["mean"])
    with pytest.warns(UserWarning, match="a new episode begins"):
        several = gap(tmp_path / "agent", odd_envs.Fragile, **{**SMALL, "resimulated": 0, "acting": 4})
    assert re.search(r"policy: [1-3] of 4 episodes failed, and are left out", "\n".join(several.lines))
    assert {one["gained"]["mean"] for one in several.data["acting"]["players"]} == {0.0}


def test_a_rollout_notices_a_reward_that_something_changes():
    import gymnasium

    class Doubled(gymnasium.RewardWrapper):
        def __init__(self):
            super().__init__(gymnasium.make("HalfCheetah-v5", disable_env_checker=True))

        def reward(self, reward):
            return 2 * float(reward)

    def doubled():
        return Doubled()

    saved = save(hopping, open_env(doubled), 0, np.array([0]), np.array([1]))
    with pytest.raises(ra.UserError, match="something is wrapped around it"):
        RolloutSimulator(open_env(doubled), saved)


def test_nor_are_rollouts_those_of_what_a_wrapper_changes_later():
    """Another gravity in every episode: at the first state that is put back, it is that of the model."""
    import gymnasium

    class Randomised(gymnasium.Wrapper):
        def reset(self, **keywords):
            found = super().reset(**keywords)
            self.unwrapped.model.opt.gravity[2] = -5 * self.unwrapped.np_random.integers(1, 4)
            return found

    def randomised():
        return Randomised(gymnasium.make("HalfCheetah-v5", disable_env_checker=True))

    saved = save(hopping, open_env(randomised, count=2), 0, np.array([0, 1]), np.array([1, 1]))
    with pytest.raises(ra.UserError, match="something is wrapped around it"):
        RolloutSimulator(open_env(randomised), saved)


def test_an_interval_is_over_episodes():
    values, episode = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), np.array([0, 0, 0, 1, 1, 1])
    found = by_episode(values, episode)
    assert found.mean == 0.5
    half = 12.706 / 2  # Student's quantile for one degree of freedom, times the standard error of two means
    assert found.low == pytest.approx(0.5 - half, rel=1e-4)
    assert found.high == pytest.approx(0.5 + half, rel=1e-4)
    single = np.random.default_rng(0).normal(size=12)  # of one state each: Student's interval of the states
    np.testing.assert_allclose(by_episode(single, np.arange(12)), interval(list(single)))
    assert np.isnan(by_episode(values, np.zeros(6, int)).low)


@pytest.mark.parametrize(("run", "acting"), [("TD3", 1), ("sb3.zip", 0)])
def test_a_gap_is_reported_in_the_critic_and_in_the_environment(run, acting, runs, capsys):
    path = f"sb3:{runs / run}" if run.endswith("zip") else runs / run
    report = gap(path, "Pendulum-v1", **{**SMALL, "acting": acting})
    solvers = report.data["critic"]["solvers"]
    assert {"Adam", "L-BFGS"} <= {one["kind"] for one in solvers if one["goal"] == "the policy's cost"}
    assert all(one["seconds"] > 0 and one["starts"] in FROM for one in solvers)
    assert all(np.diff(curve["gap"]).max(initial=0) <= 1e-9 for curve in report.data["critic"]["curves"].values())
    blocks = ["In its own critic", "Re-simulated in the environment", *["Acting with each"] * acting]
    assert [line for line in report.lines if line in (*blocks, "Acting with each")] == blocks
    gaps = report.data["critic"]["gaps"]
    assert gaps["best"]["mean"].mean == 0
    assert 0 <= gaps["refined"]["mean"].mean <= gaps["policy"]["mean"].mean
    assert gaps["policy"]["mean"].mean <= gaps["policy"]["p99"] + 1e-12 <= gaps["policy"]["largest"] + 2e-12
    assert report.data["environment"]["by"] == "stepped"
    assert report.data["environment"]["states"] == 4
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["playing: 2 episodes, for the states in them", "solving and timing: 8 states, by the critic"]
    if acting:
        measured = maxq.judged(report.data, "Pendulum-v1, TD3")
        removed, times = measured.verdicts
        assert removed.passed == (report.data["critic"]["removed"] >= 0.5)
        best = maxq.fastest(solvers, "a gap of 1 %", 8)
        possible = best["seconds"] / report.data["critic"]["least_seconds"][8] >= 300
        assert times.outcome == ("pass" if best["times"] >= 300 else "FAIL" if possible else "reported")
        assert list(measured.figures) == ["maxq_pendulum_v1_td3"]
        assert json.dumps(measured.data)
        assert {len(values) for values in report.data["acting"]["returns"].values()} == {1}


def test_a_run_is_a_problem_to_train_on_and_one_to_hold_out(runs, capsys):
    training, held_out = max_q(runs / "SAC", episodes=3, held_out=1)
    assert f"playing: 3 episodes of {runs / 'SAC'}, for the states in them" in capsys.readouterr().out
    assert training.states.shape == (60, 3)
    assert held_out.states.shape == (30, 3)
    x = draw(training, 32)
    assert (x[:, None] == training.states).all(-1).any(-1).all()
    f = Cost(training)
    slope = f.oracle(x).grad(torch.zeros(32, 1))
    assert slope.shape == (32, 1)
    assert slope.abs().max() > 0


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("loss=objectiv", "loss=objectiv: there is no such loss"),
        ("model.kindd=3", "model.kindd: Full has no such key"),
        ("hidden=0", "hidden=0: a list"),
        ("lerning_rate=3", "lerning_rate: there is no such key"),
        ("seeds=1,1", r"seeds=\[1, 1\]: one or more are needed, each another"),
        ("seed=1", "seed=1: a comparison has seeds"),
    ],
)
def test_a_comparison_on_a_run_is_refused_before_anything_is_played(key, message, runs, capsys):
    assert main(["compare", f"sb3:{runs / 'sb3.zip'}", "env=Pendulum-v1", key]) == 2
    said = capsys.readouterr()
    assert re.match(f"rlamort: {message}", said.err)
    assert not said.out


def test_a_single_state_is_measured_like_many(runs):
    alone = {"episodes": 1, "states": 1, "resimulated": 0, "acting": 0, "patience": 8}
    report = gap(runs / "TD3", **alone)
    assert list(report.data["critic"]["policy_seconds"]) == [1]
    assert len({(one["kind"], one["goal"], one["starts"]) for one in report.data["critic"]["solvers"]}) == len(
        report.data["critic"]["solvers"]
    )


def test_what_cannot_be_measured_is_said_before_anything_is_played(runs, tmp_path):
    stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", device="cpu", n_steps=8, batch_size=8).save(tmp_path / "ppo.zip")
    with pytest.raises(ra.UserError, match=r"has no critic Q\(x, y\)"):
        gap(f"sb3:{tmp_path / 'ppo.zip'}", "Pendulum-v1", **SMALL)
    with pytest.raises(ra.UserError, match="env: this agent was loaded without one"):
        gap(f"sb3:{runs / 'sb3.zip'}", **SMALL)
    with pytest.raises(
        ra.UserError, match=r"env=Hopper-v5: its observation space is Box.*\(11,\).*; the agent's is Box.*\(3,\)"
    ):
        gap(runs / "TD3", "Hopper-v5", **SMALL)
    with pytest.raises(ra.UserError, match="states: 0 is given; a whole number of at least 1 is needed"):
        gap(runs / "TD3", **{**SMALL, "states": 0})


def test_a_run_that_stable_baselines3_trained_brings_its_critics(tmp_path):
    learner = learner_class("sb3/sac")("Pendulum-v1", hidden=(16,), seed=0)
    learner.save(tmp_path / "agent")
    problem, _ = max_q(tmp_path / "agent", episodes=2, held_out=1)
    x, y = problem.states[:8], torch.linspace(-1, 1, 8)[:, None]
    with torch.no_grad():
        theirs = torch.cat(learner.agent.policy.critic(x, y), -1).amin(-1)
    torch.testing.assert_close(problem.cost(y, x), -theirs)
    assert not list(problem.parameters())


def test_visited_states_are_taken_by_index():
    met = Visited(torch.arange(6.0).view(3, 2), np.array([0, 0, 1]), np.array([0, 1, 0]))
    chosen = met.at(np.array([2, 0]))
    assert chosen.x.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert chosen.episode.tolist() == [1, 0]


def test_a_nested_environment_is_put_back_whole_and_what_cannot_be_is_said(tmp_path):
    """Its own layers hold nothing; what changes is in an attribute, in a class, or nowhere that can be read."""
    from counting import ClassAttribute, GlobalGenerators, Iterator, Nested

    def policy(x):
        return x[:, :1].clamp(-1, 1)

    episode, time = np.array([0, 1, 1]), np.array([3, 0, 9])
    nested = EnvSimulator(open_env(Nested, count=3), save(policy, open_env(Nested, count=2), 0, episode, time))
    plain = EnvSimulator(opened("Pendulum-v1", 3), save(policy, opened("Pendulum-v1", 2), 0, episode, time))
    y = torch.zeros(3, 1)
    np.testing.assert_allclose(nested.returns(y, policy, 50, 0.99), plain.returns(y, policy, 50, 0.99))
    episode, time = np.array([0, 1]), np.array([1, 2])
    with pytest.raises(ra.UserError, match=r"Iterator\.numbers holds a range_iterator.*so no other action can be tried there"):
        save(policy, open_env(Iterator, count=2), 0, episode, time)
    with pytest.raises(ra.UserError, match="it changes what all of its class share"):
        save(policy, open_env(ClassAttribute, count=2), 0, episode, time)
    saved = save(policy, open_env(GlobalGenerators, count=2), 0, episode, time)
    with pytest.raises(ra.UserError, match="so it holds something that was not saved"):
        EnvSimulator(open_env(GlobalGenerators, count=2), saved)
