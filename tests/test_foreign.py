"""Stable-Baselines3 files: the same actions, and nothing in them is executed."""

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
from torch import nn

import rlamort as ra

OBSERVATIONS = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)


def saved(algorithm, path, **policy):
    kwargs = {"net_arch": [32, 16], **policy}
    model = getattr(stable_baselines3, algorithm)("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, device="cpu", seed=0)
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


def test_it_can_learn_on(tmp_path):
    saved("SAC", tmp_path / "model.zip")
    agent = ra.load(f"sb3:{tmp_path / 'model.zip'}")
    with pytest.raises(ra.UserError, match="loaded without one; pass one to load"):
        agent.learn(10)
    agent = ra.load(f"sb3:{tmp_path / 'model.zip'}", env="Pendulum-v1")
    with pytest.warns(UserWarning, match=r"learn\(50\): the agent is as it was loaded"):
        agent.learn(50)
    assert agent.clock.env_step == 50


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
    rewritten(path, data=json.dumps(data), **{"pytorch_variables.pth": buffer.getvalue(), "actor.optimizer.pth": bomb})
    ra.load(f"sb3:{path}")
    rewritten(path, **{"policy.pth": buffer.getvalue()})
    with pytest.raises(ra.UserError, match="cannot be read as a Stable-Baselines3 file: UnpicklingError"):
        ra.load(f"sb3:{path}")
    assert not hit.exists()


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "model.zip"
    with pytest.raises(ra.UserError, match="there is no such file"):
        ra.load(f"sb3:{path}")
    path.write_bytes(b"no zip")
    with pytest.raises(ra.UserError, match="BadZipFile"):
        ra.load(f"sb3:{path}")
    saved("SAC", path, activation_fn=nn.Tanh)
    with pytest.raises(ra.UserError, match=r"its activation is .*Tanh.*; only ReLU can be read"):
        ra.load(f"sb3:{path}")
    stable_baselines3.A2C("MlpPolicy", gymnasium.make("CartPole-v1")).save(path)
    with pytest.raises(ra.UserError, match="its spaces cannot be read"):
        ra.load(f"sb3:{path}")
    saved("TD3", path)
    rewritten(path, data=b" " * (65 * 2**20))
    with pytest.raises(ra.UserError, match=r"member 'data' would unpack to \d+ bytes"):
        ra.load(f"sb3:{path}")
