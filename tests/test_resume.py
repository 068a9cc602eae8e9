"""A run that is killed and resumed is, bit for bit, the run that was not."""

import collections
import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import gymnasium
import numpy as np
import odd_envs
import pytest
import torch
import yaml
from counting import Factor
from test_cli import HERE, RLAMORT, rlamort

import rlamort as ra
from rlamort.errors import Preempted
from rlamort.host.machine import versions
from rlamort.run.capture import Captured
from rlamort.run.checkpoint import Checkpoints
from rlamort.run.learner import learner_class
from rlamort.run.restore import resume
from rlamort.run.session import Interrupts, Session
from rlamort.run.track import Records, read_records

SMALL = {
    "hidden": [16, 16], "warmup_steps": 60, "batch_size": 16, "buffer_size": 300, "device": "cpu", "eval_every": 100,
    "eval_episodes": 2, "log_every": 50, "checkpoint_every": 70, "steps": 400,
}  # fmt: skip


def assert_resumed(make, steps, at, folder):
    """A learner of `make(dir)` that stops after `at` steps and goes on is the uninterrupted one, which it returns resumed."""
    whole, broken = make(str(folder / "whole")).learn(steps), make(str(folder / "broken"))
    with pytest.raises(Preempted):
        broken.learn(steps, stop=lambda: broken.clock.env_step >= at)
    broken.close()
    again, exactness = resume(folder / "broken")
    assert exactness == "exact"
    again.learn(steps - again.clock.env_step, reset_num_timesteps=False)
    assert_equal(everything(whole), everything(again))
    assert timeless(folder / "whole") == timeless(folder / "broken")
    return again


def everything(learner):
    """All that must be equal, with what is never read again left out."""
    source, state = learner.source, learner.state()
    books = {name: getattr(source, name) for name in ("written", "first", "size", "follows", "opened", "begins")}
    live = torch.zeros(source.rows * source.slots, dtype=torch.bool)
    fifo = []
    for row in range(source.rows):
        entries = (source.first[row] + np.arange(source.size[row])) % source.slots
        starts = source.starts[row * source.slots + torch.from_numpy(entries)].long()
        fifo.append(starts)
        live[row * source.slots + starts] = True
        live_next = row * source.slots + (starts + 1) % source.slots
        fifo.append(source.x[live_next])
    frames = [getattr(source, name)[live] for name in ("x", "y", "reward", "terminated", "stop")]
    env = state["source"]["env"]
    return [learner.agent.state_dict(), books, fifo, frames, env, state["torch"], state["clock"] | {"seconds": 0}]


def assert_equal(one, other, where="state"):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    else:
        assert one == other, where


def timeless(run):
    return [{k: v for k, v in record.items() if not k.startswith("time/s")} for record in read_records(run)]


CASES = {
    "sac": ("sac", "InvertedPendulum-v5", {}),
    "td3": ("td3", "Pendulum-v1", {"n_step": 3, "normalise": True}),
    "ddpg": ("ddpg", "Hopper-v5", {"num_envs": 3}),
    "sac, workers": ("sac", "InvertedPendulum-v5", {"num_envs": 2, "vectorization": "async", "n_step": 2}),
    "ddpg, workers with several": ("ddpg", "Hopper-v5", {"num_envs": 5, "vectorization": "async", "num_workers": 2}),
    "td3, several updates": ("td3", "InvertedPendulum-v5", {"utd": 2, "num_envs": 2}),
    "td3, few updates": ("td3", "InvertedPendulum-v5", {"utd": 0.3, "num_envs": 2}),
}


