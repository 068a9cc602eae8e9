"""Parts: what a field chooses by name, nested, with fields of its own; and what a resume may change."""

import dataclasses

import pytest
import torch
import yaml
from test_cli import rlamort

import rlamort as ra
from rlamort import parts
from rlamort.config import FIXED, FREE, Part, convert, defaults, fields, marks, methods, nested, read_row, resolve
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume
from rlamort.run.stored import values_of

TINY = {"hidden": [8], "batch_size": 8, "threads": 1, "eval_episodes": 4, "eval_every": 10**6}


def every(base):
    return [base.named(name, "part") for name in base.names()]


@pytest.mark.parametrize("base", [parts.Model, parts.Update, parts.Adjoint, parts.Loss, parts.Teacher, parts.Critics])
def test_a_tree_makes_the_part_again(base):
    for part in every(base):
        tree = yaml.safe_load(yaml.safe_dump(part.tree()))
        assert convert("part", tree, base) == part
        assert dict(part.leaves("part"))["part"] == type(part).__name__


def test_what_is_said_of_a_part_may_be_typed_nested_or_dotted():
    said = [
        {"model": {"kind": "Unroll", "init": "prior", "update": {"kind": "Recurrent", "head": "gated"}, "steps": 3}},
        {"model": "Unroll", "model.init": "prior", "model.update": "Recurrent", "model.update.head": "gated", "model.steps": 3},
        {
            "model.steps": 3,
            "model.update.head": "gated",
            "model.update": "recurrent",
            "model.init": "middle",
            "model": "Unroll",
        },
        {"model": parts.Unroll(parts.Middle(), parts.Recurrent(head="gated"), 3)},
    ]
    found = [resolve("amortize", one).values["model"] for one in said]
    assert all(one == found[0] for one in found)
    assert nested({"model": "semi", "model.steps": 2}) == {"model": {"kind": "semi", "steps": 2}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "semy"}, "model=semy: there is none of that name.*Did you mean semi"),
        ({"model": "Unrol"}, "model=Unrol: .*Did you mean Unroll"),
        ({"model": {"kind": "semi", "memory": 3}}, "model.memory: Refined has no such key, only init, .*Recurrent has it"),
        ({"model.update.memory": 3}, "model.update: Full has no such key, only hidden, norm. Unroll has it"),
        ({"model": "recurrent", "model.update.memory": 0}, "model.update.memory=0: a whole number >= 1 is needed"),
        ({"model": {"kind": "recurrent", "update": {"head": "gatet"}}}, "model.update.head=gatet: additive, gated is needed"),
        ({"model": 3}, "model=3: full, .* or a mapping of keys"),
        ({"loss": {"sigma": 1.0}}, "loss.sigma: Objective has no such key, only start. Smoothed has it"),
        ({"model": "math.pi"}, "model=math.pi: it is a float; a class derived from rlamort.parts.Model is needed"),
        ({"model": "math:tau"}, "model=math:tau: it is a float; a class derived"),
        ({"model": "math.Pi"}, "model=math.Pi: module 'math' has no 'Pi'"),
        ({"model": "no_such.Module"}, "model=no_such.Module: no module 'no_such' could be imported from"),
        ({"model": parts.Unroll(steps=-1)}, "model.steps=-1: a whole number >= 0 is needed"),
        ({"iterations": 3}, "iterations: there is no such key. It is model.steps now"),
    ],
)
def test_what_does_not_fit_is_said_with_its_neighbours_and_its_owner(given, said):
    with pytest.raises(ra.UserError, match=said):
        resolve("amortize", given)


def test_a_row_may_be_like_another():
    iapo, sac = (resolve(name, {}) for name in ("iapo", "sac"))
    changed = {name for name, value in iapo.values.items() if value != sac.values[name]}
    assert changed == {"model", "loss"}
    assert resolve("ddpg", {}).values["critic"].members == 1
    assert read_row("ddpg")["agent"] == read_row("td3")["agent"]


def test_a_part_of_ones_own_is_named_by_its_module(tmp_path, monkeypatch):
    (tmp_path / "own_part.py").write_text(
        "from dataclasses import dataclass\nfrom rlamort import parts, update\n\n\n"
        "@dataclass(frozen=True)\nclass Half(parts.Update):\n    rate: float = 0.5\n\n"
        "    def __call__(self, setting, steps):\n        return update.Gradient(self.rate)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = resolve("amortize", {"model": {"kind": "Unroll", "update": "own_part.Half", "steps": 2}})
    tree = found.plain()["model"]["update"]
    assert tree == {"kind": "own_part.Half", "rate": 0.5}
    assert resolve("amortize", {"model": found.plain()["model"]}).values["model"] == found.values["model"]


@pytest.mark.parametrize("method", [name for name in methods() if not name.startswith("sb3/")])
def test_every_field_of_every_part_has_help(method):
    row = read_row(method)
    for name, value in defaults(row).items():
        if isinstance(value, Part):
            assert fields(row)[name].help
            for kind in type(value).__mro__[1].kinds() if type(value).__mro__[1] is not Part else [type(value)]:
                documented = kind.__doc__ or ""
                for field in dataclasses.fields(kind):
                    assert f"{field.name}:" in documented, (kind, field.name)


def test_marks_are_where_fields_are_declared():
    found = marks(resolve("sac", {"model": "recurrent"}))
    assert found["env"] is FIXED
    assert found["steps"] is FREE
    assert found["learning_rate"] is None
    assert found["critic.members"] is found["model.update.memory"] is found["model"] is FIXED
    assert found["model.keep_best"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.steps": 4}, "model.steps: the run in .* has 3, and 4 would make it another run"),
        ({"model": "full"}, "model: the run in .* has Refined, and Full would make it another run"),
        ({"hidden": [9]}, r"hidden: the run in .* has \(8,\), and \(9,\)"),
    ],
)
def test_a_resume_refuses_what_fixes_shapes(change, said, tmp_path):
    run = tmp_path / "run"
    learner_class("amortize")("rlamort/Arm-v0", model={"kind": "semi", "steps": 3}, dir=str(run), **TINY).learn(3).close()
    with pytest.raises(ra.UserError, match=said):
        resume(run, change)


