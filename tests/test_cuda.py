"""Everything on the GPU, here on fake CUDA tensors (see fake_cuda.py): whatever stays on the CPU is an error, and as the random
numbers are the CPU's, so are the results.

`pytest --fake-cuda FILE` runs the tests of another file that name a device in the same way.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, OnCuda, fake_cuda
from test_amortize import Known
from test_domain import DOMAINS, UNBOUNDED
from test_iterate import QP, Admm, N, Zeros

import rlamort as ra
from rlamort import parts
from rlamort.config import methods, read_row
from rlamort.domain import Affine, Ball, Box, Gaussian, PerItem, Polyhedron, Product, Simplex, SquashedGaussian
from rlamort.env.iterate import IterateEnv
from rlamort.env.make import open_env
from rlamort.errors import Fault, UserError
from rlamort.host.graphs import close
from rlamort.host.machine import device_of
from rlamort.problem import draw
from rlamort.run.learner import learner_class
from rlamort.run.rounds import Eager
from rlamort.solve import solver as module
from rlamort.solve.classical import best_found

CPU = torch.device("cpu")
SMALL = {"hidden": [8], "batch_size": 8, "compile": False, "eval_episodes": 2, "seed": 3}
CONTROL = {"env": "Pendulum-v1", "warmup_steps": 6, "update_after": 6, "buffer_size": 100, "max_episode_steps": 5}
# learning the usual dictionary takes ten seconds; in float64, since their first gradients are 0 but for rounding
PATCHES = {"env_kwargs": {"side": 4, "atoms": 8}, "dtype": "float64"}
EXPERT = {"env": "Pendulum-v1", "max_episode_steps": 5, "expert": "test_cuda:Damped", "label_budget": 8}
PLANNER = {"horizon": 3, "model.update.samples": 8, "model.update.elites": 2}
FITTED = {**PLANNER, "fit_every": 6, "fit_epochs": 1}
OWN = {
    **dict.fromkeys(("lista", "psd", "slista"), PATCHES),
    "mpc": {**PLANNER, "update_after": None, "warmup_steps": 0},
    "pets": FITTED,
    **dict.fromkeys(("poplin_a", "poplin_p"), FITTED),
    "svg_inf": {"horizon": 3, "fit_every": 6, "fit_steps": 1, "policy_steps": 1},
    "gps": {"env": "rlamort.envs.lqr:Lqr", "max_episode_steps": 1, "num_envs": 1, "rollouts": 2, "policy_steps": 2},
    "amortize": {"env": "rlamort/Sphere-v0"},
    **dict.fromkeys(("bc", "dagger"), EXPERT),
}


class Damped:
    """An expert on the host."""

    def predict(self, observation):
        return -observation[:, 2:]


def on_both(monkeypatch, work):
    """What `work(device)` returns, tensors by name, on the CPU and on a fake GPU; they are the same, and on their device."""
    torch.manual_seed(0)
    expected = work(CPU)
    torch.manual_seed(0)
    with fake_cuda(monkeypatch):
        found = work(CUDA)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert isinstance(value, OnCuda), f"{name} is on the CPU"
            assert close(*(part.nan_to_num().double() for part in (value.cpu(), expected[name]))), name


def trained(name, device, steps=None, **more):
    """All tensors of a learner that has acted, updated and been scored."""
    row = read_row(name)
    replayed = row["source"].startswith("rlamort.source.Replay")
    fields = {**SMALL, **(CONTROL if replayed else {}), **OWN.get(name, {}), **more}
    env = fields.pop("env", row.get("env"))
    learner = learner_class(name)(env, device=str(device), **fields)
    learner.learn(steps or (8 if replayed else 2))
    assert np.isfinite(learner.score().returns).all()
    replay = learner.source.everything()._asdict() if replayed else {}
    learner.close()
    return {**learner.agent.state_dict(), **replay}


@pytest.mark.parametrize("name", [name for name in methods() if "/" not in name])
def test_every_method_acts_updates_and_is_scored_on_the_device(name, monkeypatch):
    on_both(monkeypatch, functools.partial(trained, name))


@pytest.mark.parametrize("name", DOMAINS)
def test_every_domain_is_on_the_device(name, monkeypatch):
    def work(device):
        domain = copy.deepcopy(DOMAINS[name]).to(device)
        v = torch.randn(5, domain.inputs, dtype=torch.float64).to(device)
        y = torch.randn(5, domain.dim, dtype=torch.float64).to(device)
        nearest = domain.nearest(y.requires_grad_())
        (slope,) = torch.autograd.grad(nearest.sum(), y)
        more = {} if name in UNBOUNDED else {"linear": domain.linear(y)}
        rows = (domain.polyhedral() or {}) if list(domain.buffers()) else {}  # those without data do not know where they are
        return {"project": domain.project(v), "nearest": nearest, "slope": slope, "violation": domain.violation(y),
                "act": domain.act(v.tanh()), "uniform": domain.uniform(3, device), **more, **rows}  # fmt: skip

    on_both(monkeypatch, work)


SETS = {  # with data that come with each of 4 items
    "box": (Box(PerItem(3), PerItem(3)), lambda: {"low": -torch.rand(4, 3), "high": torch.rand(4, 3)}),
    "ball": (Ball(3, PerItem()), lambda: {"radius": 1 + torch.rand(4)}),
    "affine": (Affine(PerItem(2, 4), PerItem(2)), lambda: {"A": torch.randn(4, 2, 4), "b": torch.randn(4, 2)}),
    "polyhedron": (
        Polyhedron(torch.eye(4), PerItem(4), 2.0, torch.ones(1, 4), PerItem(1)),
        lambda: {"low": -torch.rand(4, 4), "b": torch.rand(4, 1)},
    ),
    "rows of items": (
        Polyhedron(PerItem(3, 4), -1.0, PerItem(3)),
        lambda: {"A": torch.randn(4, 3, 4), "high": torch.rand(4, 3)},
    ),
    "product": (Product([Simplex(3), Ball(2, PerItem())]), lambda: {"1.radius": torch.rand(4)}),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_whose_data_come_from_x_are_on_the_device(name, monkeypatch):
    domain, data = SETS[name]

    def work(device):
        at = copy.deepcopy(domain).to(device).bind({key: part.to(device) for key, part in data().items()})
        v, y = torch.randn(4, domain.inputs).to(device), torch.randn(4, domain.dim).to(device)
        return {"project": at.project(v), "nearest": at.nearest(y), "violation": at.violation(y), "empty": at.empty()}

    on_both(monkeypatch, work)


@pytest.mark.parametrize("density", [Gaussian(3), SquashedGaussian(3)])
def test_densities_are_on_the_device(density, monkeypatch):
    def work(device):
        lam = density.parameters.project(torch.randn(5, density.parameters.inputs).to(device))
        y, logq = density.sample(lam)
        return {"y": y, "logq": logq, "median": density.median(lam), "uniform": density.parameters.uniform(3, device)}

    on_both(monkeypatch, work)


PROBLEMS = [
    "rlamort/Arm-v0",
    "rlamort/ObstacleArm-v0",
    "rlamort/Sinusoids-v0",
    "rlamort/SparseRecovery-v0",
]  # not a method's own


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_is_amortized_on_the_device(name, monkeypatch):
    more = {"loss": "penalty"} if "Obstacle" in name else {}
    on_both(monkeypatch, functools.partial(trained, "amortize", steps=2, env=name, **more))


@pytest.mark.parametrize(
    ("model", "loss"),
    [("choice", "objective"), ("semi", "iterates"), ("recurrent", "regress"), ("latent", "objective"), ("full", "es")],
)
def test_every_model_and_loss_is_on_the_device(model, loss, monkeypatch):
    on_both(monkeypatch, functools.partial(trained, "amortize", steps=2, env=Known, model=model, loss=loss))


UPDATES = [
    parts.Adam(), parts.SpectralGradient(), parts.Cem(8, 2), parts.Icem(8, 2, 1, colour=0.0), parts.Mppi(8), parts.Lbfgs(),
    parts.LearnedGradient(),
]  # fmt: skip


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.label())
def test_every_solver_step_is_on_the_device(update, monkeypatch):
    model = parts.Unroll(parts.Full(), update, steps=2)
    on_both(monkeypatch, functools.partial(trained, "amortize", steps=1, env=Known, model=model))


def test_references_and_certificates_are_on_the_device(monkeypatch):
    monkeypatch.setattr(module, "CALIBRATION", 20)

    def work(device):
        solver = ra.amortize(Known, steps=2, hidden=(8,), batch_size=8, device=str(device), seed=0)
        x = solver.draw(3)
        with_gap = solver.solve(x, tol=1e-3, by="duality gap")
        spread = solver.solve(x, certify=True, by="split-conformal")
        rows = draw(solver.problem, 2, device)
        reference = best_found(solver.f, solver.problem.domain, rows, starts=2)
        return {"y": with_gap.y, "bound": with_gap.bound, "conformal": spread.bound, "reference": reference.y}

    on_both(monkeypatch, work)


def test_a_solver_as_an_environment_is_on_the_device(monkeypatch):
    def work(device):
        env = IterateEnv(QP(), Admm(QP(), N), Zeros(N), horizon=3, tol=1e-2, instances=2, device=device)
        env.reset(0)
        steps = [env.step(env.x[:, :1].tanh()) for _ in range(5)]
        return {"x": torch.stack([step.x_next for step in steps]), "reward": torch.stack([step.reward for step in steps])}

    on_both(monkeypatch, work)


def test_warm_up_on_a_problem_whose_set_holds_no_data_acts_on_the_device(monkeypatch):
    on_both(monkeypatch, functools.partial(trained, "sac", env=Known, max_episode_steps=None, steps=12))


@pytest.mark.parametrize("fault", ["bound", "draw", "generator", "view"])
def test_what_stays_on_the_cpu_is_an_error(fault, monkeypatch):
    """These tests can fail: one tensor is left behind on purpose, in each of the ways that there are."""

    class Left(Known):
        domain = Box([-1.0] * 6, [1.0] * 6)

        def cost(self, y, x):
            if fault == "bound":
                self.domain.low = self.domain.low.cpu()
            if fault == "draw":
                x = x + torch.randn(x.shape)
            if fault == "generator":
                x = x + torch.randn(x.shape, generator=torch.Generator(), device=x.device)
            if fault == "view":
                x = torch.from_numpy(x.numpy())
            return super().cost(self.domain.nearest(y), x)

    with (
        fake_cuda(monkeypatch),
        pytest.raises(Fault, match=r"Left.cost: .*(to be on the same device|'cuda' device type|can't convert cuda:0)"),
    ):
        open_env(Left, count=2, device=CUDA)


def test_a_gpu_that_is_not_there_is_named_before_any_work(monkeypatch):
    with fake_cuda(monkeypatch):
        assert device_of("auto") == device_of("cuda") == device_of("cuda:0") == CUDA
        with pytest.raises(UserError, match=r"device=cuda:7: there is no such GPU; allowed: auto, cpu, cuda:0 \(Fake\)"):
            ra.SAC("Pendulum-v1", device="cuda:7")


def test_tf32_holds_while_it_works_and_needs_a_gpu_that_has_it(monkeypatch, tmp_path):
    settings, seen = torch.backends.cuda.matmul, set()
    small = {"matmul": "tf32", **SMALL, **{key: value for key, value in CONTROL.items() if key != "env"}}
    with pytest.raises(UserError, match=r"matmul=tf32: a GPU of .* 8.0 .* on cpu float32 and bfloat16 are allowed"):
        ra.SAC("Pendulum-v1", device="cpu", **small)
    with fake_cuda(monkeypatch):
        learner = ra.SAC("Pendulum-v1", device="cuda", **small)
        evaluate = learner.agent.evaluate
        monkeypatch.setattr(learner.agent, "evaluate", lambda batch: seen.add(settings.fp32_precision) or evaluate(batch))
        learner.learn(8)
        assert seen == {"tf32"}
        assert settings.fp32_precision == "none"
        learner.save(tmp_path / "agent")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(UserError, match=r"matmul=tf32: .* on cuda:0 \(capability 7.5\)"):
            ra.SAC("Pendulum-v1", device="cuda:0", **small)
    monkeypatch.undo()
    assert ra.load(tmp_path / "agent").predict(np.zeros(3))[0].shape == (1,)  # a GPU is not needed to act


@pytest.mark.parametrize("count", [1, 3])
def test_with_overlap_actions_are_those_of_the_policy_before_the_latest_updates(count, monkeypatch):
    """On the GPU, beside a loop on the CPU that says so."""
    fields = SMALL | CONTROL | {"num_envs": count, "utd": "2/3"}
    env = fields.pop("env")

    def before(updates, agent):
        def rounds(improves, x, h):
            if not improves:
                return updates(improves, x, h)
            with torch.no_grad():
                y = agent.act(x, explore=True)
            return updates(improves, None, h)[0], y, h

        return rounds

    def work(device):
        learner = ra.SAC(env, device=str(device), overlap=device == CUDA, **fields)
        if device == CPU:
            learner.updates = before(Eager(learner.agent, lambda: learner.source.sample(8)), learner.agent)
        learner.learn(18)
        assert learner.clock.updates == 2 * (18 - 6) // 3
        return {**learner.agent.state_dict(), **learner.source.everything()._asdict()}

    on_both(monkeypatch, work)


def test_overlap_is_refused_where_both_run_on_one_device(monkeypatch):
    with pytest.raises(UserError, match="overlap=true: Pendulum-v1 is stepped on cpu, where updates run too; device=cuda and"):
        ra.SAC("Pendulum-v1", device="cpu", overlap=True)
    with fake_cuda(monkeypatch), pytest.raises(UserError, match="overlap=true: Known is stepped on cuda:0, where"):
        ra.SAC(Known, device="cuda", overlap=True)
    with pytest.raises(UserError, match="overlap"):
        learner_class("amortize")(Known, overlap=True)
