"""POPLIN and PETS: planning around a policy, through learned dynamics whose futures spread, are measured, and may diverge."""

import copy

import gymnasium
import numpy as np
import odd_envs
import pytest
import torch
from conftest import Count
from gymnasium.vector import SyncVectorEnv
from matplotlib.figure import Figure
from rlamort.agents.poplin import POPLIN
from rlamort.envs.lqr import Lqr
from test_fit import played
from test_resume import assert_equal, assert_resumed

import rlamort as ra
from rlamort import parts
from rlamort.agent import Adam, Player
from rlamort.cli import plot_runs
from rlamort.domain import Box, unit_box
from rlamort.dynamics import LAST, Ending, Ensemble, Known, Normal, Perturbed, Policy, Squared, Told, Trajectory
from rlamort.env.make import open_env
from rlamort.errors import UserError
from rlamort.fits.dynamics import Refits, fit, held_out, windows
from rlamort.measure.futures import fans
from rlamort.measure.futures import played as played_by
from rlamort.measure.planned import Planned, _searched
from rlamort.source import Batch, Replay
from rlamort.update import Cem

SMALL = {"horizon": 4, "model": {"steps": 2, "update": {"samples": 8, "elites": 2}}, "hidden": [8], "fit_every": 30,
         "fit_epochs": 2, "warmup_steps": 30, "buffer_size": 300, "checkpoint_every": 35, "eval_every": 50, "log_every": 50,
         "eval_episodes": 1, "max_episode_steps": 25, "device": "cpu", "dynamics": {"members": 2}}  # fmt: skip
NOISES = {"init": parts.Init(), "replan": parts.Replan(), "uniform": parts.Uniform(), "separate": parts.Separate()}


def batch_of(x, y, reward, x_next):
    zero = torch.zeros(len(x))
    return Batch(x, y, reward, zero + 0.99, zero > 0, x_next)


# dynamics


def test_a_model_fitted_to_linear_dynamics_recovers_them():
    """Known A and B, of states and actions all around, by members that are linear: no more than what Adam leaves."""
    torch.manual_seed(0)
    env = Lqr()
    x, y = 2 * torch.rand(400, 4) - 1, 2 * torch.rand(400, 2) - 1
    A, B = (torch.as_tensor(part, dtype=torch.float32) for part in (env.A, env.B))
    x_next = x @ A.T + y @ B.T
    ensemble = Ensemble(4, 2, (), 3, Squared)
    for rate in (3e-2, 1e-3):
        fit(ensemble, Adam(ensemble.parameters(), rate), batch_of(x, y, x.sum(-1), x_next), 40, 50)
    one = torch.eye(6)
    found = ensemble.futures(one[:, :4], one[:, 4:]).x_next - ensemble.futures(torch.zeros(6, 4), torch.zeros(6, 2)).x_next
    torch.testing.assert_close(found, torch.cat([A, B], 1).T.expand(3, -1, -1), rtol=0, atol=2e-3)


def test_particles_are_those_of_members_one_by_one():
    torch.manual_seed(0)
    ensemble = Ensemble(3, 2, (8,), 4, Normal, Ending, particles=5).double()
    ensemble.standardise(torch.randn(50, 10, dtype=torch.float64) * 3 + 1)
    x, actions = torch.randn(6, 3, dtype=torch.float64), list(torch.rand(2, 6, 2, dtype=torch.float64))
    held = ensemble.settled(2)
    path = held.follow(x, actions)
    assert path[0].x_next.shape == (20, 6, 3)
    assert torch.equal(held.follow(x, actions)[1].x_next, path[1].x_next)  # their noise is drawn already
    assert not torch.equal(ensemble.follow(x, actions)[1].x_next, path[1].x_next)
    for e, p in ((0, 0), (2, 3), (3, 4)):
        at = x
        for t in range(2):
            inputs = (torch.cat([at, actions[t]], -1) - ensemble.shifts[:5]) / ensemble.scales[:5]
            outputs = ensemble.net(inputs)[e]
            drawn = ensemble.likelihood.draw(outputs[:, : ensemble.moving], held.noise[t, e, p])
            change = ensemble.shifts[5:] + ensemble.scales[5:] * drawn
            at = at + change[:, :3]
            torch.testing.assert_close(path[t].x_next[5 * e + p], at)
            torch.testing.assert_close(path[t].reward[5 * e + p], change[:, 3])
    mean, std = path[0].x_next.view(4, 5, 6, 3).mean(1), path[0].x_next.view(4, 5, 6, 3).std(1)
    assert (std > 0).all()
    assert ((mean - ensemble.futures(x, actions[0]).x_next).abs() < 4 * std).all()