@pytest.mark.parametrize("model", ["full", "choice", "semi", "recurrent", "latent", "start"])
def test_every_model_is_saved_and_resumed(model, tmp_path):
    """Whatever its parts share: what is written is what is read."""
    run = tmp_path / "run"
    learner = learner_class("amortize")("rlamort/Arm-v0", model=model, dir=str(run), **TINY).learn(4)
    x = torch.rand(3, 3).numpy()
    before = learner.predict(x)[0]
    learner.close()
    again, exactness = resume(run)
    assert exactness == "exact"
    assert (again.predict(x)[0] == before).all()
    again.learn(2, reset_num_timesteps=False).close()


def test_parts_are_typed_swept_and_kept(tmp_path):
    quick = [f"{key}={value}" for key, value in TINY.items() if key != "hidden"]
    common = ["train", "amortize", "env=rlamort/Arm-v0", "hidden=[8]", "steps=4", *quick]
    done = rlamort(*common, "model=semi", "model.steps=2", "model.rate=0.1", "dir=one", cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "one"
    kept = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["model"]
    assert (kept["kind"], kept["steps"], kept["rate"], kept["space"]) == ("Refined", 2, 0.1, "solution")
    swept = rlamort(*common, "-m", "model=full,choice", cwd=tmp_path).stdout
    assert "all 2 runs" in swept
    said = rlamort("train", "amortize", "env=rlamort/Arm-v0", "model.memory=3", cwd=tmp_path, code=2).stderr
    assert "model.memory: Full has no such key" in said
    assert "Recurrent has it" in said
    helped = rlamort("train", "iapo", "--help", cwd=tmp_path).stdout
    assert "model.update.head=gated  (additive, gated)" in helped


@pytest.mark.parametrize("name", ["own_part:Halved", "own_part.Halved"])
def test_parts_of_the_current_folder_are_found_as_environments_are(tmp_path, name):
    (tmp_path / "own_part.py").write_text(
        "from dataclasses import dataclass\nfrom rlamort import parts\n\n\n@dataclass(frozen=True)\n"
        "class Halved(parts.Model):\n    width: int = 8\n\n    def __call__(self, setting):\n"
        "        return parts.Full(hidden=(self.width,))(setting)\n"
    )
    quick = [f"{key}={value}" for key, value in TINY.items() if key != "hidden"]
    words = ["train", "amortize", "env=rlamort/Arm-v0", "steps=2", *quick, f"model={name}", "model.width=4", "dir=run"]
    rlamort(*words, cwd=tmp_path)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"] == {"kind": "own_part.Halved", "width": 4}


def test_keywords_of_an_environment_are_kept_for_its_evaluations():
    """A registered problem with env_kwargs is trained and evaluated, whose instance is shared."""
    learner = learner_class("lista")(
        "rlamort/SparseRecovery-v0", env_kwargs={"measurements": 8, "atoms": 12}, **{**TINY, "model.steps": 2}
    )
    learner.learn(2)
    assert len(learner.score(3).returns) == 3
    learner.close()


def test_what_a_file_names_is_not_imported(tmp_path, monkeypatch):
    """A part of somebody's own in a saved agent, a run or a solver: its module is not executed to find out what it is."""
    (tmp_path / "trap_part.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    learner_class("amortize")("rlamort/Arm-v0", model={"kind": "Unroll", "steps": 2}, dir=str(run), **TINY).learn(3).close()
    ra.amortize("rlamort/Arm-v0", model={"kind": "Unroll", "steps": 2}, steps=2, **TINY).save(tmp_path / "solver")
    for file in (run / "config.yaml", *(run / "ckpt").glob("step*/agent.json"), tmp_path / "solver" / "agent.json"):
        file.write_text(file.read_text().replace("LearnedGradient", "trap_part.Step"))
    said = "model.update: it is a trap_part.Step, which is not one of rlamort's"
    for attempt in (
        lambda: resume(run),
        lambda: ra.load_solver(tmp_path / "solver", "rlamort/Arm-v0"),
    ):
        with pytest.raises(ra.UserError, match=said):
            attempt()
    step = next((run / "ckpt").glob("step*"))
    (step / "manifest.json").unlink()
    with pytest.raises(ra.UserError, match=said):
        ra.load(step)


@pytest.mark.parametrize("kind", ["trap_kind:Step", "trap_kind.Step", "trap_kind:Step ", "trap_kind:a.b", "a.trap_kind:Step"])
def test_no_spelling_of_a_kind_is_imported(kind, tmp_path, monkeypatch):
    (tmp_path / "trap_kind.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ra.UserError, match=r"model: it is a .*trap_kind.*, which is not one of rlamort's"):
        values_of("amortize", {"model": {"kind": kind}})


def test_a_function_that_a_file_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "trap_step.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ra.UserError, match="dynamics: it is a trap_step:step, which is not one of rlamort's"):
        values_of("mpc", {"dynamics": {"kind": "Known", "step": "trap_step:step"}})
