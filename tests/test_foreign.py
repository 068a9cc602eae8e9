"""Stable-Baselines3 files: the same actions, and nothing in them is executed."""

import contextlib
import io
import json
import os
import pickle
import zipfile

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from rlamort.agents.sb3 import NEW
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

import rlamort as ra
from rlamort.config import methods, read_row, resolve
from rlamort.run.learner import learner_class
from rlamort.run.older import modern

OBSERVATIONS = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)

SB3 = [name for name in methods() if name.startswith("sb3/")]


def saved(algorithm, path, env="Pendulum-v1", **policy):
    kwargs = {"net_arch": [32, 16], **policy}
    model = getattr(stable_baselines3, algorithm)("MlpPolicy", env, policy_kwargs=kwargs, device="cpu", seed=0)
    model.save(path)
    return model


@pytest.mark.parametrize("algorithm", ["SAC", "TD3", "DDPG", "PPO"])
def test_the_loaded_agent_acts_as_the_saved_one(algorithm, tmp_path):
    model = saved(algorithm, tmp_path / "model.zip")
    agent = ra.load(f"sb3:{tmp_path / 'model.zip'}")
    assert agent.method == {"PPO": "sb3/ppo"}.get(algorithm, algorithm.lower())
    theirs, _ = model.predict(OBSERVATIONS, deterministic=True)
    ours, _ = agent.predict(OBSERVATIONS, deterministic=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["SAC", "TD3", "DDPG"])
def test_its_critics_and_targets_come_along(algorithm, tmp_path):
    model = saved(algorithm, tmp_path / "model.zip")
    with torch.no_grad():
        for p in model.critic_target.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save(tmp_path / "model.zip")
    agent = ra.load(f"sb3:{tmp_path / 'model.zip'}").agent
    x, y = torch.from_numpy(OBSERVATIONS), torch.rand(64, 1) * 2 - 1
    for theirs, ours in ((model.critic, agent.critic), (model.critic_target, agent.target_critic)):
        torch.testing.assert_close(ours(x, y), torch.cat(theirs(x, y), -1).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "fixed"), [({}, None), ({"ent_coef": "auto_0.2", "tau": 0.01, "batch_size": 64}, None), ({"ent_coef": 0.1}, 0.1)]
)
def test_learning_goes_on_with_its_temperature_and_settings(given, fixed, tmp_path):
    kwargs = {"policy_kwargs": {"net_arch": [8, 8]}, "target_entropy": -0.5, "learning_rate": 1e-3, "device": "cpu", **given}
    model = stable_baselines3.SAC("MlpPolicy", "Pendulum-v1", learning_starts=10, **kwargs).learn(60)
    model.save(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match="ent_coef is fixed at 0.1") if fixed else contextlib.nullcontext():
        agent = ra.load(f"sb3:{tmp_path / 'model.zip'}")
    theirs = torch.tensor(fixed) if fixed else model.log_ent_coef.exp()[0]
    torch.testing.assert_close(agent.agent.alpha(), theirs, rtol=1e-5, atol=0)
    values = {"target_entropy": -0.5, "learning_rate": 1e-3, "tau": model.tau, "batch_size": model.batch_size}
    assert {key: agent.config.values[key] for key in values} == values


def test_settings_of_other_agents_come_along_where_they_are_settings_here(tmp_path):
    path = tmp_path / "model.zip"
    stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", learning_rate=2e-3, batch_size=32, device="cpu").save(path)
    values = ra.load(f"sb3:{path}").config.values
    assert (values["learning_rate"], values["batch_size"]) == (2e-3, 32)
    stable_baselines3.TD3("MlpPolicy", "Pendulum-v1", learning_rate=0.0, tau=0.02, device="cpu").save(path)
    values = ra.load(f"sb3:{path}").config.values
    assert (values["learning_rate"], values["tau"]) == (resolve("td3", {}).values["learning_rate"], 0.02)


def test_it_can_learn_on(tmp_path):
    saved("SAC", tmp_path / "model.zip")
    agent = ra.load(f"sb3:{tmp_path / 'model.zip'}")
    with pytest.raises(ra.UserError, match="loaded without one; pass one to load"):
        agent.learn(10)
    agent = ra.load(f"sb3:{tmp_path / 'model.zip'}", env="Pendulum-v1")
    with pytest.warns(UserWarning, match=r"learn\(50\): the agent is as it was loaded"):
        agent.learn(50)
    assert agent.clock.env_step == 50


