"""Where tasks end, by the environment's own function, beside states that are learned."""

import gymnasium
import numpy as np
import pytest
import torch

import rlamort as ra
from rlamort.errors import UserError
from rlamort.source import Replay

OWN = {"dynamics.ends": "own", "dynamics.members": 2, "hidden": [8], "device": "cpu", "compile": False}


class Ledge(gymnasium.Env):
    """A point on a line that is pushed; beyond 1 it falls."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.x, {}

    def step(self, action):
        found = self.dynamics(*(torch.tensor(part)[None] for part in (self.x, action)))
        self.x, reward, continues = (part[0].numpy() for part in found)
        return self.x, float(reward), not continues, False, {}

    @staticmethod
    def dynamics(x, u):
        after = x + 0.5 * u
        return after, after[:, 0], (after[:, 0] < 1).to(x)


def test_equations_say_where_predicted_states_end():
    short = {"max_episode_steps": 20, "horizon": 4, "samples": 30, "fit_every": 20, "warmup_steps": 20, "fit_epochs": 2}
    agent = ra.PETS(Ledge, **short, **OWN).learn(21).agent
    x, y = torch.tensor([[0.0], [0.9], [0.9]]), torch.tensor([[1.0], [1.0], [-1.0]])
    moved = agent.dynamics.futures(x, y)
    assert moved.continues.tolist() == [[1, 0, 1]] * 2  # of each member; asked about x and y, as equations are
    path = agent.dynamics.follow(x, [y, y])
    assert path[1].continues.shape == (2, 3)


@pytest.mark.parametrize(
    ("env", "kwargs"), [("InvertedPendulum-v5", {}), ("Hopper-v5", {"exclude_current_positions_from_observation": False})]
)
def test_physics_say_where_tasks_end(env, kwargs):
    """On what was met, as the environment said itself."""
    short = {"horizon": 3, "samples": 16, "fit_every": 400, "warmup_steps": 400, "fit_epochs": 1}
    learner = ra.PETS(env, env_kwargs=kwargs, **short, **OWN).learn(399)
    assert isinstance(learner.source, Replay)
    met = learner.source.everything(n_step=1)
    continues = learner.agent.dynamics.ends.ends(met.x, met.y, met.x_next)
    assert met.terminated.any()
    assert torch.equal(continues == 0, met.terminated)
    path = learner.agent.dynamics.follow(met.x[:5], [met.y[:5]] * 2)
    assert set(torch.stack([one.continues for one in path]).unique().tolist()) <= {0.0, 1.0}


def test_ends_that_cannot_be_seen_are_refused():
    with pytest.raises(
        UserError, match=r"env=Hopper-v5: dynamics.ends=own: its ends read 1 positions that it does not observe"
    ):
        ra.PETS("Hopper-v5", horizon=3, **OWN)
    with pytest.raises(UserError, match=r"dynamics\.ends=own: env=MountainCarContinuous-v0: its state cannot be set"):
        ra.PETS("MountainCarContinuous-v0", horizon=3, **OWN)