@pytest.mark.parametrize(("case", "at"), [*((case, at) for case in CASES for at in (75, 333)), ("sac", 30), ("td3", 30)])
def test_stopped_and_resumed_is_uninterrupted(case, at, tmp_path):
    method, env, more = CASES[case]
    fields = {**SMALL, **more}
    whole = learner_class(method)(env, dir=str(tmp_path / "whole"), **fields).learn(400)
    broken = learner_class(method)(env, dir=str(tmp_path / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(400, stop=lambda: broken.clock.env_step >= at)
    broken.close()
    torch.rand(3)
    np.random.rand(3)
    again, exactness = resume(tmp_path / "broken", {})
    assert exactness == "exact"
    assert again.clock.env_step >= at
    again.learn(400 - again.clock.env_step, reset_num_timesteps=False)
    assert_equal(everything(whole), everything(again))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")
    whole.close()
    again.close()


def test_compiled_runs_resume_exactly_too(tmp_path):
    fields = {**SMALL, "compile": True, "threads": 1, "steps": 150}
    whole = ra.SAC("Pendulum-v1", dir=str(tmp_path / "whole"), **fields).learn(150)
    broken = ra.SAC("Pendulum-v1", dir=str(tmp_path / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(150, stop=lambda: broken.clock.env_step >= 97)
    broken.close()
    again, _ = resume(tmp_path / "broken", {})
    again.learn(150 - again.clock.env_step, reset_num_timesteps=False)
    assert isinstance(again.updates, Captured)
    assert_equal(everything(whole), everything(again))


COMMAND = [
    "sac", "env=InvertedPendulum-v5", "steps=1500", "hidden=[16,16]", "warmup_steps=50", "batch_size=16", "buffer_size=300",
    "eval_every=500", "eval_episodes=2", "log_every=50", "checkpoint_every=40", "device=cpu", "threads=1", "video=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    rlamort("train", *COMMAND, "dir=run", cwd=folder)
    return folder / "run"


def final_state(run):
    loaded = Checkpoints(run / "ckpt").newest()
    tensors = {name: (loaded.saved.path / name).read_bytes() for name in ("agent.safetensors",)}
    state = loaded.state
    for layer in ("records", "threads"):
        state.pop(layer)
    state["clock"]["seconds"] = 0
    return tensors, {k: v for k, v in state.items() if k not in ("numpy", "python")}


def kill_and_resume(folder, kills, seed, command=COMMAND):
    """`kills` times SIGKILL, wherever the run happens to be: updating, evaluating, writing a checkpoint."""
    rng = random.Random(seed)
    for _ in range(kills):
        arguments = [RLAMORT, "train", *command, "dir=run", "resume=auto"]
        with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            resumed = process.stdout.readline()  # from here on it trains
            assert resumed, process.stderr.read()
            time.sleep(rng.random() * 0.5)
            assert process.poll() is None, "the run ended before it could be killed"
            process.kill()
    rlamort("train", *command, "dir=run", "resume=auto", cwd=folder)


def test_killed_at_random_moments_and_resumed_is_uninterrupted(uninterrupted, tmp_path):
    kill_and_resume(tmp_path, 10, seed=0)
    assert_equal(final_state(uninterrupted), final_state(tmp_path / "run"))
    assert timeless(uninterrupted) == timeless(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sac", "td3", "ddpg"])
def test_two_hundred_kills(method, tmp_path):
    """67 kills a method, and the record of it in docs/results/kills.json."""
    command = [method, *(a for a in COMMAND[1:] if not a.startswith("steps")), "steps=20000", "n_step=2", "normalise=true"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    rlamort("train", *command, "dir=run", cwd=whole)
    kill_and_resume(killed, 67, seed=1, command=command)
    assert_equal(final_state(whole / "run"), final_state(killed / "run"))
    assert timeless(whole / "run") == timeless(killed / "run")
    record = HERE.parent / "docs" / "results" / "kills.json"
    kept = json.loads(record.read_text()) if record.exists() else {}
    kept[method] = {
        "command": f"pytest -m slow tests/test_resume.py -k {method}", "run": f"rlamort train {' '.join(command)}",
        "kills": 67, "resumes_identical": 67, "versions": versions(),
    }  # fmt: skip
    record.write_text(json.dumps(kept, indent=1) + "\n")


REFEREED = [
    "td3", "env=Pendulum-v1", "steps=90", "seed=3", "hidden=[8,8]", "batch_size=8", "warmup_steps=20", "buffer_size=60",
    "checkpoint_every=30", "keep_checkpoints=50", "log_every=30", "eval_every=45", "eval_episodes=1", "threads=1",
    "video=false", "dir={out}", "resume=auto",
]  # fmt: skip


@pytest.mark.slow
def test_an_outside_referee_kills_at_every_boundary_between_two_changes_of_files(tmp_path):
    """`pip install ckpt-chaos`; its verdicts go to docs/results/ckpt_chaos.json.

    It kills before each change of a file, in the middle of each write that it can cut, and by SIGTERM; what is resumed must go
    on from the newest whole checkpoint and end with the agent of an undisturbed run, byte for byte.
    """
    pytest.importorskip("ckpt_chaos", reason="needs the package ckpt-chaos")
    options = [
        "--checkpoint-glob", "{out}/ckpt/step_*", "--ckpt-ignore-size", "--step-regex", r"resumed at step (\d+)",
        "--result-file", "{out}/agent/agent.safetensors", "--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL",
        "--modes", "before,torn,term", "--max-points", "1000", "--jobs", "2",
    ]  # fmt: skip
    where = ["--work", str(tmp_path / "work"), "--junit", str(tmp_path / "points.xml")]
    train = [RLAMORT, "train", *REFEREED]
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_chaos", "run", *options, *where, "--", *train], capture_output=True, text=True, check=False
    )
    print(done.stdout)  # which points failed, if any
    points = list(ElementTree.parse(tmp_path / "points.xml").iter("testcase"))
    failed = [point.get("name") for point in points if len(point)]
    modes = collections.Counter(re.findall(r"\[(\w+)\]", " ".join(point.get("name", "") for point in points)))
    record = {
        "command": f"pytest -m slow tests/test_resume.py -k referee, with ckpt-chaos {version('ckpt-chaos')}",
        "referee": f"ckpt-chaos run {' '.join(options)}", "run": f"rlamort train {' '.join(REFEREED)}",
        "points": len(points), "modes": dict(sorted(modes.items())), "passed": len(points) - len(failed), "failed": failed,
        "versions": versions(),
    }  # fmt: skip
    assert len(points) > 100
    (HERE.parent / "docs" / "results" / "ckpt_chaos.json").write_text(json.dumps(record, indent=1) + "\n")
    assert done.returncode == 0, failed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(number, uninterrupted, tmp_path):
    process = subprocess.Popen(
        [RLAMORT, "train", *COMMAND, "dir=run"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, (output, errors)
    assert re.search(r"stopped at step \d+; `rlamort resume run` continues from there", output)
    assert "Traceback" not in errors
    done = rlamort("resume", "run", cwd=tmp_path)
    assert re.search(r"run: resumed at step \d+ \(exact\)", done.stdout)
    assert_equal(final_state(uninterrupted), final_state(tmp_path / "run"))
    assert timeless(uninterrupted) == timeless(tmp_path / "run")


def test_a_finished_run_can_be_made_longer(tmp_path):
    ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **{**SMALL, "steps": 150}).learn(150)
    done = rlamort("resume", "run", "steps=220", "video=false", cwd=tmp_path)
    assert "resumed at step 150 (exact)" in done.stdout
    assert ra.load(tmp_path / "run").clock.env_step == 220


def test_a_run_is_not_made_shorter_than_it_is(tmp_path):
    ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **{**SMALL, "steps": 150}).learn(155).close()
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ra.UserError, match=r"steps=100: the run in .*run has taken 155 already; at least as many are needed"):
        resume(tmp_path / "run", {"steps": 100})
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    for same in (150, 155):  # the last step of several environments may go beyond what was asked
        again, _ = resume(tmp_path / "run", {"steps": same})
        again.close()


def test_a_run_that_is_closed_is_free_whatever_was_forked_meanwhile(tmp_path):
    """As by Gymnasium's worker processes, which inherit what is open."""
    agent = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **SMALL).learn(30)
    workers = gymnasium.make_vec("Pendulum-v1", 1, "async")
    agent.close()
    again, _ = resume(tmp_path / "run")
    again.close()
    workers.close()


def test_two_processes_do_not_share_a_run(tmp_path):
    first = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **SMALL).learn(80)
    done = rlamort("resume", "run", cwd=tmp_path, code=2)
    assert f"another process has this run (process {os.getpid()} on" in done.stderr
    first.close()
    rlamort("resume", "run", "steps=90", "video=false", cwd=tmp_path)


def run_with_checkpoints(folder, steps=150):
    learner = ra.TD3("Pendulum-v1", dir=str(folder), **{**SMALL, "steps": steps}).learn(steps)
    learner.close()
    return sorted((folder / "ckpt").glob("step_*"))


@pytest.mark.parametrize("file", ["agent.safetensors", "agent.json", "state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "link"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(file, damage, tmp_path):
    older, newer = run_with_checkpoints(tmp_path / "run")
    target = newer / file
    content = target.read_bytes()
    target.unlink()
    if damage == "truncated":
        target.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        target.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        target.symlink_to(tmp_path / "elsewhere")
    if file == "manifest.json" and damage in ("flipped", "link"):
        pytest.skip("the manifest has no checksum of its own; what it says is checked")
    with pytest.warns(UserWarning, match=rf"checkpoint .*{newer.name}: .*{re.escape(file)}.*an earlier one is used"):
        again, _ = resume(tmp_path / "run", {})
    assert f"step_{again.clock.env_step:012d}" == older.name
    again.close()


def test_when_no_checkpoint_is_whole_the_run_is_refused(tmp_path):
    for path in run_with_checkpoints(tmp_path / "run"):
        (path / "state.safetensors").write_bytes(b"")
    for read in (resume, ra.load):
        with (
            pytest.warns(UserWarning, match="checksum differs") as said,
            pytest.raises(ra.UserError, match="none of its 2 checkpoints"),
        ):
            read(tmp_path / "run")
        assert str(said[0].message).endswith("its checksum differs; an earlier one is used")
        assert str(said[1].message).endswith("its checksum differs; there is no earlier one")


@pytest.mark.parametrize("name", ["../../../outside", "/etc/passwd", "..", ".hidden", "a/b"])
def test_a_manifest_cannot_name_files_outside(name, tmp_path):
    _, newer = run_with_checkpoints(tmp_path / "run")
    manifest = json.loads((newer / "manifest.json").read_text())
    for change in ({"files": {name: "0" * 64}}, {"segments": [{"name": name, "sha256": "0" * 64, "high": [1]}]}):
        (newer / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.warns(UserWarning, match="which is no file of this checkpoint"):
            again, _ = resume(tmp_path / "run", {})
        again.close()


def test_a_newer_format_is_refused_with_its_number(tmp_path):
    for path in run_with_checkpoints(tmp_path / "run"):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.warns(UserWarning, match="its format is 2; this rlamort reads format 1"), pytest.raises(ra.UserError):
        resume(tmp_path / "run", {})


def test_a_checkpoint_killed_between_writing_and_publishing_is_swept(tmp_path):
    _, newer = run_with_checkpoints(tmp_path / "run")
    shutil.copytree(newer, newer.parent / ".tmp-1234")
    (newer.parent / "frames" / ".tmp-5678").write_bytes(b"half")
    (newer.parent / "LATEST").unlink()  # as if killed between the rename and the pointer
    again, _ = resume(tmp_path / "run", {})
    assert f"step_{again.clock.env_step:012d}" == newer.name
    assert not list((tmp_path / "run" / "ckpt").rglob(".tmp-*"))
    again.close()


def test_a_full_disk_costs_a_warning_and_the_checkpoint_before_stays(tmp_path):
    """A limit on the size of files, at any point of the writing; training goes on, and the next checkpoint is whole."""
    learner = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **{**SMALL, "checkpoint_every": 10_000}).learn(100)
    kept = learner.durable.newest_step
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = random.Random(1)
    try:
        for _ in range(8):
            learner.durable.newest_step = -1  # as if there were something new
            held = sorted((tmp_path / "run" / "ckpt" / "frames").iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(1, 20_000), hard))
            with pytest.warns(UserWarning, match=r"checkpoint at step 100: File too large.*MiB are free.*training goes on"):
                learner.durable.save()
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert sorted((tmp_path / "run" / "ckpt" / "frames").iterdir()) == held  # it leaves nothing behind
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "run" / "ckpt").rglob(".tmp-*"))
    learner.learn(30, reset_num_timesteps=False)
    learner.close()
    again, _ = resume(tmp_path / "run", {})
    assert again.clock.env_step == 130 > kept
    assert_equal(everything(learner), everything(again))
    again.close()


def test_a_checkpoint_that_fails_is_tried_again_when_the_next_is_due(tmp_path, monkeypatch):
    learner = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **{**SMALL, "checkpoint_every": 40})
    monkeypatch.setattr(learner.durable.directory.checkpoints, "write", full_disk)
    with pytest.warns(UserWarning, match="No space left") as said:
        learner.learn(90)
    assert [str(one.message).split(":")[0] for one in said] == [f"checkpoint at step {step}" for step in (40, 80, 90)]
    learner.close()


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_checkpoints_cost_what_changed(tmp_path):
    """Each frame is written once; what the ring has overwritten goes, and only the newest steps stay."""
    learner = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **{**SMALL, "buffer_size": 250, "checkpoint_every": 20})
    learner.learn(400)
    ckpt = tmp_path / "run" / "ckpt"
    assert len(list(ckpt.glob("step_*"))) == 2
    assert (ckpt / "LATEST").read_text() == "step_000000000400"
    frames = sorted((ckpt / "frames").iterdir())
    assert 250 // 20 <= len(frames) <= 250 // 20 + 4
    assert max(f.stat().st_size for f in frames) < 3 * 20 * 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": "Hopper-v5"}, "env: the run in .* has Pendulum-v1, and Hopper-v5 would make it another run"),
        ({"hidden": [8]}, "hidden: "),
    ],
)
def test_changes_that_make_another_run_are_refused(change, message, tmp_path):
    run_with_checkpoints(tmp_path / "run")
    with pytest.raises(ra.UserError, match=message):
        resume(tmp_path / "run", change)