@pytest.mark.parametrize("method", SB3)
def test_stable_baselines3_learns_on_with_what_was_loaded(method, tmp_path):
    """With steps too small to matter, all networks stay what they were in the file."""
    off_policy = {"batch_size": 16, "tau": 1e-9, "warmup_steps": 20, "buffer_size": 500}
    fields = {"batch_size": 1024} if method == "sb3/ppo" else off_policy
    agent = learner_class(method)("Pendulum-v1", hidden=(16,), learning_rate=1e-9, **fields).learn(60)
    with torch.no_grad():
        for p in agent.agent.parameters():
            p.add_(torch.randn_like(p))
    agent.save(tmp_path / "kept")
    again, before = ra.load(tmp_path / "kept"), agent.clock.updates
    with pytest.warns(UserWarning, match=f"the policy and critics that were loaded; {NEW[again.agent.algorithm]}") as said:
        again.learn(60)
    assert [warning.filename for warning in said] == [__file__]
    torch.testing.assert_close(again.agent.state_dict(), agent.agent.state_dict(), rtol=0, atol=1e-5)
    assert method == "sb3/ppo" or again.clock.updates == 2 * before > 0
    again.learn(60)  # and does not say it again


def test_a_baseline_that_was_saved_with_keys_without_effect_still_loads(tmp_path):
    """They are refused today; `warmup_steps` has an effect in the rows that have a choice there."""
    agent = learner_class("sb3/ppo")("Pendulum-v1", hidden=(16,))
    agent.save(tmp_path / "kept")
    facts = json.loads((tmp_path / "kept" / "agent.json").read_text())
    facts["values"] |= {"warmup_steps": 100, "update_after": 100, "on_nan": "retry", "keep_checkpoints": 5, "tau": None}
    assert modern(read_row("sb3/sac"), facts["values"])["warmup_steps"] == 100
    (tmp_path / "kept" / "agent.json").write_text(json.dumps(facts))
    values = ra.load(tmp_path / "kept").config.values
    assert [values[key] for key in ("warmup_steps", "update_after", "on_nan", "keep_checkpoints")] == [1000, None, "stop", 2]


def test_a_file_of_ppo_learns_on_with_its_policy(tmp_path):
    model = saved("PPO", tmp_path / "model.zip")
    torch.nn.init.constant_(model.policy.action_net.bias, 1.5)
    model.save(tmp_path / "model.zip")
    agent = ra.load(f"sb3:{tmp_path / 'model.zip'}", env="Pendulum-v1")
    agent.agent.keywords["learning_rate"] = 1e-9
    with pytest.warns(UserWarning, match="learns on .*; the optimiser is new"):
        agent.learn(64)
    theirs, _ = model.predict(OBSERVATIONS, deterministic=True)
    np.testing.assert_allclose(agent.predict(OBSERVATIONS, deterministic=True)[0], theirs, rtol=0, atol=1e-4)


def test_what_was_not_loaded_begins_as_stable_baselines3_has_it():
    agent = learner_class("sb3/td3")("Pendulum-v1", hidden=(16,), buffer_size=500, warmup_steps=100, seed=1).learn(5)
    theirs = stable_baselines3.TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16]}, seed=agent.source.model.seed)
    torch.testing.assert_close(agent.agent.policy.state_dict(), theirs.policy.state_dict(), rtol=0, atol=0)


def actions_within(bound, dtype):
    """Pendulum with actions of these bounds."""
    box = gymnasium.spaces.Box(-bound, bound, (1,), dtype)
    return gymnasium.wrappers.TransformAction(gymnasium.make("Pendulum-v1"), lambda action: action, box)