def test_squared_members_have_no_noise_to_draw():
    outputs = torch.randn(2, 3)
    assert torch.equal(Squared(3).draw(outputs, torch.randn(2, 3)), outputs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("Pendulum-v1", {}),
        ("InvertedPendulum-v5", {}),
        ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False}),
    ],
)
def test_own_rewards_are_the_environments(name, kwargs):
    learner = ra.PETS(name, env_kwargs=kwargs, dynamics={"rewards": "own", "members": 2}, hidden=[8], device="cpu", seed=0)
    ensemble, env = learner.agent.dynamics, learner.source.env
    assert isinstance(ensemble.rewards, Told)
    torch.manual_seed(0)
    for _ in range(4):
        x, y = env.x, env.domain.uniform(1)
        step = env.step(y)
        ours = ensemble.rewards(x.expand(2, -1, -1), y, step.x_next.expand(2, -1, -1), x[..., :0])
        torch.testing.assert_close(ours, step.reward.expand(2, -1), rtol=1e-3, atol=1e-3)
    assert ensemble.futures(x, y).reward.shape == (2, 1)
    learner.close()


def test_episodes_are_held_out_as_a_whole():
    """What happens in them changes nothing of a fit, and no sequence that is measured leaves one."""
    source = played(Short, 220)
    numbers = source.episodes()
    assert numbers.tolist() == [i // 20 for i in range(220)]
    fitted = []
    for spoil in (False, True):
        torch.manual_seed(1)
        ensemble = Ensemble(3, 1, (8,), 2)
        if spoil:
            aside = (numbers % 4 == 3).nonzero()[:, 0]
            source.reward[source.starts[: len(source)].long()[aside]] = 100.0
        found = Refits(ensemble, Adam(ensemble.parameters(), 1e-3), 100, 2, 32, 4)(source, 5)
        fitted.append(copy.deepcopy(ensemble.state_dict()))
        assert {"held_out/open_loop_error_before_fit", "held_out/open_loop_error_after_fit"} <= set(found)
        assert found["held_out/open_loop_error_after_fit"] < found["held_out/open_loop_error_before_fit"]
    assert_equal(*fitted)
    batch = source.everything()
    cut = windows(batch, torch.where(numbers % 4 == 3, numbers, -1), 5)
    assert cut.x.shape[1:] == (5, 3)
    assert len(cut.x) == 2 * 16
    torch.testing.assert_close(cut.x[:, 1:], cut.x_next[:, :-1])


class Noting(Ensemble):
    """It notes what it learns of."""

    def prepare(self, transitions):
        self.learned = {tuple(one) for one in transitions.x.tolist()}
        return super().prepare(transitions)


@pytest.mark.parametrize(("count", "frames"), [(1, 2_000), (1, 60), (2, 2_000), (2, 60), (3, 45), (8, 2_000), (20, 30)])
def test_what_is_held_out_once_is_never_learned_of(count, frames):
    """Of any number of environments, whose episodes end at different times, also of rings that are full."""
    lengths = [(3, 5, 4), (7, 2), (4, 9, 6, 1)]
    env = open_env(SyncVectorEnv([lambda i=i: Count(lengths[i % 3], offset=1_000 * i) for i in range(count)]))
    env.reset(0)
    source, y, held, learned = Replay(env, buffer_size=count * frames), env.domain.uniform(count), set(), set()
    ensemble = Noting(2, 1, (4,), 1)
    refits = Refits(ensemble, Adam(ensemble.parameters(), 1e-3), 100, 1, 256, 5)
    for step in range(1, 301):
        source.collect(lambda: y)
        if step % 13 == 0:
            refits(source, 2)
            learned |= ensemble.learned
            held |= {tuple(one) for one in source.everything().x.tolist()} - ensemble.learned
            assert not held & learned
    assert 0.1 < len(held) / len(held | learned) < 0.3
    if count == 1 and frames == 2_000:
        assert {int(episode) % 5 for episode, _ in held} == {4}


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 10, 20])
@pytest.mark.parametrize("every", [2, 3, 10])
def test_every_so_many_th_is_held_out_of_each_row_and_of_all(rows, every):
    aside = held_out(torch.arange(30 * every * rows), rows, every)
    assert (aside.view(-1, rows).sum(0) == 30).all()
    found = aside.cumsum(0)
    assert ((found - torch.arange(1, len(aside) + 1) / every).abs() < 2 + rows / every).all()  # at any time
    if rows == 1:
        assert aside.nonzero()[:, 0].tolist() == list(range(every - 1, 30 * every, every))
    assert not held_out(torch.arange(30), rows, 0).any()


