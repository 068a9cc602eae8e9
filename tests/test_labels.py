"""Solutions that are found once, in bulk, and kept beside their contexts, and what is said of bad ones."""

import re
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_amortize import QUICK, Known, Portfolio
from test_cli import rlamort
from test_constrained_solver import Circle
from test_resume import assert_equal

import rlamort as ra
from rlamort import parts
from rlamort.errors import Preempted, UserError
from rlamort.losses import Regress
from rlamort.measure.check import check
from rlamort.problem import draw
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume
from rlamort.source import Contexts, Labelled

TAUGHT = {"loss": {"kind": "regress", "teacher": "labels"}}
Amortize = learner_class("amortize")


class Partly(Portfolio):
    """Its solution fails where x begins above 1: it raises there, or gives NaN, by turns."""

    def solution(self, x):
        if len(x) == 1 and x[0, 0] > 1.5:
            raise ValueError("no solution here")
        return torch.where(x[:, :1] > 1, torch.nan, self.domain.nearest(x))


class Outside(Portfolio):
    def solution(self, x):
        return self.domain.nearest(x) + 0.1 * (x[:, :1] > 1)


class Careless(Circle):
    """Its solution knows of no constraints."""

    def solution(self, x):
        return x[:, :2]


class Impossible(Circle):
    def constraints(self, y, x):
        h, g = super().constraints(y, x)
        return h + 100, g


class Steep(ra.Problem):
    """The nearest point of a plane, whose row has large coefficients; in closed form, which rounding and `off` change."""

    domain = ra.Euclid(3)
    scale, off = 1e5, 0.0

    def contexts(self, count):
        return torch.randn(count, 3)

    def cost(self, y, x):
        return (y - x).square().sum(-1)

    def constraints(self, y, x):
        return self.scale * (y.sum(-1, keepdim=True) - 0.5 * x[:, :1].tanh()), y[:, :0]

    def solution(self, x):
        return x - (x.sum(-1, keepdim=True) - 0.5 * x[:, :1].tanh()) / 3 + self.off


class Sought(Steep):
    scale = 1e4
    solution = ra.Problem.solution


class Beside(Steep):
    off = 1e-2


class BelowIt(Beside):
    """The same of an inequality."""

    def constraints(self, y, x):
        h, g = super().constraints(y, x)
        return g, h


class Two(ra.Problem):
    """Contexts that are a dict, of which a key is hidden."""

    domain = ra.Euclid(2)
    hidden = ("noise",)

    def contexts(self, count):
        return {"noise": torch.randn(count, 2), "centre": torch.randn(count, 2), "k": torch.randint(3, (count,))}

    def cost(self, y, x):
        return (y - x["centre"] - x["noise"] * x["k"][:, None]).square().sum(-1)

    def support(self, y, x):
        return (y - x["centre"]).square().sum(-1)


def stored(path, x, y, **more):
    arrays = {"x": np.asarray(x), "y": np.asarray(y), **more}
    (np.savez if path.suffix == ".npz" else lambda path, **arrays: save_file(arrays, path))(path, **arrays)
    return str(path)


@pytest.fixture
def contexts():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return draw(Known(), 60)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_labels_of_a_file_train_as_the_solution_does(tmp_path, contexts, suffix):
    """The same contexts in the same order: the teacher that is asked at every update gives bit for bit the same solver."""
    path = stored(tmp_path / f"labels{suffix}", contexts, Known().solution(contexts))
    learned = Amortize(Known, labels={"kind": "file", "path": path}, **TAUGHT, **QUICK)
    asked = Amortize(Known, dataset_size=60, loss="regress", **QUICK)
    asked.source.data = Contexts(contexts)
    for learner in (learned, asked):
        learner.agent.load_state_dict(asked.agent.state_dict())
        learner.randomness = type(learner.randomness)(3, learner.device)
        learner.learn(30)
    assert_equal(learned.agent.state_dict(), asked.agent.state_dict())
    assert learned.source.sample(7).y.shape == (7, 6)


@pytest.mark.parametrize("kind", ["solution", "search"])
def test_labels_are_solutions_of_their_contexts(kind):
    problem = Known if kind == "solution" else Portfolio
    learner = Amortize(problem, dataset_size=40, labels=kind, **TAUGHT, **QUICK)
    x, y = learner.source.sample(200)
    torch.testing.assert_close(y, Known().solution(x), atol=2e-3, rtol=0)
    assert len({tuple(one.tolist()) for one in x}) == len({tuple(one.tolist()) for one in torch.cat([x, y], -1)}) <= 40


