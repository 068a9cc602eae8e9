"""The arm beside an obstacle: geometry as MuJoCo has it, and solutions that touch nothing."""

import mujoco
import pytest
import torch
from torch import Tensor

from rlamort.constraints import Constraints
from rlamort.envs.arm import RADIUS
from rlamort.envs.obstacle import ObstacleArm, separation
from rlamort.errors import UserError
from rlamort.measure.check import check
from rlamort.objective import Cost
from rlamort.problem import draw
from rlamort.solve.by_scipy import by_scipy
from rlamort.solve.lagrangian import augmented_lagrangian

F64 = torch.float64


def distances(arm: ObstacleArm, y: Tensor, obstacle: Tensor) -> list[float]:
    """Between the surfaces of the sphere and of each link, by MuJoCo."""
    model = arm.model(obstacle.tolist())
    data = mujoco.MjData(model)
    data.qpos[:] = y.numpy()
    mujoco.mj_forward(model, data)
    sphere = model.geom("obstacle").id
    links = (model.geom(f"link{i}").id for i in range(len(arm.arm.lengths)))
    return [mujoco.mj_geomDistance(model, data, link, sphere, 10.0, None) for link in links]


def test_distances_are_those_of_mujoco():
    arm = ObstacleArm().double()
    torch.manual_seed(0)
    x = draw(arm, 6).double()
    y = arm.domain.uniform(6).double()
    parts = arm.layout.unpack(x)
    lacking = arm.constraints(y, parts)[1]  # (B, links)
    for i in range(6):
        assert lacking[i].tolist() == pytest.approx([arm.margin - one for one in distances(arm, y[i], x[i, 3:])], abs=1e-6)
    assert torch.allclose(arm.arm.joints(y)[:, -1], arm.arm.hand(y))
    assert (separation(arm.arm.joints(y), arm.arm.hand(y)).amin(-1) < 1e-12).all()


def test_contexts_have_solutions_that_the_obstacle_changes():
    arm = ObstacleArm(radius=0.1)
    torch.manual_seed(0)
    x = draw(arm, 500)
    base = torch.linalg.vector_norm(x[:, 3:], dim=-1)
    assert (base >= arm.distance).all()
    assert check(ObstacleArm()).ok
    assert (base < 2 * arm.arm.lengths.sum()).float().mean() > 0.8  # the rest is out of reach


def test_reference_solutions_are_feasible_and_as_good_as_those_of_scipy():
    arm = ObstacleArm().double()
    torch.manual_seed(1)
    x = draw(arm, 12).double()
    starts = arm.domain.project(torch.cat([torch.zeros(1, 12, 4), torch.randn(5, 12, 4)]).double().flatten(0, 1)).view(6, 12, 4)
    constraints, f = Constraints.of(arm), Cost(arm)
    found = augmented_lagrangian(f, constraints, arm.domain, x, starts, tol=1e-4)
    assert found.solved.all()
    assert (constraints.violation(found.y, x) <= 1e-4).all()
    assert all(min(distances(arm, y, place)) >= arm.margin - 1e-4 for y, place in zip(found.y, x[:, 3:], strict=True))
    assert (arm.residual(found.y, arm.layout.unpack(x)) < 2e-3).all()  # metres
    free = augmented_lagrangian(f, Constraints.none(arm), arm.domain, x, starts, tol=1e-4)
    touching = constraints.violation(free.y, x) > 1e-3
    assert 2 <= touching.sum() < 12  # the obstacle matters
    reference = by_scipy(arm, x[touching], found.y[touching])
    assert (reference.violation <= 1e-6).all()
    assert torch.allclose(found.cost[touching], reference.cost, atol=2e-5)


def test_an_obstacle_on_the_base_is_said_to_leave_nothing():
    arm = ObstacleArm().double()
    torch.manual_seed(1)
    x = draw(arm, 2).double()
    x[1, 3:] = torch.tensor([0.05, 0.0, 0.0])
    starts = torch.randn(3, 2, 4, dtype=F64)
    found = augmented_lagrangian(Cost(arm), Constraints.of(arm), arm.domain, x, starts, tol=1e-4)
    assert found.status[0] == "solved"
    assert found.status[1].startswith("infeasible: the violation, 0.14")  # what the first link lacks at its base
    assert found.violation[1].item() == pytest.approx(0.15 + 0.01 + RADIUS - 0.05, abs=1e-3)


@pytest.mark.parametrize("name", ["radius", "margin"])
def test_sizes_are_positive(name):
    with pytest.raises(UserError, match=f"ObstacleArm.{name}=0: a positive number is needed"):
        ObstacleArm(**{name: 0})