def test_a_ring_that_keeps_only_what_is_held_out_teaches_nothing_and_that_is_said():
    env = open_env(lambda: Count((10, 60, 10)))
    env.reset(0)
    source, ensemble = Replay(env, buffer_size=30), Ensemble(2, 1, (4,), 1)
    refits = Refits(ensemble, Adam(ensemble.parameters(), 1e-3), 100, 1, 256, 2)
    for _ in range(10):
        source.collect(lambda: torch.zeros(1, 1))
    assert "dynamics/loss" in refits(source, 2)
    before = copy.deepcopy(ensemble.state_dict())
    for _ in range(50):
        source.collect(lambda: torch.zeros(1, 1))
    with pytest.warns(UserWarning, match="^buffer_size, fit_hold_out: .* nothing was learned in a fit"):
        assert set(refits(source, 2)) == {"dynamics/open_loop_error"}
    assert_equal(before, ensemble.state_dict())
    for _ in range(30):
        source.collect(lambda: torch.zeros(1, 1))
    assert "dynamics/loss" in refits(source, 2)


class Short(gymnasium.wrappers.TimeLimit):
    """The pendulum for twenty steps."""

    def __init__(self):
        super().__init__(gymnasium.make("Pendulum-v1").unwrapped, 20)


def test_plans_through_a_diverged_model_rank_last_and_it_is_said_once(recwarn):
    """One member of three explodes where the action is positive; what it promises there is the best of all."""
    torch.manual_seed(0)
    ensemble = Ensemble(1, 1, (), 3, Squared)
    with torch.no_grad():
        (layer,) = ensemble.net.layers
        layer.weight.zero_(), layer.bias.zero_()
        layer.weight[1, 1] = torch.tensor([1e7, 1e5])  # the state and the reward grow with the action
    f, x = Trajectory(ensemble, 2), torch.zeros(3, 1)
    plans = torch.tensor([[-0.0, 0.0], [0.5, 0.5], [torch.nan, 0.0]])
    assert f(plans, x).tolist() == [0.0, LAST, LAST]
    cem = Cem(unit_box(2), 64, 4, 0.3)
    y, _ = cem(plans[:1], cem.start(plans[:1], x[:1], f.oracle(x[:1])), x[:1], f.oracle(x[:1]))
    assert f(y, x[:1]) < LAST
    with torch.no_grad():
        layer.weight.mul_(1e4)
    refits = Refits(ensemble, Adam(ensemble.parameters(), 1e-9), 1, 1, 8, 0)
    found = refits(played(Line, 40), 3)
    assert found["dynamics/diverged"] > 0.5
    assert all(value.isfinite() for value in found.values())
    with pytest.warns(UserWarning, match="of random plans from states that were met diverge"):
        refits.notice({name: float(value) for name, value in found.items()})
    refits.notice({name: float(value) for name, value in found.items()})
    assert not recwarn.list