def test_the_contexts_are_those_without_labels():
    with_labels, without = (
        Amortize(Known, dataset_size=20, seed=3, **more, **QUICK) for more in ({"labels": "solution", **TAUGHT}, {})
    )
    assert torch.equal(with_labels.source.data.x, without.source.data.x)
    assert_equal(with_labels.agent.state_dict(), without.agent.state_dict())


def test_a_teacher_is_asked_once():
    class Counting(Known):
        asked = 0

        def solution(self, x):
            Counting.asked += len(x)
            return super().solution(x)

    learner = Amortize(Counting, dataset_size=600, labels="solution", **TAUGHT, **QUICK)
    learner.learn(20)
    assert Counting.asked == 600


def test_contexts_that_are_a_dict_come_by_key(tmp_path):
    torch.manual_seed(0)
    problem = Two()
    x = problem.contexts(9)
    y = x["centre"] + x["noise"] * x["k"][:, None]
    path = tmp_path / "two.npz"
    np.savez(path, y=y, **{f"x.{key}": value for key, value in x.items()})
    learner = Amortize(problem, labels={"kind": "file", "path": str(path)}, **TAUGHT, **QUICK)
    assert torch.equal(learner.source.data.x, problem.layout.pack(x))
    assert problem.cost(learner.source.data.y, problem.layout.unpack(learner.source.data.x)).max() < 1e-10
    learner.learn(3)
    np.savez(path, y=y, **{"x.centre": x["centre"]})
    with pytest.raises(UserError, match=r"two.npz: it has no x.k, but y, x.centre"):
        Amortize(problem, labels={"kind": "file", "path": str(path)}, **TAUGHT, **QUICK)


def test_what_has_no_label_is_an_error_or_is_left_out_and_counted(tmp_path, contexts):
    y = Known().solution(contexts)
    y[[7, 20]], y[31, 2] = torch.nan, torch.inf
    labels = {"kind": "file", "path": stored(tmp_path / "some.npz", contexts, y)}
    with pytest.raises(UserError, match=r"some.npz: 3 of 60 items have no label, of which 7 is the first; labels.missing=drop"):
        Amortize(Known, labels=labels, **TAUGHT, **QUICK)
    with pytest.warns(UserWarning, match="3 of 60 items have no label, of which 7 is the first; they are left out"):
        learner = Amortize(Known, labels={**labels, "missing": "drop"}, **TAUGHT, **QUICK)
    assert torch.equal(learner.source.data.x, contexts[[i for i in range(60) if i not in (7, 20, 31)]])
    stored(tmp_path / "some.npz", contexts, torch.full_like(y, torch.nan))
    with pytest.raises(UserError, match="60 of 60 items have no label"):
        Amortize(Known, labels={**labels, "missing": "drop"}, **TAUGHT, **QUICK)


def test_a_solution_that_fails_for_some_items_is_counted_and_its_reason_said():
    fields = {"dataset_size": 200, "seed": 0, **TAUGHT, **QUICK}
    with pytest.raises(UserError, match=r"labels=solution: \d+ of 200 items have no label, of which \d+ is the first"):
        Amortize(Partly, labels="solution", **fields)
    with pytest.warns(UserWarning, match="they are left out") as said:
        learner = Amortize(Partly, labels={"kind": "solution", "missing": "drop"}, **fields)
    count = int(re.search(r"(\d+) of 200", str(said[0].message))[1])
    assert len(learner.source.data.x) == 200 - count < 200
    assert (learner.source.data.x[:, 0] <= 1).all()
    with warnings.catch_warnings():  # a search finds what the solution does not
        warnings.simplefilter("error")
        assert len(Amortize(Partly, labels="search", **fields).source.data.x) == 200


def test_labels_outside_the_domain_are_an_error(tmp_path, contexts):
    path = stored(tmp_path / "off.npz", contexts, Outside().solution(contexts))
    off = (contexts[:, 0] > 1).nonzero()[:, 0].tolist()
    with pytest.raises(
        UserError, match=rf"off.npz: {len(off)} of 60 labels lie outside Simplex, by up to .*, of which {off[0]} is"
    ):
        Amortize(Known, labels={"kind": "file", "path": path}, **TAUGHT, **QUICK)
    with pytest.raises(UserError, match=r"labels=solution: .* labels lie outside Simplex"):
        Amortize(Outside, dataset_size=50, labels="solution", **TAUGHT, **QUICK)


