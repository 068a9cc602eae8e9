"""Learned dynamics of a user's own, fits that would find too little, and the end of POPLIN's regression."""

import copy
import re
import sys
from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
from rlamort.agents.poplin import POPLIN
from test_docs import CONTRIBUTING, file_in
from test_fit import played
from test_resume import assert_resumed
from torch import nn

import rlamort as ra
from rlamort import parts
from rlamort.agent import Adam
from rlamort.config import Size
from rlamort.dynamics import Conditioned, Dynamics, Ensemble, GaussianProcess, Motion, Moved, Trained, lacking
from rlamort.env.make import open_env
from rlamort.errors import UserError
from rlamort.fits.dynamics import fit, open_loop
from rlamort.fits.gaussian_process import Fits as Conditioning
from rlamort.run.learner import learner_class
from rlamort.source import Replay

# what a user writes: it derives from Dynamics alone


class Network(Dynamics):
    """One network of the change of state and of the reward, whose errors are weighed by scales."""

    learned, members, least = True, 1, 10

    def __init__(self, d, n, width):
        super().__init__()
        self.d, self.net = d, nn.Sequential(nn.Linear(d + n, width), nn.Tanh(), nn.Linear(width, d + 1))
        self.register_buffer("scale", torch.ones(d + 1))

    def forward(self, x, y):
        change = self.net(torch.cat([x, y.expand(*x.shape[:-1], -1)], -1)) * self.scale
        return Moved(x + change[..., : self.d], change[..., self.d], torch.ones_like(change[..., 0]))

    def prepare(self, met):
        target = torch.cat([met.x_next - met.x, met.reward[:, None]], -1)
        self.scale.copy_(target.std(0))
        return torch.cat([met.x, met.y, target], -1)

    def loss(self, items):
        inputs, target = items.split([items.shape[-1] - self.d - 1, self.d + 1], -1)
        return (self.net(inputs) - target / self.scale).square().mean()


class Mute(Network):
    """It does not say what it learns from."""

    prepare = property()  # none


class Twins(Network):
    """It says that it has two members, and notes what each is given."""

    members = 2

    def loss(self, items):
        self.seen.append(items)
        return super().loss(items)


class Slope(Dynamics):
    """x_next = x + b y, whose b is the posterior mean of a regression: closed forms, and a prior that is learned."""

    learned, least = True, 2

    def __init__(self):
        super().__init__()
        self.motion, self.log = Motion(3), nn.Parameter(torch.zeros(()))
        self.register_buffer("b", torch.zeros(()))

    def hold(self, met):
        self.y = met.y[:, 0]
        return met.x_next - met.x

    def loss(self, targets):
        return (self.log - 1).square()  # its minimum is known

    def condition(self, targets):
        self.b = ((self.y * targets[:, 0]).sum() / (self.y.square().sum() + self.log.exp())).detach()

    def forward(self, x, y):
        return Moved(x + self.b * y, -x.square().sum(-1), torch.ones(len(x)))


@dataclass(frozen=True)
class Learns(parts.Dynamics):
    """A network.

    Args:
        width: of its hidden layer.
    """

    width: Size = 32

    def __call__(self, spec, hidden):
        return Network(spec.x_dim, len(spec.low), self.width)


@dataclass(frozen=True)
class Silent(parts.Dynamics):
    """`Mute`."""

    def __call__(self, spec, hidden):
        return Mute(spec.x_dim, len(spec.low), 4)


SMALL = {"warmup_steps": 150, "fit_every": 150, "hidden": [8], "buffer_size": 1_000, "device": "cpu", "seed": 0}
PLANNER = {**SMALL, "horizon": 3, "samples": 8, "planner.elites": 2, "model.steps": 2, "fit_epochs": 60, "fit_hold_out": 2,
           "max_episode_steps": 30, "learning_rate": 3e-3, "log_every": 151}  # fmt: skip
GRADIENT = {**SMALL, "fit_steps": 200, "fit_batch_size": 32, "learning_rate": 3e-3, "compile": False, "log_every": 301}
EXPANDED = {f"expansion.{key}": GRADIENT[key] for key in ("fit_every", "fit_steps", "fit_batch_size", "learning_rate")}
EXPANDED |= {key: GRADIENT[key] for key in ("warmup_steps", "hidden", "buffer_size", "device", "seed", "compile", "log_every")}
CARTPOLE = "rlamort.envs.cartpole:CartPole"
ME = "test_learned:Learns"


