"""The guides: every block runs as it stands, in order, and what they say of numbers is what was measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from rlamort.envs.arm import Arm
from scipy import optimize

from rlamort.errors import UserError
from rlamort.measure.check import check
from rlamort.measure.claims import choosing
from rlamort.problem import draw

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.S | re.M)
PREAMBLE = """\
import shlex
import torch
from rlamort.cli import main
torch.manual_seed(0)
def run(command):
    code = main(shlex.split(command)[1:])
    assert code == 0, (code, command)
"""


def script(guide: Path, folder: Path) -> str:
    """A guide as one program; blocks that begin with `# NAME.py` become that file, commands run in the same process."""
    parts = [PREAMBLE]
    for language, block in BLOCK.findall(guide.read_text()):
        if named := re.match(r"# (\w+\.py)\n", block):
            (folder / named[1]).write_text(block)
        elif language == "python":
            parts.append(block)
        else:
            parts += [f"run({line!r})" for line in block.splitlines()]
    return "\n".join(parts)


@pytest.mark.parametrize("guide", ["one-objective", "problems", "environments", "constraints", "dcem", "planning"])
def test_a_guide_runs(guide, tmp_path):
    code = script(DOCS / f"{guide}.md", tmp_path)
    assert code.count("run('rlamort ") >= 1
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)


def test_the_table_in_the_guide_is_what_was_measured():
    kept = json.loads((DOCS / "results" / "choosing.json").read_text())
    (measured,) = kept.values()
    shown = (DOCS / "choosing.md").read_text().split("<!-- measured -->\n")[1].split("<!-- end -->\n")[0]
    assert shown.strip() == choosing.tables(measured["data"]).strip()
    assert all(passed for *_, passed in measured["verdicts"])


@pytest.mark.parametrize("lengths", [(1,), (0.5, 0.4, 0.2), (0.3, 0.2, 0.2, 0.1)])
def test_the_arms_hand_is_where_mujoco_says(lengths, device):
    arm = Arm(lengths).double().to(device)
    model = arm.model()
    data = mujoco.MjData(model)
    np.testing.assert_allclose(model.jnt_range[:, 1], arm.limit.numpy(force=True), rtol=1e-6)
    y = (2 * torch.rand(8, len(lengths) + 1, dtype=torch.float64, device=device) - 1) * arm.limit
    for angles, hand in zip(y.numpy(force=True), arm.hand(y).numpy(force=True), strict=True):
        data.qpos[:] = angles
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(data.site("hand").xpos, hand, atol=1e-7)


def test_the_arms_slope_is_mujocos_jacobian():
    arm = Arm().double()
    model = arm.model()
    data = mujoco.MjData(model)
    y = torch.tensor([[0.3, -0.4, 1.1, 0.7]], dtype=torch.float64)
    data.qpos[:] = y[0].numpy()
    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    jacobian = np.zeros((3, 4))
    mujoco.mj_jacSite(model, data, jacobian, None, data.site("hand").id)
    ours = torch.autograd.functional.jacobian(arm.hand, y)[0, :, 0]
    np.testing.assert_allclose(ours.numpy(), jacobian, atol=1e-7)


def test_the_arm_is_a_problem_whose_targets_can_be_reached(device):
    arm = Arm().double().to(device)
    torch.manual_seed(0)
    assert check(arm).ok
    x = draw(arm, 2)
    assert x.device.type == device.type
    for target in x:
        starts = torch.linspace(-1, 1, 9, dtype=torch.float64, device=device)[:, None] * arm.limit

        def cost(angles, target=target):
            y = torch.tensor(angles[None], dtype=torch.float64, device=device, requires_grad=True)
            value = arm.cost(y, target[None])
            (slope,) = torch.autograd.grad(value.sum(), y)
            return value.item(), slope[0].numpy(force=True)

        bounds = [(-limit, limit) for limit in arm.limit.tolist()]
        found = [optimize.minimize(cost, start, jac=True, bounds=bounds) for start in starts.numpy(force=True)]
        best = min(found, key=lambda one: one.fun)
        assert best.fun < arm.comfort
        assert arm.residual(torch.tensor(best.x[None], device=device), target[None]).item() < 1e-3


def test_an_arm_that_cannot_be_is_named():
    with pytest.raises(UserError, match=r"Arm.lengths=\[0.5, 0\]: at least one link"):
        Arm((0.5, 0))
    with pytest.raises(UserError, match=r"Arm.comfort=0: a positive number is needed"):
        Arm(comfort=0)


def test_what_the_table_calls_solutions_are_solutions(device):
    torch.manual_seed(0)
    portfolio = choosing.Portfolio().to(device)
    x = {name: part.double().to(device) for name, part in portfolio.contexts(3).items()}
    y = portfolio.solution(x)
    assert portfolio.domain.violation(y).max() < 1e-12
    slope = 2 * x["risk"] * y - x["gain"]
    gap = (slope * y).sum(-1) - slope.amin(-1)  # of Frank and Wolfe: it bounds f(y) - min f
    assert gap.abs().max() < 1e-12

    crates = choosing.Crates().to(device)
    x = {name: part.double().to(device) for name, part in crates.contexts(20).items()}
    best = crates.cost(crates.solution(x), x)
    total = torch.zeros_like(best)
    for i in range(6):  # goods do not meet in the cost, so every count of each can be tried
        one = {name: torch.zeros_like(part) for name, part in x.items()}
        one["demand"][:, i], one["price"][:, i] = x["demand"][:, i], x["price"][:, i]
        counts = torch.eye(6, dtype=torch.float64, device=device)[i] * torch.arange(9.0, device=device)[:, None]
        total += torch.stack([crates.cost(y.expand(20, 6), one) for y in counts]).amin(0)
    torch.testing.assert_close(best, total)


def test_a_contestant_is_measured_on_contexts_of_its_judge():
    judge = choosing.Judge(choosing.Crates())
    y = judge.problem.domain.project(torch.zeros(len(judge.x), 6))
    middle, best = judge.gap(y), judge.gap(judge.best.y)
    assert best == 0 < middle
    for loss, better in (("regress", True), ("objective", False)):  # the cost has no slope to learn from
        gap, seconds = judge.trained(choosing.Contestant("full", (loss,), 100), loss, seed=0)
        assert seconds > 0
        assert (gap < middle / 4) == better