def test_labels_meet_the_constraints(tmp_path):
    """A search that knew of none gave the targets themselves, each of which is cheaper, and violates."""
    fields = {"dataset_size": 20, "seed": 0, **TAUGHT, **QUICK}
    x, y = Amortize(Circle, labels="search", **fields).source.data
    torch.testing.assert_close(y, torch.nn.functional.normalize(x[:, :2], dim=-1) * x[:, 2:], rtol=0, atol=1e-4)
    path = stored(tmp_path / "circle.npz", x, y)
    file = {**fields, "dataset_size": None}
    assert torch.equal(Amortize(Circle, labels={"kind": "file", "path": path}, **file).source.data.y, y)
    y[7] *= 1.1
    stored(tmp_path / "circle.npz", x, y)
    with pytest.raises(UserError, match=r"circle.npz: 1 of 20 labels violate Circle.constraints, by up to .*, of which 7 is"):
        Amortize(Circle, labels={"kind": "file", "path": path}, **file)
    with pytest.raises(UserError, match=r"labels=solution: 20 of 20 labels violate Careless.constraints, by up to"):
        Amortize(Careless, labels="solution", **fields)
    with pytest.raises(UserError, match=r"loss=regress: Careless.solution violates Careless.constraints by .* are needed"):
        Amortize(Careless, loss="regress", **QUICK)
    with pytest.raises(UserError, match=r"20 of 20 items have no label.*augmented Lagrangian: infeasible"):
        Amortize(Impossible, labels={"kind": "search", "starts": 1}, **fields)