def test_a_refused_change_leaves_the_run_as_it_was(tmp_path):
    run_with_checkpoints(tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with (
        pytest.warns(UserWarning, match="buffer_size: 50 from here on"),
        pytest.raises(ra.UserError, match="buffer_size: what"),
    ):
        resume(tmp_path / "run", {"buffer_size": 50})
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    again, exactness = resume(tmp_path / "run")
    assert exactness == "exact"
    again.close()


def test_a_run_that_has_not_begun_may_become_another(tmp_path):
    """As one that has failed at its first episode, for lack of a time limit, say."""
    learner_class("td3")("Pendulum-v1", dir=str(tmp_path / "run"), **SMALL).close()
    with pytest.warns(UserWarning, match="max_episode_steps: 20 from here on"):
        again, _ = resume(tmp_path / "run", {"max_episode_steps": 20})
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_episode_steps"] == 20
    again.learn(60)
    again.close()
    with pytest.raises(ra.UserError, match=r"max_episode_steps: the run in .* has 20, and 30 would make it another run"):
        resume(tmp_path / "run", {"max_episode_steps": 30})


@pytest.mark.parametrize("env", ["MountainCarContinuous-v0", odd_envs.Good], ids=["name", "class"])
def test_a_run_that_has_not_begun_may_be_on_another_environment(env, tmp_path):
    run = tmp_path / "run"
    learner_class("td3")("Pendulum-v1", dir=str(run), **SMALL).close()
    with pytest.warns(UserWarning, match="env: .* from here on, Pendulum-v1 until now"):
        again, _ = resume(run, {"env": env})
    again.learn(60)
    again.close()
    with pytest.raises(ra.UserError, match=r"env: the run in .* has (Moun.*|odd_envs:Good), and Pendulum-v1 would make it"):
        resume(run, {"env": "Pendulum-v1"})
    again, exactness = resume(run)
    assert exactness == "exact"
    again.close()


def test_where_a_run_is_evaluated_may_change(tmp_path):
    run_with_checkpoints(tmp_path / "run")
    for changes, where in (
        ({"eval_env": "Pendulum-v1"}, "Pendulum-v1"),
        ({}, "Pendulum-v1"),
        ({"eval_env": None}, None),
        ({}, None),
    ):
        again, exactness = resume(tmp_path / "run", changes)
        assert (again.config.run.eval_env, exactness) == (where, "exact")
        again.close()


@pytest.mark.filterwarnings("ignore:eval_env. <lambda> is a function")
def test_an_evaluation_environment_that_had_to_be_passed_may_be_given_up(tmp_path):
    run = tmp_path / "run"
    learner = ra.TD3("Pendulum-v1", eval_env=lambda: gymnasium.make("Pendulum-v1"), dir=str(run), **SMALL).learn(60)
    learner.durable.save()
    learner.close()
    with pytest.raises(ra.UserError, match=r"eval_env: .* is a function"):
        resume(run)
    for changes in ({"eval_env": None}, {}):
        again, _ = resume(run, changes)
        assert again.config.run.eval_env is None
        again.close()


def test_an_environment_that_is_made_is_the_run_s_own(tmp_path):
    """Its arguments may differ where its name does not."""
    run = tmp_path / "run"
    learner = ra.TD3(gymnasium.make("Pendulum-v1", g=5.0), max_episode_steps=50, dir=str(run), **SMALL).learn(60)
    learner.durable.save()
    learner.close()
    refused = {
        r"env_kwargs: the run in .* has \{'g': 5.0\}, and None would": gymnasium.make("Pendulum-v1"),
        r"env_kwargs: the run in .* has \{'g': 5.0\}, and \{'g': 9.0\} would": gymnasium.make("Pendulum-v1", g=9.0),
        "max_episode_steps: the run in .* has 50, and 70 would": gymnasium.make("Pendulum-v1", g=5.0, max_episode_steps=70),
        "env: the run in .* has Pendulum-v1, and an instance with wrappers": Factor(gymnasium.make("Pendulum-v1", g=5.0)),
    }
    for message, env in refused.items():
        with pytest.raises(ra.UserError, match=message):
            resume(run, env=env)
    with pytest.raises(ra.UserError, match=r"num_envs: the run in .* has 1, and 3 would"):
        resume(run, env=gymnasium.make_vec("Pendulum-v1", 3, g=5.0))
    again, exactness = resume(run, env=gymnasium.make("Pendulum-v1", g=5.0))
    assert (exactness, again.clock.env_step) == ("exact", 60)
    again.close()


@pytest.mark.parametrize("name", ["Pendulum-v1", "Hopper-v5"])
def test_a_run_in_an_environment_that_is_made_goes_on_exactly_by_its_name_and_back(name, tmp_path):
    """Gymnasium puts a checker around what its users make, and none around what is made here."""
    whole, broken = (ra.TD3(gymnasium.make(name), dir=str(tmp_path / run), **SMALL) for run in ("whole", "broken"))
    whole.learn(300)
    with pytest.raises(Preempted):
        broken.learn(300, stop=lambda: broken.clock.env_step >= 100)
    broken.close()
    again, exactness = resume(tmp_path / "broken")
    assert exactness == "exact"
    with pytest.raises(Preempted):
        again.learn(300 - again.clock.env_step, reset_num_timesteps=False, stop=lambda: again.clock.env_step >= 200)
    again.close()
    back, exactness = resume(tmp_path / "broken", env=gymnasium.make(name))
    assert exactness == "exact"
    back.learn(300 - back.clock.env_step, reset_num_timesteps=False)
    assert_equal([whole.agent.state_dict(), whole.source.x], [back.agent.state_dict(), back.source.x])
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "broken")