@pytest.mark.parametrize("bound", [0.4, np.pi / 100, np.pi / 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bounds_that_the_file_rounds_are_those_of_its_environment(bound, dtype, tmp_path):
    env, path = actions_within(bound, dtype), tmp_path / "model.zip"
    saved("TD3", path, env)
    agent = ra.load(f"sb3:{path}", env=env)
    np.testing.assert_allclose(agent.agent.spec.high, env.action_space.high, rtol=1e-6)
    for other in (bound * (1 + 1e-5), 2 * bound):
        said = rf"its range of action\[0\] is \[-{str(other)[:5]}.*\]; the agent's is \[-{str(bound)[:5]}.*\], and"
        with pytest.raises(ra.UserError, match=said):
            ra.load(f"sb3:{path}", env=actions_within(other, dtype))


def test_float32_bounds_come_back_exactly(tmp_path):
    saved("SAC", tmp_path / "model.zip", "Humanoid-v5", net_arch=[8])
    agent = ra.load(f"sb3:{tmp_path / 'model.zip'}", env="Humanoid-v5").agent
    assert agent.spec.high == gymnasium.make("Humanoid-v5").action_space.high.tolist() != [0.4] * 17


@pytest.mark.parametrize(
    ("env", "message"),
    [("InvertedPendulum-v5", "observation size is 4; the agent's is 3"), ("Reacher-v5", "observation size is 10")],
)
def test_another_environment_is_said_by_what_differs(env, message, tmp_path):
    saved("TD3", tmp_path / "model.zip")
    with pytest.raises(ra.UserError, match=message):
        ra.load(f"sb3:{tmp_path / 'model.zip'}", env=env)


class Halved(FlattenExtractor):
    def forward(self, observations):
        return super().forward(observations) / 2


@pytest.mark.parametrize(
    ("algorithm", "policy", "given", "allowed"),
    [
        ("SAC", {"activation_fn": nn.LeakyReLU}, "activation_fn is .*LeakyReLU", "activation.ReLU"),
        ("TD3", {"activation_fn": nn.ReLU6}, "activation_fn is .*ReLU6", "activation.ReLU"),
        ("PPO", {"activation_fn": nn.Tanhshrink}, "activation_fn is .*Tanhshrink", "activation.Tanh"),
        ("SAC", {"activation_fn": nn.Tanh}, "activation_fn is .*Tanh", "activation.ReLU"),
        ("SAC", {"features_extractor_class": Halved}, "features_extractor_class is .*Halved", "layers.FlattenExtractor"),
    ],
)
def test_networks_that_would_act_otherwise_here_are_refused(algorithm, policy, given, allowed, tmp_path):
    saved(algorithm, tmp_path / "model.zip", **policy)
    with pytest.raises(ra.UserError, match=rf"its {given}'>; only [\w.]*{allowed} can be read"):
        ra.load(f"sb3:{tmp_path / 'model.zip'}")


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def rewritten(path, **members):
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in {**content, **members}.items():
            archive.writestr(name, value)


def test_what_is_pickled_in_it_is_never_executed(tmp_path):
    import base64

    path, hit = tmp_path / "model.zip", tmp_path / "hit"
    saved("SAC", path)
    bomb = pickle.dumps(Bomb(hit))
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    for value in data.values():
        if isinstance(value, dict) and ":serialized:" in value:
            value[":serialized:"] = base64.b64encode(bomb).decode()
    buffer = io.BytesIO()
    torch.save({"x": Bomb(hit)}, buffer)
    rewritten(path, data=json.dumps(data), **{"actor.optimizer.pth": bomb})
    ra.load(f"sb3:{path}")
    for member in ("pytorch_variables.pth", "policy.pth"):
        rewritten(path, **{member: buffer.getvalue()})
        with pytest.raises(ra.UserError, match="cannot be read as a Stable-Baselines3 file: UnpicklingError"):
            ra.load(f"sb3:{path}")
    assert not hit.exists()


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "model.zip"
    with pytest.raises(ra.UserError, match="there is no such file"):
        ra.load(f"sb3:{path}")
    np.savez(tmp_path / "data.npz", observations=OBSERVATIONS)
    with pytest.raises(ra.UserError, match=r"data\.npz: it is not a Stable-Baselines3 file, since it has no member 'data'"):
        ra.load(f"sb3:{tmp_path / 'data.npz'}")
    path.write_bytes(b"no zip")
    with pytest.raises(ra.UserError, match="BadZipFile"):
        ra.load(f"sb3:{path}")
    stable_baselines3.A2C("MlpPolicy", gymnasium.make("CartPole-v1")).save(path)
    with pytest.raises(ra.UserError, match="its spaces cannot be read"):
        ra.load(f"sb3:{path}")
    saved("TD3", path)
    rewritten(path, data=b" " * (65 * 2**20))
    with pytest.raises(ra.UserError, match=r"member 'data' would unpack to \d+ bytes"):
        ra.load(f"sb3:{path}")