def test_rounding_in_rows_with_large_coefficients_violates_nothing():
    """What is excused was in units of y, and compared with violations in those of the rows."""
    fields = {"dataset_size": 50, "seed": 0, **TAUGHT, **QUICK}
    for kind, labels in ((Steep, "solution"), (Sought, "search")):
        x, y = Amortize(kind, labels=labels, **fields).source.data
        torch.testing.assert_close(y, Steep().solution(x), rtol=1e-5, atol=1e-5)
    Amortize(Steep, loss="regress", **QUICK)
    said = {kind: next(line for line in check(kind()).lines if line.what == "solution") for kind in (Steep, Beside, BelowIt)}
    assert said[Steep].verdict == "pass", said[Steep].detail
    for kind in (Beside, BelowIt):
        assert "it violates the constraints by up to" in said[kind].detail
        with pytest.raises(UserError, match=rf"50 of 50 labels violate {kind.__name__}.constraints, by up to"):
            Amortize(kind, labels="solution", **fields)
        with pytest.raises(UserError, match=rf"{kind.__name__}.solution violates"):
            Amortize(kind, loss="regress", **QUICK)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": "solution"}, "dataset_size=null: labels are found once, for a data set; its size is needed"),
        ({"labels": "solution", "dataset_size": 9}, "labels=solution: Portfolio.solution returns None; labels=search takes"),
        ({"labels": "file"}, "labels.path: it is missing"),
        (
            {"labels": {"kind": "file", "path": "a.npz"}, "dataset_size": 9},
            "dataset_size=9: with labels=file the data set is all",
        ),
        ({"labels": {"kind": "file", "path": "none.npz"}}, "labels.path=none.npz: it cannot be read"),
        ({"labels": {"kind": "file", "path": "none.csv"}}, "labels.path=none.csv: a .npz or .safetensors file is needed"),
        ({"labels": "search", "dataset_size": 9, "loss": "objective"}, "labels=search: loss=objective does not use them"),
        ({"labels": "serach", "dataset_size": 9}, "Did you mean search"),
        ({}, "loss.teacher=labels: the data set has none; labels=solution, search or file is needed, too"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(fields, message):
    with pytest.raises(UserError, match=message):
        Amortize(Portfolio, **{**TAUGHT, **QUICK, **fields})


def test_a_file_that_was_cut_off_is_an_error(tmp_path):
    path = stored(tmp_path / "cut.npz", torch.zeros(4, 6), torch.zeros(4, 6))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut.npz: it cannot be read: File is not a zip file"):
        Amortize(Known, labels={"kind": "file", "path": str(path)}, **TAUGHT, **QUICK)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 6))}, "it has no labels y, but x"),
        ({"y": np.zeros((4, 6))}, "it has no x, but y"),
        ({"x": np.zeros((4, 6)), "y": np.zeros((4, 5))}, r"y has shape \(4, 5\); \(N, 6\) is needed"),
        ({"x": np.zeros((3, 6)), "y": np.zeros((4, 6))}, r"x has shape \(3, 6\); \(4, 6\) is needed, for 4 labels"),
        ({"x": np.full((4, 6), np.nan), "y": np.zeros((4, 6))}, "x is not finite in 4 of 4 items, of which 0 is the first"),
        ({"x": np.array(["a"]), "y": np.zeros((1, 6))}, "x holds <U1 of shape"),
        ({"x": np.array([None]), "y": np.zeros((1, 6))}, "it cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_a_file_of_other_things_is_an_error(tmp_path, arrays, message):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(UserError, match=rf"labels.path={re.escape(str(tmp_path))}/odd.npz: {message}"):
        Amortize(Known, labels={"kind": "file", "path": str(tmp_path / "odd.npz")}, **TAUGHT, **QUICK)


def test_a_batch_without_labels_is_an_error():
    with pytest.raises(UserError, match="a Contexts has no labels"):
        Regress(None)(None, None, Contexts(torch.zeros(2, 3)))
    assert Labelled(torch.ones(2, 3), torch.ones(2, 1)).through(lambda x: -x).x.sum() == -6


def test_a_stopped_run_goes_on_bit_for_bit_without_its_file(tmp_path, contexts):
    path = stored(tmp_path / "labels.npz", contexts, Known().solution(contexts))
    fields = {"labels": {"kind": "file", "path": path}, **TAUGHT, "hidden": (8,), "batch_size": 8, "eval_every": 100,
              "eval_episodes": 2, "checkpoint_every": 20, "env": "test_amortize:Known", "device": "cpu"}  # fmt: skip
    env = fields.pop("env")
    whole = Amortize(env, dir=str(tmp_path / "whole"), **fields).learn(60)
    broken = Amortize(env, dir=str(tmp_path / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(60, stop=lambda: broken.clock.env_step >= 30)
    broken.close()
    (tmp_path / "labels.npz").unlink()
    again, exactness = resume(tmp_path / "broken")
    assert exactness == "exact"
    again.learn(60 - again.clock.env_step, reset_num_timesteps=False)
    assert_equal(whole.agent.state_dict(), again.agent.state_dict())
    for key in ("source", "torch"):
        assert_equal(whole.state()[key], again.state()[key])
    assert again.config.values["labels"] == parts.File(path)
    kept = ra.load(tmp_path / "broken")  # playing needs none
    assert kept.predict(np.zeros(6, np.float32), deterministic=True)[0].shape == (6,)


def test_a_compiled_update_learns_from_labels():
    pair = [
        Amortize(Known, dataset_size=40, labels="solution", compile=compile, **TAUGHT, **QUICK).learn(10)
        for compile in (False, True)
    ]
    for one, other in zip(*(learner.agent.state_dict().values() for learner in pair), strict=True):
        torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-4)


def test_from_the_command_line(tmp_path, contexts):
    (tmp_path / "mine.py").write_text(
        "import torch, rlamort as ra\n\n\nclass Mine(ra.Problem):\n    domain = ra.Simplex(6)\n\n"
        "    def contexts(self, count):\n        return torch.randn(count, 6)\n\n"
        "    def cost(self, y, x):\n        return -(x * y).sum(-1) + 0.5 * y.square().sum(-1)\n"
    )
    stored(tmp_path / "labels.npz", contexts, Known().solution(contexts))
    words = ["train", "amortize", "env=mine:Mine", "loss=regress", "loss.teacher=labels", "steps=40", "compile=false"]
    done = rlamort(*words, "labels=file", "labels.path=labels.npz", "dir=run", cwd=tmp_path)
    assert "lower is better" in done.stdout
    (tmp_path / "supervised.yaml").write_text(
        "like: amortize\nloss: {kind: regress, teacher: labels}\nlabels: search\ndataset_size: 30\n"
    )
    assert "lower is better" in rlamort("train", "./supervised.yaml", "env=mine:Mine", "steps=9", cwd=tmp_path).stdout
    assert (
        "lower is better"
        in rlamort(
            "train", "./supervised.yaml", "env=mine:Mine", "steps=9", "labels=null", "loss=objective", cwd=tmp_path
        ).stdout
    )