@pytest.mark.filterwarnings("ignore:.*from here on")
def test_an_environment_that_is_made_comes_with_its_arguments_before_anything_is_recorded(tmp_path):
    for old, new in (("Pendulum-v1", "MountainCarContinuous-v0"), ("Pendulum-v1", "Pendulum-v1")):
        run, own = tmp_path / new, {"g": 9.0} if new == old else {}
        ra.TD3(gymnasium.make(old, g=5.0), dir=str(run), **SMALL).close()
        learner, _ = resume(run, env=gymnasium.make(new, **own))
        assert (learner.config.run.env, learner.config.run.env_kwargs) == (new, own or None)
        learner.learn(60)
        learner.durable.save()
        learner.close()
        again, _ = resume(run)  # by its name
        assert again.clock.env_step == 60
        again.close()


def test_a_finished_run_without_checkpoints_is_not_begun_anew(tmp_path):
    run = tmp_path / "run"
    learner = learner_class("sb3/ppo")("Pendulum-v1", dir=str(run), steps=64, log_every=32, eval_every=32, eval_episodes=1)
    learner.learn(64).save(run / "agent")
    learner.close()
    records = (run / "metrics.jsonl").read_bytes()
    config = (run / "config.yaml").read_text()
    for steps in (64, 100_000):  # which says nothing of how many Python was to learn
        (run / "config.yaml").write_text(config.replace("steps: 64", f"steps: {steps}"))
        with pytest.raises(ra.UserError, match="has finished, and sb3/ppo keeps no checkpoints to go on from, and beginning"):
            resume(run)
    assert (run / "metrics.jsonl").read_bytes() == records