@pytest.mark.parametrize(
    ("method", "env", "fields"),
    [
        ("MPC", CARTPOLE, PLANNER),
        ("PETS", "Pendulum-v1", PLANNER),
        ("POPLIN_A", "Pendulum-v1", {**PLANNER, "policy_epochs": 2}),
        ("POPLIN_P", CARTPOLE, {**PLANNER, "policy_epochs": 2}),
    ],
)
def test_planners_fit_dynamics_of_a_users_own(method, env, fields):
    """The error a plan ahead, on episodes that no fit has seen, is less than half after the first fit."""
    learner = getattr(ra, method)(env, dynamics=ME, **fields).learn(151)
    assert type(learner.agent.dynamics) is Network
    assert int(learner.agent.adam.steps) > 0
    before, after = (learner.latest[f"held_out/open_loop_error_{when}_fit"] for when in ("before", "after"))
    assert after < 0.5 * before
    assert learner.latest["dynamics/diverged"] == 0


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("SVG_H", {**EXPANDED, "expansion.dynamics": ME, "utd": 0.1}),
        ("SVG1", {**GRADIENT, "dynamics": ME, "utd": 0.1}),
        ("SVG_INF", {**GRADIENT, "dynamics": ME, "policy_steps": 2, "horizon": 5}),
    ],
)
def test_value_gradients_fit_dynamics_of_a_users_own(method, fields):
    """The error on what the second fit has not seen yet is far below that of a model that was never fitted."""
    learner = getattr(ra, method)("Pendulum-v1", **fields).learn(301)
    found = next(part for part in learner.agent.modules() if isinstance(part, Network))
    new = learner.source.sequences(50, 1)
    ours, none = (open_loop(one, new)["dynamics/open_loop_error"] for one in (found, Network(3, 1, 32)))
    assert ours < 0.5 * none
    assert 0 < learner.latest["dynamics/open_loop_error"] < 0.5


def test_contributing_dynamics_are_fitted(tmp_path, monkeypatch):
    for name in ("affine.py", "affine.yaml"):
        (tmp_path / name).write_text(file_in(CONTRIBUTING, name))
    monkeypatch.syspath_prepend(tmp_path)
    (words,) = re.findall(r"^rlamort train ./affine.yaml env=Pendulum-v1 (.*)$", CONTRIBUTING, re.M)
    fields = {**PLANNER, **dict(word.split("=") for word in words.split()), "planner.elites": 4}
    learner = learner_class(str(tmp_path / "affine.yaml"))("Pendulum-v1", **fields, num_envs=2).learn(151)
    assert type(learner.agent.dynamics).__name__ == "Affine"
    before, after = (learner.latest[f"held_out/open_loop_error_{when}_fit"] for when in ("before", "after"))
    assert after < 0.7 * before
    assert learner.latest["dynamics/loss"] > 0
    monkeypatch.delitem(sys.modules, "affine")


def test_dynamics_of_a_users_own_are_saved_and_resumed(tmp_path):
    fields = {**PLANNER, "dynamics": ME, "warmup_steps": 30, "fit_every": 30, "log_every": 30, "fit_epochs": 2,
              "checkpoint_every": 35, "eval_every": 1_000, "eval_episodes": 1}  # fmt: skip
    assert_resumed(lambda dir: ra.PETS("Pendulum-v1", dir=dir, **fields), 70, 44, tmp_path)


def test_what_has_members_is_fitted_member_by_member():
    """Each member's batches are a bootstrap of its own, with replacement, the same in every epoch."""
    batch, twins = played("Pendulum-v1", 100).everything(), Twins(3, 1, 4)
    twins.seen = []
    fit(twins, Adam(twins.parameters(), 1e-3), batch, 2, 50)
    assert [items.shape for items in twins.seen] == [(2, 50, 8)] * 4
    ids = torch.stack([torch.cat(twins.seen[k : k + 2], 1) for k in (0, 2)])[..., 7].sort(-1).values  # (epochs, members, 100)
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0, 0], ids[0, 1])
    assert all(50 < len(member.unique()) < 80 for member in ids[0])


