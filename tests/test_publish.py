"""Nothing that a user owns is overwritten or removed, and whatever fails leaves what was there."""

import json
import os
import shutil

import pytest
import torch

import rlamort as ra
from rlamort.host.publish import _replace, published_file
from rlamort.run.checkpoint import Checkpoints
from rlamort.run.restore import resume

SMALL = {
    "hidden": [16], "warmup_steps": 20, "batch_size": 16, "buffer_size": 300, "device": "cpu", "threads": 1, "eval_episodes": 1,
    "checkpoint_every": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def agent():
    return ra.TD3("Pendulum-v1", **SMALL).learn(30)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["thesis.txt", "agent.json", "agent.safetensors", "sub/agent.json", ".hidden"])
def test_a_folder_that_holds_anything_else_is_refused_before_it_is_touched(name, agent, tmp_path):
    project = tmp_path / "project"
    (project / name).parent.mkdir(parents=True)
    (project / name).write_text('{"mine": 1}')
    before = contents(tmp_path)
    with pytest.raises(ra.UserError, match=r"project: .*rlamort did not save|project: its .* is not one that rlamort wrote"):
        agent.save(project)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["project"]


def test_a_file_of_the_users_beside_a_saved_agent_is_kept(agent, tmp_path):
    agent.save(tmp_path / "kept")
    (tmp_path / "kept" / "notes.md").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ra.UserError, match=r"it holds notes.md, which rlamort did not save there"):
        agent.save(tmp_path / "kept")
    assert contents(tmp_path) == before


def test_the_current_folder_and_those_around_it_are_refused(agent, tmp_path, monkeypatch):
    here = tmp_path / "here" / "inside"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for given in (".", "..", str(here)):
        with pytest.raises(ra.UserError, match="the current folder lies there"):
            agent.save(given)
    assert here.is_dir()
    agent.save("agent")
    assert sorted(os.listdir(here)) == ["agent"]


def test_a_file_a_link_and_an_empty_folder(agent, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ra.UserError, match=r"file: it is a file; the name of a new folder is needed"):
        agent.save(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    agent.save(tmp_path / "empty")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    agent.save(tmp_path / "link")  # to where it points
    assert (tmp_path / "link").is_symlink()
    assert ra.load(tmp_path / "real").clock.env_step == 30
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "agent.json").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(ra.UserError, match="which rlamort did not save there"):
        agent.save(tmp_path / "mixed")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_saving_again_replaces_what_was_saved(agent, tmp_path):
    agent.save(tmp_path / "kept")
    other = ra.TD3("Pendulum-v1", **SMALL).learn(45)
    other.save(tmp_path / "kept")
    assert ra.load(tmp_path / "kept").clock.env_step == 45
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("fails", ["rename", "replace", "fsync", "mkdir", "open"])
@pytest.mark.parametrize("portable", [False, True])
def test_a_failure_at_any_point_leaves_the_old_one_or_the_new_one(fails, portable, agent, tmp_path, monkeypatch):
    """Every call that makes, renames or syncs fails in turn, the first, the second, ...; then none does."""
    if portable:
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())  # a system without renameat2
    other, real, kept = ra.TD3("Pendulum-v1", **SMALL), getattr(os, fails), tmp_path / "kept"
    other.save(kept)
    new = contents(kept)
    failed = 0
    for number in range(8):
        agent.save(kept)
        before, calls = contents(kept), []

        def failing(*arguments, number=number, calls=calls, **keywords):
            calls.append(arguments)
            if len(calls) == number + 1:
                raise OSError(28, "No space left on device")
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(os, fails, failing)
            try:
                other.save(kept)
            except OSError:
                failed += 1
        assert contents(kept) in (before, new)
        assert os.listdir(tmp_path) == ["kept"]
    assert failed or fails == "replace" or (fails == "rename" and not portable)
    assert contents(kept) == new


def test_the_swap_without_the_systems_help_is_undone_when_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    aside = _replace(tmp_path / "other", tmp_path / "one")
    assert (aside / "file").read_text() == "other"
    assert (tmp_path / "other" / "file").read_text() == "one"
    os.rename(aside, tmp_path / "one")
    real = os.rename

    def failing(source, target):
        if str(source).endswith("one"):
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        _replace(tmp_path / "other", tmp_path / "one")
    assert (tmp_path / "other" / "file").read_text() == "one"


def test_a_full_disk_leaves_the_agent_that_was_saved_before(agent, tmp_path):
    import resource
    import signal

    agent.save(tmp_path / "kept")
    before = contents(tmp_path / "kept")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
        with pytest.raises(OSError, match="File too large"):
            agent.save(tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(tmp_path / "kept") == before
    assert os.listdir(tmp_path) == ["kept"]


def test_a_solver_is_saved_by_the_same_rule(tmp_path):
    class Tracking(ra.Problem):
        domain = ra.Box([-1.0] * 2, [1.0] * 2)

        def contexts(self, count):
            return torch.randn(count, 2)

        def cost(self, y, x):
            return (y - x).square().sum(-1)

    solver = ra.amortize(Tracking, steps=3, hidden=[8], threads=1)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "thesis.txt").write_text("mine")
    with pytest.raises(ra.UserError, match=r"it holds thesis\.txt"):
        solver.save(tmp_path / "project")
    assert (tmp_path / "project" / "thesis.txt").read_text() == "mine"


def test_what_a_user_puts_among_the_checkpoints_stays(tmp_path):
    """Sweeping and pruning remove what rlamort wrote, by its names, and nothing else; of copies, the frames stay as well."""
    learner = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **{**SMALL, "buffer_size": 100}).learn(50)
    ckpt = tmp_path / "run" / "ckpt"
    newest = sorted(ckpt.glob("step_*"))[-1]
    mine = [
        ckpt / "step_notes" / "a.txt", ckpt / "frames" / "mine.safetensors", ckpt / ".tmp-mine" / "a.txt", newest / "note.txt",
        ckpt / "frames" / ".tmp-mine",
    ]  # fmt: skip
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    shutil.copytree(newest, ckpt / "the_best")
    (ckpt / "the_best" / "note.txt").unlink()
    frames = {one["name"] for one in json.loads((newest / "manifest.json").read_text())["segments"]}
    learner.learn(400, reset_num_timesteps=False)
    learner.close()
    Checkpoints(ckpt).sweep()
    assert all(path.read_text() == "mine" for path in mine)
    assert frames <= {path.name for path in (ckpt / "frames").iterdir()}
    assert not (newest / "manifest.json").exists()  # it was pruned, but for what is not rlamort's
    again, exactness = resume(tmp_path / "run", {})
    assert exactness == "exact"
    again.close()


@pytest.mark.parametrize("text", ["name: a project of mine\n", "- a list\n", "", "method: sac\n"])
def test_a_folder_with_a_config_of_somebody_elses_is_no_run(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "ckpt").mkdir()
    before = contents(tmp_path)
    with pytest.raises(ra.UserError, match="it is not a run directory"):
        resume(tmp_path, {})
    assert contents(tmp_path) == before


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    (tmp_path / "a.png").write_text("old")

    def write(text, fails):
        with published_file(tmp_path / "a.png") as fresh:
            fresh.write_text(text)
            assert fresh.suffix == ".png"
            assert not fails

    with pytest.raises(AssertionError):
        write("ha", fails=True)
    assert contents(tmp_path) == {"a.png": b"old"}
    write("new", fails=False)
    assert contents(tmp_path) == {"a.png": b"new"}