def test_a_stopped_run_without_checkpoints_begins_anew_and_says_so(tmp_path, monkeypatch, capsys):
    run, session = tmp_path / "run", Session(lambda learner, path: None)
    fields = {**SMALL, "env": "Pendulum-v1", "steps": 64, "log_every": 20, "eval_every": 64, "checkpoint_every": 10}
    command = ("sb3/td3", {**fields, "dir": str(run), "resume": "auto"})
    count = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "should_stop", lambda self: next(count) >= 50)
        with pytest.raises(Preempted):
            session.start(*command)
    said = capsys.readouterr().out
    assert f"stopped at step 50; `rlamort resume {run}` begins anew, since sb3/td3 keeps no checkpoints" in said
    with pytest.warns(UserWarning, match=r"sb3/td3 keeps no checkpoints .* begins anew, and the 40 steps that .* are lost"):
        session.start(*command)
    assert [record["env_step"] for record in read_records(run) if "time/seconds" in record] == [20, 40, 60]
    assert ra.load(run).clock.env_step == 64
    capsys.readouterr()
    assert session.start(*command) == run  # a job that is queued again, when all is done
    assert capsys.readouterr().out.splitlines() == [f"{run}: it has finished", str(run)]
    with pytest.raises(ra.UserError, match="beginning anew would lose its records"):
        session.start(command[0], command[1] | {"steps": 100})