def test_contracts_are_of_what_something_has_and_not_of_its_class():
    assert lacking(Ensemble(3, 1, (8,), 2), Trained) == []
    assert lacking(Network(3, 1, 4), Trained) == []
    assert lacking(Mute(3, 1, 4), Trained) == ["prepare"]
    assert lacking(Slope(), Conditioned) == []
    assert lacking(Slope(), Trained) == ["members", "prepare"]
    assert lacking(GaussianProcess(3, 1, lambda x, y, x_next: x[..., 0]), Conditioned) == []
    assert lacking(Ensemble(3, 1, (8,), 2), Conditioned) == ["motion", "hold", "condition"]


def test_dynamics_of_a_users_own_are_conditioned():
    source = played("Pendulum-v1", 50)
    slope = Slope()
    fits = Conditioning(slope, 300, 0.05)
    found = fits(source)
    assert fits.least == 2
    assert found["dynamics/points"] == 50
    assert slope.log.item() == pytest.approx(1, abs=1e-3)
    batch = source.everything()
    design = np.concatenate([batch.y.numpy(), [[np.exp(0.5 * slope.log.item())]]])
    target = np.append((batch.x_next - batch.x)[:, 0].numpy(), 0)
    assert slope.b.item() == pytest.approx(np.linalg.lstsq(design, target, rcond=None)[0][0], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("MPC", {"dynamics": "test_learned:Silent", "fit_every": 30}, r"^dynamics=Mute: .* has no prepare \(rlamort\."),
        ("SVG1", {"dynamics": "test_learned:Silent"}, "^dynamics=Mute: .* has no prepare .* dynamics=ensemble has all$"),
        ("SVG_INF", {"dynamics": "test_learned:Silent"}, "^dynamics=Mute: .* has no prepare"),
        ("SVG_H", {"expansion.dynamics": "test_learned:Silent"}, r"^expansion\.dynamics=Mute: .* has no prepare"),
        ("POPLIN_P", {"dynamics": "test_learned:Silent"}, "^dynamics=Mute: .* has no prepare"),
        ("PILCO", {"dynamics": ME, "env": CARTPOLE}, "One of yours needs motion, hold, condition"),
        ("MPC", {"dynamics": ME}, "^fit_every=0: with dynamics=Network 1 or more is needed"),
        ("PETS", {"fit_hold_out": 1}, "^fit_hold_out=1: every episode would be held out"),
    ],
)
def test_dynamics_that_do_not_say_how_they_learn_are_refused(method, fields, message):
    fields = dict(fields)
    with pytest.raises(UserError, match=message):
        getattr(ra, method)(fields.pop("env", "Pendulum-v1"), device="cpu", **fields)


# too few transitions

FEW = {"hidden": [8], "device": "cpu", "buffer_size": 200}
FIRST = [
    ("PETS", {"warmup_steps": 3}, "warmup_steps=3, update_after=3, fit_every=200: the first fit would find 3 "),
    ("PETS", {"warmup_steps": 100, "fit_every": 4}, "fit_every=4: the first fit would find 4 "),
    ("PETS", {"warmup_steps": 3, "num_envs": 2}, "would find 4 transitions"),
    ("PETS", {"warmup_steps": 0}, "warmup_steps=0, .* would find 1 "),
    ("POPLIN_P", {"warmup_steps": 50, "fit_every": 3}, "would find 3 "),
    ("SVG1", {"warmup_steps": 50, "update_after": 2, "compile": False}, "update_after=2, .* would find 2 "),
    ("SVG_H", {"warmup_steps": 4, "compile": False}, r"warmup_steps=4, .*expansion\.fit_every=200: .* would find 4 "),
    ("SVG_INF", {"warmup_steps": 50, "fit_every": 4, "compile": False}, "would find 4 "),
]


