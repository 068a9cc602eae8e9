"""Runs, agents and solvers that were written before models, losses and critics were parts: tests/older, by bafbb33.

pets is by 9f34ca2, before planners held out episodes and members could be smooth.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rlamort as ra
from rlamort.run.restore import resume

OLDER = Path(__file__).parent / "older"
EXPECTED = json.loads((OLDER / "expected.json").read_text())
RUNS = [name for name in EXPECTED if name != "solver"]


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    monkeypatch.syspath_prepend(OLDER)
    yield
    sys.modules.pop("small_recovery", None)


@pytest.mark.parametrize("name", RUNS)
def test_an_agent_answers_as_it_did(name):
    x, y = (np.array(part, np.float32) for part in EXPECTED[name])
    agent = ra.load(OLDER / name)
    assert agent.predict(x, deterministic=True)[0] == pytest.approx(y, abs=1e-5)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:.*the run was made with")
def test_a_run_goes_on(name, tmp_path):
    run = tmp_path / name
    shutil.copytree(OLDER / name, run)
    learner, _ = resume(run)
    before = learner.clock.env_step
    learner.learn(20, reset_num_timesteps=False)
    assert learner.clock.env_step == before + 20
    learner.close()


def test_a_solver_answers_as_it_did():
    x, y = (torch.tensor(part) for part in EXPECTED["solver"])
    solver = ra.load_solver(OLDER / "solver", "rlamort/Arm-v0")
    torch.testing.assert_close(solver.predict(x), y, rtol=0, atol=1e-5)