def test_a_stop_whose_checkpoint_cannot_be_written_promises_no_more_than_there_is(tmp_path, monkeypatch):
    learner = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **SMALL).learn(80)
    assert learner.durable.outlook == "continues from there"
    monkeypatch.setattr(learner.durable.directory.checkpoints, "write", full_disk)
    with pytest.warns(UserWarning, match="No space left"):
        learner.learn(10, reset_num_timesteps=False)
    assert learner.durable.outlook == "continues from step 80"
    learner.close()


@pytest.mark.parametrize("asked", ["td3", "svg_h", "own.yaml"])
def test_a_run_of_another_method_is_not_continued(asked, tmp_path):
    """Not even of a row that is like the run's."""
    run = tmp_path / "run"
    learner_class("sac")("Pendulum-v1", dir=str(run), **SMALL).close()
    if asked == "own.yaml":
        asked = str(tmp_path / asked)
        Path(asked).write_text("{like: sac, about: My own}")
    with pytest.raises(ra.UserError, match=rf"method: the run in .*run has sac, and {asked} would make it another run"):
        Session(lambda learner, path: None).start(asked, {"env": "Pendulum-v1", "dir": str(run), "resume": "auto"})
    with pytest.raises(ra.UserError, match=rf"method: what is saved there is of sac, not of {asked}; leave method out"):
        resume(run, method=asked)


def test_a_method_of_the_users_is_the_same_where_its_file_has_moved(tmp_path):
    own, run = tmp_path / "own.yaml", tmp_path / "run"
    own.write_text("{like: td3, about: My own, tau: 0.01}")
    learner_class(str(own))("Pendulum-v1", dir=str(run), **SMALL).learn(64).save(run / "agent")
    moved = own.rename(tmp_path / "moved.yaml")
    session = Session(lambda learner, path: None)
    command = {"dir": str(run), "env": "Pendulum-v1", "resume": "auto", "steps": 80}
    session.start(str(moved), command)
    assert read_records(run)[-1]["env_step"] == 80
    moved.rename(own).write_text("{like: td3, about: Another}")
    shutil.copy(own, moved)
    with pytest.raises(ra.UserError, match=r"method: the run in .* has .*moved.yaml, and .*another.yaml would make it another"):
        session.start(str(own.rename(tmp_path / "another.yaml")), command)