@pytest.mark.parametrize(("method", "fields", "message"), FIRST)
def test_a_first_fit_that_would_find_too_little_is_refused_before_a_run_begins(method, fields, message, tmp_path, monkeypatch):
    """And what is said is what it would find: the fit itself counts as many, where it comes to that."""
    with pytest.raises(UserError, match=message) as said:
        getattr(ra, method)("Pendulum-v1", dir=str(tmp_path / "run"), **FEW, **fields)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("rlamort.run.learner.require_enough", lambda *given: None)
    learner = getattr(ra, method)("Pendulum-v1", **FEW, **fields)
    with pytest.raises(UserError, match=r"a fit of the dynamics finds (\d+) transitions; at least 5") as later:
        learner.learn(60)
    count = str(later.value).split("finds ")[1].split()[0]
    assert f"would find {count} transitions, and the dynamics need at least 5" in str(said.value)


def test_a_fit_that_finds_enough_is_not_refused():
    small = {**FEW, "fit_epochs": 1, "horizon": 2, "samples": 4, "planner.elites": 2, "dynamics.members": 1}
    learner = ra.PETS("Pendulum-v1", warmup_steps=5, **small).learn(6)
    assert int(learner.agent.adam.steps) == 1
    with pytest.raises(UserError, match="a fit of the dynamics finds 3 transitions"):  # the others are held out
        ra.PETS("Pendulum-v1", warmup_steps=6, fit_hold_out=2, max_episode_steps=3, **small).learn(7)


def test_an_agent_whose_first_fit_never_came_can_be_loaded(tmp_path, monkeypatch):
    """Nothing that was saved before runs were refused is lost: it acts."""
    with monkeypatch.context() as before:
        before.setattr("rlamort.run.learner.require_enough", lambda *given: None)
        ra.PETS("Pendulum-v1", warmup_steps=3, **FEW).learn(2).save(tmp_path / "agent")
    assert ra.load(tmp_path / "agent").predict([1.0, 0.0, 0.0], deterministic=True)[0].shape == (1,)


def test_of_processes_too():
    with pytest.raises(UserError, match=r"warmup_steps=2, .* would find 2 transitions, and the dynamics need at least 3"):
        ra.PILCO(CARTPOLE, warmup_steps=2, fit_every=50, device="cpu", buffer_size=200)


# POPLIN's regression


class Still(gymnasium.Env):
    """States are drawn, and nothing moves them."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


def planned(noise):
    """An agent that is to regress on 150 noisy actions, and a source of them."""
    env = open_env(Still)
    env.reset(0)
    source = Replay(env, buffer_size=500)
    torch.manual_seed(0)
    agent = POPLIN(env.spec, horizon=3, policy_hidden=(64,), policy_epochs=60, dynamics=parts.Ensemble(2))
    agent.random.fill_(0)
    for _ in range(150):
        source.collect(lambda: (0.3 * env.x[:, :1] + noise * torch.randn(1, 1)).clamp(-0.9, 0.9))
    return agent, source


def test_a_regression_ends_where_errors_on_what_is_held_out_no_longer_fall():
    agent, source = planned(noise=0.5)
    found, errors = {}, {}
    for patience in (0, 8, 1_000):
        torch.manual_seed(1)
        twin, met = copy.deepcopy(agent), []
        twin.policy_patience, error = patience, twin._error
        twin._error = lambda x, y, error=error, met=met: met.append(error(x, y)) or met[-1]
        found[patience], errors[patience] = twin.distil(source), torch.stack(met)
    assert "policy/epochs" not in found[0]
    assert len(errors[0]) == 1
    last, whole, short = errors[0][0], errors[1_000][:-1], errors[8][:-1]
    assert found[1_000]["policy/epochs"] == len(whole) == 60
    assert whole[-1] == last  # the same epochs, but for the weights that are kept
    best = int(short.argmin())
    assert found[8]["policy/epochs"] == len(short) == best + 1 + 8 < 60
    assert torch.equal(whole[: len(short)], short)
    for patience, met in ((8, short), (1_000, whole)):
        assert found[patience]["policy/held_out"] == met.min() < last


def test_a_regression_that_goes_on_falling_takes_all_epochs():
    agent, source = planned(noise=0.0)
    agent.policy_patience, agent.policy_epochs = 5, 6
    assert agent.distil(source)["policy/epochs"] == 6