class Line(gymnasium.Env):
    """A point on a line."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1, 1).astype(np.float32), 0
        return self.x, {}

    def step(self, action):
        self.x, self.t = self.x + 0.1 * action, self.t + 1
        return self.x.astype(np.float32), -float(self.x[0] ** 2), False, self.t >= 20, {}


# perturbed policies


def perturbed(kind, horizon=4, hidden=(6,), dynamics=None):
    """A policy of the pendulum, its noise and its objective, by known dynamics, in float64."""
    torch.manual_seed(0)
    spec = open_env("Pendulum-v1").spec
    policy = Policy(3, unit_box(1), hidden).double()
    policy.standardise(torch.randn(20, 3, dtype=torch.float64) + 1)
    known = dynamics or Known(spec.equations, Box(spec.low, spec.high).double(), "own")
    trajectory = Trajectory(known, horizon, 0.9)
    noise = NOISES[kind](policy, trajectory)
    return policy, noise, Perturbed(3, noise, trajectory)


@pytest.mark.parametrize("kind", NOISES)
def test_a_perturbation_of_zero_is_the_policy_itself(kind):
    """Its actions, and the return of what they are followed by; of more futures than one, too, but for init."""
    policy, noise, f = perturbed(kind)
    x, zero = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, noise.dim, dtype=torch.float64)
    act = noise.rule(zero, noise.reference(x))
    torch.testing.assert_close(act(0, x), policy(x))
    state, total = x, 0
    for t in range(4):
        moved = f.trajectory.dynamics(state, policy(state))
        state, total = moved.x_next, total + 0.9**t * moved.reward
    torch.testing.assert_close(f.oracle(x).value(zero), -total)
    if kind != "init":
        futures = torch.randn(3, 5, 3, dtype=torch.float64)
        torch.testing.assert_close(act(1, futures), policy(futures))


@pytest.mark.parametrize("kind", ["uniform", "separate"])
def test_perturbed_weights_are_those_of_a_network_with_them(kind):
    policy, noise, _ = perturbed(kind)
    omega, x = torch.randn(5, noise.dim, dtype=torch.float64), torch.randn(3, 5, 3, dtype=torch.float64)
    act, of_step = noise.rule(omega, x[0, :, :0]), noise.apart(omega)
    for i, t in ((0, 0), (4, 3)):
        moved = copy.deepcopy(policy)
        vector = torch.nn.utils.parameters_to_vector(moved.net.parameters()) + of_step[i, t if kind == "separate" else 0]
        torch.nn.utils.vector_to_parameters(vector, moved.net.parameters())
        torch.testing.assert_close(act(t, x)[:, i], moved(x[:, i]))


@pytest.mark.parametrize("kind", ["init", "replan"])
def test_perturbed_actions_are_added_and_clipped(kind):
    policy, noise, f = perturbed(kind)
    x, omega = torch.randn(5, 3, dtype=torch.float64), 3 * torch.randn(5, noise.dim, dtype=torch.float64)
    reference, state, total = noise.reference(x), x, 0
    for t in range(4):
        base = reference[:, t : t + 1] if kind == "init" else policy(state)
        moved = f.trajectory.dynamics(state, (base + omega[:, t : t + 1]).clamp(-1, 1))
        state, total = moved.x_next, total + 0.9**t * moved.reward
    torch.testing.assert_close(f.oracle(x).value(omega), -total)


def test_a_perturbation_moves_on_by_one_step_and_ends_with_the_policy():
    for kind, expected in {"replan": [2, 3, 4, 0], "init": [2, 3, 4, 0]}.items():
        assert perturbed(kind)[1].moved(torch.tensor([[1.0, 2, 3, 4]])).tolist() == [expected]
    _, separate, _ = perturbed("separate", hidden=())  # four parameters
    omega = torch.arange(16.0)[None]
    assert separate.moved(omega).tolist() == [[*range(4, 16), 0, 0, 0, 0]]
    _, uniform, _ = perturbed("uniform", hidden=())
    assert torch.equal(uniform.moved(omega[:, :4]), omega[:, :4])


@pytest.mark.parametrize("kind", NOISES)
def test_without_steps_the_agent_is_its_policy_and_with_steps_it_plans(kind):
    env = open_env("Pendulum-v1", count=3)
    x = env.reset(0)
    fields = {"noise": NOISES[kind], "horizon": 5, "dynamics": parts.Own()}
    torch.manual_seed(0)
    agents = {
        steps: POPLIN(env.spec, model=parts.Unroll(parts.Previous(), parts.Cem(32, 4, 0.5), steps), **fields)
        for steps in (0, 3)
    }
    agents[3].load_state_dict(agents[0].state_dict())
    for agent in agents.values():
        player = Player(agent, 3)
        for _ in range(2):
            y = player(x, explore=True)
        torch.testing.assert_close(y, agent.policy(x), rtol=0, atol=1e-6) if agent is agents[0] else None
    assert (y - agents[3].policy(x)).abs().max() > 1e-3
    agent = agents[3]
    omega = agent.model(torch.cat([x, torch.zeros(3, agent.noise.dim)], -1), agent.f.oracle(x))
    f = agent.f.oracle(x)
    assert f.value(omega).mean() < f.value(torch.zeros_like(omega)).mean()


def test_the_policy_learns_what_was_planned_and_not_what_was_random():
    """Planned actions are a function of the state here, that of a policy; random ones before them say something else."""
    torch.manual_seed(0)
    env = open_env(Line)
    agent = POPLIN(env.spec, horizon=3, policy_epochs=60, hidden=(8,), dynamics=parts.Ensemble(2))
    env.reset(0)
    source = Replay(env, buffer_size=1_000)
    for _ in range(60):
        source.collect(lambda: torch.ones(1, 1))
    assert set(agent.distil(source)) == set()
    before = copy.deepcopy(agent.policy.net.state_dict())
    assert_equal(before, agent.policy.net.state_dict())
    for _ in range(200):
        source.collect(lambda: -0.8 * env.x)
    assert source.later(60).tolist() == [False] * 60 + [True] * 200
    found = agent.distil(source)
    assert found["policy/loss"] < 1e-3
    assert found["policy/held_out"] < 1e-3
    x = torch.tensor([[0.5], [-0.5]])
    torch.testing.assert_close(agent.policy(x), -0.8 * x, rtol=0, atol=0.05)


# runs


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("PETS", {"dynamics": {"members": 2, "particles": 2, "rewards": "own"}}),
        ("POPLIN_P", {"policy_epochs": 2, "planner": "icem", "model": {"steps": 2}, "samples": 8, "planner.elites": 3}),
        ("POPLIN_A", {"policy_epochs": 2, "noise": "init"}),
    ],
)
def test_stopped_and_resumed_is_uninterrupted(method, fields, tmp_path):
    small, learner = {**SMALL, **fields}, getattr(ra, method)
    again = assert_resumed(lambda dir: learner("Pendulum-v1", dir=dir, **small), 100, 68, tmp_path)
    if method != "PETS":
        assert int(again.agent.policy_adam.steps) > 0
        assert int(again.agent.random) == 30


def test_a_run_shows_what_its_dynamics_predict(tmp_path, capsys):
    small = {**SMALL, "steps": 60, "eval_every": 60}
    learner = ra.POPLIN_P("Pendulum-v1", dir=str(tmp_path / "run"), **small).learn(60)
    states, actions = played_by(learner, 30)
    assert states.shape == (26, 3)
    found = fans(learner.agent.dynamics, states, actions)
    assert [fan.start for fan in found] == [0, 20]
    assert [len(fan.mean) for fan in found] == [21, 6]
    members = learner.agent.dynamics.follow(states[20:21], list(actions[20:22, None]))[-1].x_next[:, 0].detach()  # (E, d)
    np.testing.assert_allclose(found[1].mean[2], members.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found[1].low[2], np.quantile(members, 0.05, axis=0), rtol=1e-5)
    learner.close()
    plot_runs([str(tmp_path / "run"), "--out", str(tmp_path / "curve.png")])
    assert "curve-predictions.png" in capsys.readouterr().out
    assert (tmp_path / "curve-predictions.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("env", "method", "fields", "message"),
    [
        ("HalfCheetah-v5", "PETS", {"dynamics.rewards": "own"}, "read 1 positions that it does not observe, so the model"),
        ("Reacher-v5", "POPLIN_P", {"dynamics.rewards": "own"}, "read 2 sensors that it does not observe"),
        ("MountainCarContinuous-v0", "PETS", {"dynamics.rewards": "own"}, "its state cannot be set"),
        (
            "Pendulum-v1",
            "PETS",
            {"dynamics.particles": 3, "dynamics.likelihood": "squared"},
            "dynamics.particles=3: they draw noise that members predict",
        ),
        ("CartPole-v1", "POPLIN_A", {}, r"its action space is Discrete\(2\); a Box of bounded floats is needed"),
        ("Pendulum-v1", "POPLIN_P", {"horizon": 201}, "horizon=201: an episode has 200 steps at most"),
        ("Pendulum-v1", "POPLIN_P", {"noise": "unifrom"}, "Did you mean uniform"),
        ("Pendulum-v1", "POPLIN_P", {"planner": {"kind": "Cem", "bounds": "truncated"}}, "a box is needed, not Euclid"),
        ("Pendulum-v1", "POPLIN_P", {"n_step": 3}, "no choice there"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(env, method, fields, message):
    with pytest.raises(UserError, match=message):
        getattr(ra, method)(env, **fields)


def test_claims_about_planners_are_differences_over_seeds():
    """From stored results, which are made up here; what lacks runs does not pass."""
    arms = {"ours": ["poplin_p", "samples=5"], "theirs": ["pets"]}
    claim = Planned(
        "poplin", "Pendulum-v1", 100, [0, 1], arms, above=[["ours", "theirs"]], matches=[["ours", 5, "theirs", 50]],
        deeper=["ours"], searched=["ours", "theirs"], populations=[5, 50], iterations=[0, 2],
    )  # fmt: skip
    assert claim.due({})[0].key == "rlamort train poplin_p env=Pendulum-v1 steps=100 seed=0 samples=5"
    assert claim.judge({}) == []

    def run(last, few, many, none, most):
        again = {"populations": {"5": [few], "50": [many]}, "iterations": {"0": [none], "2": [most]}}
        return {"evaluations": [{"env_step": 100, "eval/return": last}], **again}

    found = {claim.task("ours", 0).key: run(5, 5, 9, 1, 5), claim.task("theirs", 0).key: run(4, 0, 8, 0, 4)}
    assert [verdict.outcome for verdict in claim.judge(found)] == ["incomplete"] * 3
    found |= {claim.task("ours", 1).key: run(7, 7, 9, 8, 7), claim.task("theirs", 1).key: run(8.5, 0, 12, 0, 4)}
    assert claim.waiting(found) == ""
    # 6 less 6.25; 6 less 10, within the margin of 5; 6 less 4.5
    assert [verdict.outcome for verdict in claim.judge(found)] == ["FAIL", "pass", "pass"]
    assert "| ours | 6.0 | 9.0 |" in claim.report(found)
    axes = Figure().subplots()
    claim.panel(found)(axes)
    assert axes.lines[0].get_ydata().tolist() == [6.0, 9.0]


def test_an_episode_is_shown_up_to_its_failure():
    learner = ra.POPLIN_P(odd_envs.Fragile, **SMALL)
    with pytest.warns(UserWarning, match="a new episode begins"):
        states, actions = played_by(learner, 30)
    learner.close()
    assert states[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert actions.shape == (4, 1)


def test_an_agent_is_searched_with_other_samples_and_iterations(tmp_path):
    ra.POPLIN_P("Pendulum-v1", dir=str(tmp_path / "run"), **SMALL).learn(60).close()
    found = _searched([4, 8], [0, 2], 1, tmp_path / "run")
    assert set(found["populations"]) == {"4", "8"}
    assert found["populations"]["8"] == found["iterations"]["2"]  # as it was trained
    assert found["iterations"]["0"] != found["iterations"]["2"]


@pytest.mark.filterwarnings("ignore:.*no command can make it again")
def test_a_curve_is_drawn_where_no_command_can_make_the_environment_again(tmp_path, capsys):
    small = {**SMALL, "steps": 60, "eval_every": 60}
    ra.PETS(lambda: gymnasium.make("Pendulum-v1"), dir=str(tmp_path / "run"), **small).learn(60).close()
    plot_runs([str(tmp_path / "run"), "--out", str(tmp_path / "curve.png")])
    said = capsys.readouterr().out
    assert "curve.png\nno predictions: " in said