def test_a_repeated_command_changes_what_it_says_anew(tmp_path):
    """Neither what was chosen for the run's parts, nor what has changed since, as after a retry."""
    command = [
        "amortize", "env=rlamort/Sphere-v0", "model=semi", "steps=40", "eval_episodes=2", "log_every=20", "on_nan=retry",
        "device=cpu", "learning_rate=1e-3", "dir=run", "resume=auto",
    ]  # fmt: skip
    rlamort("train", *command, cwd=tmp_path)
    assert "resumed at step 40 (exact)" in rlamort("train", *command, cwd=tmp_path).stdout
    retried = ["learning_rate=5e-4", "on_nan=stop", "steps=60"]
    assert "learning_rate: 0.0005 from here on" in rlamort("resume", "run", *retried, cwd=tmp_path).stderr
    done = rlamort("train", *command, cwd=tmp_path)
    assert "resumed at step 60 (exact)" in done.stdout
    assert not done.stderr
    done = rlamort("train", *command, "steps=80", "learning_rate=1e-2", cwd=tmp_path)
    assert "resumed at step 60 (statistical)" in done.stdout
    assert "learning_rate: 0.01 from here on, 0.0005 until now" in done.stderr
    assert read_records(tmp_path / "run")[-1]["env_step"] == 80


def test_changes_are_safe_or_said(tmp_path):
    run_with_checkpoints(tmp_path / "run")
    again, exactness = resume(tmp_path / "run", {"eval_every": 40})
    assert exactness == "exact"
    again.close()
    with pytest.warns(UserWarning, match=r"learning_rate: 0.1 from here on, 0.001 until now"):
        again, exactness = resume(tmp_path / "run", {"learning_rate": 0.1})
    assert exactness == "statistical"
    assert again.agent.model_adam.learning_rate == 0.1
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["learning_rate"] == 0.1
    again.close()


def test_other_versions_make_a_resume_statistical(tmp_path, monkeypatch):
    run_with_checkpoints(tmp_path / "run")
    now = {"rlamort": "9", **{k: v for k, v in versions().items() if k != "rlamort"}}
    monkeypatch.setattr("rlamort.run.restore.versions", lambda: now)
    with pytest.warns(UserWarning, match="rlamort is 9 now; the run was made with 0.1.0"):
        again, exactness = resume(tmp_path / "run", {})
    assert exactness == "statistical"
    again.close()


class Opaque(odd_envs.Good):
    """It holds something whose state nobody can read."""

    def __init__(self):
        self.thing = object()


def test_where_an_environment_cannot_give_its_state_the_episode_ends_and_that_is_said(tmp_path):
    def start(folder):
        return ra.TD3(Opaque, dir=str(tmp_path / folder), **{**SMALL, "checkpoint_every": 55})

    learner = start("run")
    with pytest.raises(Preempted):
        learner.learn(200, stop=lambda: learner.clock.env_step >= 55)
    learner.close()
    shutil.copy(HERE / "odd_envs.py", tmp_path)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("env: Opaque", "env: test_resume:Opaque"))
    again, exactness = resume(tmp_path / "run", {})
    assert exactness == "exact but for the episode"
    assert again.source.written[0] == learner.source.written[0] + 1
    again.learn(60, reset_num_timesteps=False)
    batch = again.source.sample(2000)
    assert (batch.x_next - batch.x).unique().tolist() == [1]  # no transition leads from one episode into another
    again.close()


def test_a_run_that_was_killed_can_be_evaluated(tmp_path):
    learner = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **SMALL).learn(90)
    assert not (tmp_path / "run" / "agent").exists()
    assert_equal(ra.load(tmp_path / "run").agent.state_dict(), learner.agent.state_dict())


def test_the_newest_agent_of_a_run_is_loaded(tmp_path):
    """The one of a session's end, until a later session has a newer checkpoint."""
    run = tmp_path / "run"
    learner = ra.TD3("Pendulum-v1", dir=str(run), **SMALL).learn(90)
    learner.save(run / "agent")
    learner.close()
    assert ra.load(run).clock.env_step == 90
    again, _ = resume(run)
    again.learn(60, reset_num_timesteps=False)
    again.close()
    loaded = ra.load(run)
    assert loaded.clock.env_step == 150
    assert_equal(loaded.agent.state_dict(), again.agent.state_dict())
    for step in (run / "ckpt").glob("step_*"):
        (step / "state.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="checksum differs|the agent of step 90") as said:
        assert ra.load(run).clock.env_step == 90
    assert "none of its 2 checkpoints can be used; the agent of step 90 in" in str(said[-1].message)
    shutil.rmtree(run / "ckpt")
    assert ra.load(run).clock.env_step == 90


def test_nothing_that_loads_executes():
    """No pickle, marshal, eval, exec, unsafe YAML or unrestricted torch.load anywhere in the package."""
    root = Path(__file__).parent.parent
    forbidden = (
        r"\b(c?pickle|dill|joblib|marshal|shelve)\b|\beval\(|\bexec\(|yaml\.(load|unsafe_load|full_load)\(|weights_only=False"
    )
    for path in [p for folder in ("rlamort", "agents", "envs") for p in (root / folder).rglob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = re.search(forbidden, line)
            assert not found or "model.eval(" in line, f"{path}:{number}: {line}"
            assert "torch.load(" not in line or "weights_only=True" in line, f"{path}:{number}: {line}"


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ra.UserError, match=r"dir=.*file/run: it cannot be written: Not a directory"):
        ra.TD3("Pendulum-v1", dir=str(tmp_path / "file" / "run"), **SMALL)
    with pytest.raises(ra.UserError, match="it is a file; a folder is needed"):
        ra.TD3("Pendulum-v1", dir=str(tmp_path / "file"), **SMALL)


def test_a_full_disk_leaves_a_gap_in_the_records_and_says_so(tmp_path):
    records = Records(tmp_path / "metrics.jsonl")
    records.record(1, {"a": 1.0})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (records.size() + 5, hard))
        with pytest.warns(UserWarning, match="File too large; training continues without its records"):
            records.record(2, {"a": 2.0})
        records.record(3, {"a": 3.0})  # warnings are errors here, so a second one would fail
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    records.record(4, {"a": 4.0})
    assert read_records(tmp_path) == [{"env_step": 1, "a": 1.0}, {"env_step": 4, "a": 4.0, "records/missed": 2}]


def test_a_saved_agent_cannot_make_us_call_or_import_what_it_names(tmp_path):
    hit = tmp_path / "hit"
    ra.TD3("Pendulum-v1", **{**SMALL, "steps": 10}).save(tmp_path / "kept")
    file = tmp_path / "kept" / "agent.json"
    facts = json.loads(file.read_text())
    values = facts["values"] | {"env": "os:system", "env_kwargs": {"command": f"touch {hit}"}}
    file.write_text(json.dumps(facts | {"values": values}))
    with pytest.raises(ra.UserError, match=r"os:system: it is a builtin_function_or_method; a class derived"):
        ra.load(tmp_path / "kept").score(1)
    (tmp_path / "evil.py").write_text(f"open({str(hit)!r}, 'w').close()")
    (tmp_path / "evil.yaml").write_text("{source: evil.X, agent: evil.X, train: evil.X}")
    file.write_text(json.dumps(facts | {"method": str(tmp_path / "evil.yaml")}))
    with pytest.raises(ra.UserError, match=r"evil.yaml is not one of rlamort's; name its file yourself"):
        ra.load(tmp_path / "kept")
    assert not hit.exists()


def test_steps_in_a_run_directory_count_on(tmp_path):
    learner = ra.TD3("Pendulum-v1", dir=str(tmp_path / "run"), **SMALL).learn(80)
    with pytest.raises(ra.UserError, match="reset_num_timesteps=False is needed"):
        learner.learn(20)
    assert learner.learn(20, reset_num_timesteps=False).clock.env_step == 100
    learner.close()


@pytest.mark.parametrize("left", [0.0, 0.5, 0.9])
def test_records_that_something_else_has_cut_are_said_and_the_whole_ones_kept(left, tmp_path):
    """As an outside referee does, which tears the file that is being written."""
    run_with_checkpoints(tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    before = file.read_bytes()
    os.truncate(file, int(left * len(before)))
    with pytest.warns(UserWarning, match=r"metrics.jsonl: \d+ of its \d+ bytes are lost; its first records are kept"):
        again, _ = resume(tmp_path / "run", {})
    again.learn(60, reset_num_timesteps=False)
    again.close()
    after = file.read_bytes()
    kept = before[: before.rfind(b"\n", 0, int(left * len(before))) + 1]
    assert after.startswith(kept)
    assert len(read_records(tmp_path / "run")) > kept.count(b"\n")


def test_a_run_directory_that_a_kill_left_half_made_can_be_begun(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_text("process 1 on somewhere")
    (run / f".tmp-{'0' * 32}.yaml").write_text("half")
    ra.TD3("Pendulum-v1", dir=str(run), **SMALL).close()
    assert not list(run.glob(".tmp-*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".lock").write_text("mine")
    with pytest.raises(ra.UserError, match=r"it holds a file \.lock that rlamort did not write"):
        ra.TD3("Pendulum-v1", dir=str(tmp_path / "other"), **SMALL)
    assert (tmp_path / "other" / ".lock").read_text() == "mine"
