"""The commands, as a user types them, in a process of their own."""

import contextlib
import functools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from preloaded import SCRIPT, Preloaded

import rlamort as ra
from rlamort.cli import COMMANDS
from rlamort.config import convert, element_of, fields, methods, read_row, resolve
from rlamort.errors import UserError
from rlamort.measure.plot import _names, plot
from rlamort.run.compose import Composition
from rlamort.run.directory import claimed
from rlamort.run.track import read_records, span
from rlamort.train import WINDOW, Pace

HERE = Path(__file__).parent
RLAMORT = SCRIPT
PRELOADED = functools.cache(Preloaded)
QUICK = ["hidden=[16,16]", "warmup_steps=50", "batch_size=16", "buffer_size=5000", "eval_episodes=2", "device=cpu", "threads=1"]


def rlamort(*arguments, cwd, code=0, **env):
    done = PRELOADED().run([*map(str, arguments)], cwd, {**os.environ, **env}, timeout=300)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def from_a_shell(*arguments, cwd):
    return subprocess.run([RLAMORT, *arguments], cwd=cwd, capture_output=True, text=True, check=True, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training with everything it leaves behind."""
    folder = tmp_path_factory.mktemp("user")
    given = ["env=InvertedPendulum-v5", "steps=300", "seed=1", "eval_every=100", "log_every=100", *QUICK]
    done = from_a_shell("train", "td3", *given, cwd=folder)
    return folder, Path(done.stdout.splitlines()[-1]), done.stdout


def test_train_leaves_a_run_directory(run):
    folder, path, output = run
    path = folder / path
    assert path.parent == folder / "runs"
    names = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert names >= {
        "config.yaml", "versions.json", "metrics.jsonl", "agent/agent.json", "agent/agent.safetensors", "plots/return.png",
    }  # fmt: skip
    config = yaml.safe_load((path / "config.yaml").read_text())
    assert config["method"] == "td3"
    assert (config["seed"], config["hidden"], config["steps"]) == (1, [16, 16], 300)
    assert json.loads((path / "versions.json").read_text())["mujoco"]
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [r["env_step"] for r in records if "eval/return" in r] == [100, 200, 300]
    assert all(r["eval/low"] <= r["eval/return"] <= r["eval/high"] for r in records if "eval/return" in r)
    assert re.search(r"step 200 of 300: \d+ steps/s, .* s left", output)
    assert "step 300: evaluation return" in output


def test_video_is_one_that_plays(run):
    folder, path, output = run
    if "no video" in output:
        pytest.skip("nothing renders on this machine")
    (video,) = (folder / path / "videos").glob("*.mp4")
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(video))
    assert frames > 3
    still = folder / "still.png"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", video, "-frames:v", "1", still], check=True)
    assert imageio.imread(still).std() > 5


def test_eval_prints_a_mean_and_its_interval(run):
    folder, path, _ = run
    said = rlamort("eval", path, "--episodes", 3, cwd=folder).stdout
    assert re.search(r"td3 on InvertedPendulum-v5, 300 steps", said)
    assert re.search(r"return [\d.]+, 95 % interval \[[\d.-]+, [\d.]+\] over 3 episodes", said)
    assert said == rlamort("eval", path, "--episodes", 3, cwd=folder).stdout


def test_a_machine_that_renders_nothing_says_so(run):
    folder, path, _ = run
    said = rlamort("video", path, cwd=folder, code=2, MUJOCO_GL="osmesa").stderr
    assert said.startswith("rlamort: video: InvertedPendulum-v5 does not render here")


def test_seeds_run_one_after_another_and_are_drawn_as_one_line(tmp_path):
    done = rlamort(
        "train", "sac", "env=Pendulum-v1", "steps=120", "eval_every=60", "video=false", *QUICK, "-m", "seed=0,1", cwd=tmp_path
    )
    runs = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert [yaml.safe_load((r / "config.yaml").read_text())["seed"] for r in runs] == [0, 1]
    assert done.stdout.count("evaluation return") == 4
    drawn = re.fullmatch(r"all 2 runs: (runs/sac-[\d-]+\.png)", done.stdout.splitlines()[-1])
    assert imageio.imread(tmp_path / drawn[1]).std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # nothing of Hydra's is left
    said = rlamort("plot", *runs, "--out", "figure.png", cwd=tmp_path).stdout
    assert said.strip() == "figure.png"
    image = imageio.imread(tmp_path / "figure.png")
    assert image.std() > 10


def test_the_users_environment_from_the_current_folder(tmp_path):
    shutil.copy(HERE / "odd_envs.py", tmp_path / "my_module.py")
    done = rlamort("train", "ddpg", "env=my_module:Good", "steps=60", "video=false", *QUICK, cwd=tmp_path)
    assert "ddpg on my_module:Good" in done.stdout
    run = done.stdout.splitlines()[-1]
    rlamort("eval", run, cwd=tmp_path)


def test_environment_keywords_reach_the_environment(tmp_path):
    shutil.copy(HERE / "odd_envs.py", tmp_path / "my_module.py")
    rlamort("train", "sac", "env=my_module:Needs", "env_kwargs.size=3", "steps=60", "video=false", *QUICK, cwd=tmp_path)


def test_what_was_learned_is_kept_when_the_environment_fails(tmp_path):
    shutil.copy(HERE / "odd_envs.py", tmp_path / "my_module.py")
    done = rlamort("train", "td3", "env=my_module:LateNaN", "steps=2000", "dir=run", *QUICK, cwd=tmp_path, code=3)
    assert re.search(r"rlamort: env my_module:LateNaN, step \d+: reset holds nan; finite", done.stderr)
    assert (tmp_path / "run" / "agent" / "agent.safetensors").exists()
    done = rlamort("train", "td3", "env=my_module:LateRaises", "steps=5000", *QUICK, cwd=tmp_path, code=3)
    assert "RuntimeError: the robot fell apart; that is failure 11, and max_env_faults=10 are allowed" in done.stderr


def test_baselines_are_one_override_away(tmp_path):
    done = rlamort(
        "train", "sb3/td3", "env=Pendulum-v1", "steps=150", "warmup_steps=50", "video=false", "dir=run", cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "run"
    assert "return" in rlamort("eval", "run", "--episodes", 2, cwd=tmp_path).stdout
    for key, given, allowed in (("compile", True, False), ("reset_every", 5, 0)):
        with pytest.raises(UserError, match=f"{key}={given}: sb3/td3 has no choice there; only {allowed} is allowed"):
            resolve("sb3/td3", {key: given})


def test_list_names_every_method_with_its_tuple(tmp_path):
    said = rlamort("list", cwd=tmp_path).stdout
    for name in ("sac", "td3", "ddpg", "sb3/sac", "sb3/td3", "sb3/ppo"):
        assert re.search(rf"^{name} ", said, re.M)
    assert "f = Soft(-min Q, alpha) · Y = squashed Gaussian · p(x) = replay · model = full · loss = objective" in said


def test_help_shows_every_field_with_meaning_and_default(tmp_path):
    from rlamort.config import defaults, fields, methods, read_row

    said = rlamort("train", "ddpg", "--help", cwd=tmp_path).stdout
    assert "actor_delay=1  (a whole number >= 1)" in said
    for name in methods():
        row = read_row(name)
        for field in fields(row).values():
            assert field.help, f"{name}: {field.name} has no help in the docstring of {field.owner}"
        assert set(defaults(row)) == set(fields(row))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "trian: there is no such command. Did you mean train"),
        (["train"], "a method is needed first. Allowed: .*ddpg, .*sac"),
        (["train", "sca", "env=Pendulum-v1"], "method 'sca' is unknown. Did you mean sac"),
        (["train", "sac", "env=Pendulm-v1"], "env=Pendulm-v1: there is no such environment. Did you mean Pendulum-v1"),
        (["train", "sac", "env=CartPole-v1"], r"action space is Discrete\(2\); a Box"),
        (
            ["train", "sac", "env=Pendulum-v1", "leraning_rate=1"],
            "leraning_rate: there is no such key. Did you mean learning_rate",
        ),
        (["train", "sac", "env=Pendulum-v1", "zzz=1"], "zzz: there is no such key. Allowed: actor_delay, .*, weights"),
        (["train", "sac", "env=Pendulum-v1", "critic=zzz"], "critic=zzz: there is none of that name; .* Allowed: Critics"),
        (["train", "sac", "env=Pendulum-v1", "batch_size=-1"], "batch_size=-1: a whole number >= 1 is needed"),
        (["train", "sac"], "env: it is missing"),
        (["train", "sac", "Pendulum-v1"], "Pendulum-v1: key=value is needed"),
        (["train", "sac", "env=Pendulum-v1", "--multi"], "--multi: there is no such option"),
        (["train", "sac", "env=Pendulum-v1", "buffer_size=10000000000000"], "buffer_size=.*GiB"),
        (["train", "sac", "env=Pendulum-v1", f"dir={HERE}"], "it exists already"),
        (["train", "sac", "env=Pendulum-v1", "resume=auto"], "resume=auto: it needs dir="),
        (["resume", "nowhere"], "nowhere: it is not a run directory"),
        (["eval", "nowhere"], "nowhere: no agent is saved there"),
        (["plot", "nowhere"], "nowhere: it is not a run directory"),
        (["reproduce", "ppo"], "reproduce ppo: this row has no claims yet"),
        (["train", "td3", f"seed={2**64}"], f"seed={2**64}: a whole number >= 0 and <= 2147483647 is needed"),
        (["train", "td3", f"seed={'9' * 5000}"], "seed=9+: a whole number >= 0"),
        (["train", "td3", "seed=0,1"], "seed=0,1: several values are a run each, which needs -m"),
        (["train", "td3", "seed=${x}"], r"seed=\$\{x\}: a whole number >= 0"),
        (["train", "td3", "seed=(1"], r"seed=\(1: a whole number >= 0"),
        (["train", "td3", f"batch_size={10**30}"], f"batch_size={10**30}: a whole number >= 1 is needed, at most 1000000"),
        (["train", "td3", f"learning_rate={'9' * 400}"], "learning_rate=1e100 or more: a number > 0 is needed"),
        (["train", "td3", "learning_rate=1e400"], "learning_rate=1e400: a number > 0 is needed"),
        (["train", "td3", "env_timeout=1e300"], r"env_timeout=1e\+300: a number > 0 is needed, at most 1000000"),
        (["train", "td3", "threads=100000"], "threads=100000: a whole number >= 1 or null is needed, at most 1024"),
        (["train", "td3", "hidden=256"], r"hidden=256: .*, such as hidden=\[256\]$"),
        (["train", "td3", "hidden=256,256"], r"hidden=256,256: .*; a list is hidden=\[256,256\]$"),
        (["train", "td3", "wandb_tags="], r"wandb_tags=: .*, such as wandb_tags=\[a,b\]$"),
        (["train", "td3", "wandb_tags=mine"], r"wandb_tags=mine: .*, such as wandb_tags=\[mine\]$"),
        (["train", "td3", "env=Pendulum-v1", "hidden=[1000000,1000000]"], "td3: networks of these sizes take .* smaller"),
        (["train", "td3", "wandb_notes=${oc.env:NO_SUCH}"], "Hydra: .*NO_SUCH"),
        (["train", "td3", "+seed=3"], "Hydra: .*'seed'"),
        (["train", "td3", "env_kwargs.größe=3"], "Hydra: .*größe"),
        (["train", "td3", "hydra/launcher=nowhere"], "Hydra: .*nowhere"),
        (["train", "td3", "-m", "dir=runs/x", "seed=0,1"], "dir=runs/x: each of several runs needs its own"),
        (["train", "td3", "-m", "wandb_notes=jürgen, again", "seed=0,1"], "with -m a comma separates values"),
        (["train", "td3", "-m", "hydra/sweeper=optuna", "tau=interval(2,1)"], "Hydra: .*low.* must be smaller"),
        (["train", "td3", "-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=up"], "direction=up: .* or minimize is"),
        (["train", "td3", "--cfg"], "train METHOD: argument -c/--cfg: expected one argument"),
        (["train", "amortize", "num_envs=4"], "num_envs=4: amortize has no choice there; only 1 is allowed"),
        (["train", "sb3/ppo", "tau=0.1"], "tau=0.1: sb3/ppo has no choice there; only None is allowed"),
        (["eval"], "eval: the following arguments are required: run"),
        (["eval", "nowhere", "--episodes", "1e9"], "--episodes=1e9: a whole number >= 1 is needed"),
        (["plot", "nowhere", "--out", "curves.foo"], "curves.foo: no image is written under that name; allowed endings: .*png"),
        (["train", "sb3/sac", "update_after=3"], "update_after=3: sb3/sac has no choice there; only None is allowed"),
        (["train", "sb3/ppo", "warmup_steps=3"], "warmup_steps=3: sb3/ppo has no choice there; only 1000 is allowed"),
        (["train", "sb3/sac", "algorithm=PPO"], "algorithm=PPO: sb3/sac has no choice there; only SAC is allowed"),
        (["train", "sb3/sac", "on_nan=retry"], "on_nan=retry: sb3/sac has no choice there; only stop is allowed"),
        (["compare", "rlamort/Sphere-v0", "seeds=0,a"], r"seeds=\['0', 'a'\]: a list of a whole number >= 0"),
        (["push", "nowhere", "wandb_mode=on"], "wandb_mode=on: online, offline, disabled is needed"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_code_2(arguments, message, tmp_path):
    done = rlamort(*arguments, cwd=tmp_path, code=2)
    assert done.stderr.startswith("rlamort: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(message, done.stderr)
    assert not any(tmp_path.iterdir())


def test_a_terminal_gets_a_progress_bar(tmp_path):
    ours, theirs = pty.openpty()
    command = [RLAMORT, "train", "td3", "env=Pendulum-v1", "steps=400", "video=false", *QUICK]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0
    assert "━" in shown.decode()
    assert re.search(r"/400", shown.decode())
    assert "steps/s" in shown.decode()


def test_warnings_are_one_line(tmp_path):
    shutil.copy(HERE / "odd_envs.py", tmp_path / "my_module.py")
    said = rlamort("train", "td3", "env=my_module:Reuses", "steps=60", "video=false", *QUICK, cwd=tmp_path).stderr
    assert set(said.strip().splitlines()) == {
        "rlamort: warning: env my_module:Reuses reuses its observation array: what it returned before changes with every "
        "step. rlamort copies, so training is right, but other code that keeps observations is not"
    }


def test_a_folder_named_rlamort_where_the_user_is_disturbs_nothing(tmp_path):
    """As in a checkout of the repository, where the README's commands are typed."""
    (tmp_path / "rlamort").mkdir()
    (tmp_path / "rlamort" / "__init__.py").write_text("raise ImportError('the wrong one')")
    given = ["env=InvertedPendulum-v5", "steps=60", "dir=run", "track=tensorboard", *QUICK]
    done = from_a_shell("train", "td3", *given, cwd=tmp_path)
    assert "the wrong one" not in done.stdout
    assert "video: run/videos" in done.stdout or "does not render here" in done.stdout
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_text_is_typed_as_it_is(tmp_path):
    """By train, which Hydra reads, and by resume, which it does not."""
    given = {
        "dir": "runs/jürgen (b)",
        "wandb_notes": "it's a=b, [draft] \\ ${x} {",
        "wandb_project": "2024",
        "wandb_group": "a b",
    }
    texts = [f"{key}={value}" for key, value in given.items()]
    tags = ["wandb_tags=[jürgen, it's]", "env_kwargs.g=9.81"]
    run = tmp_path / given["dir"]
    done = rlamort("train", "td3", "env=Pendulum-v1", "steps=60", "video=false", *texts, *tags, *QUICK, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == given["dir"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert {key: config[key] for key in given} == given
    assert (config["wandb_tags"], config["env_kwargs"]) == (["jürgen", "it's"], {"g": 9.81})
    rlamort("resume", given["dir"], "wandb_notes={a: it's}, ${", "wandb_project=true", cwd=tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["wandb_notes"], config["wandb_project"]) == ("{a: it's}, ${", "true")


def test_settings_of_a_multirun_are_lines_of_their_own(tmp_path):
    chosen = ["-m", "seed=0,1", "learning_rate=1e-3,1e-4", "dir='out (ü)/${learning_rate} ${seed}'"]
    done = rlamort("train", "td3", "env=Pendulum-v1", "steps=60", "video=false", *QUICK, *chosen, cwd=tmp_path)
    runs = sorted(path for path in (tmp_path / "out (ü)").iterdir() if path.is_dir())
    assert [run.name for run in runs] == ["0.0001 0", "0.0001 1", "0.001 0", "0.001 1"]
    assert done.stdout.splitlines()[-1].startswith("all 4 runs: out (ü)/td3-")
    labels = {text for panel in drawn(runs) for text, *_ in panel}
    assert labels == {f"td3 learning_rate={rate}: mean of 2 runs, 95 %" for rate in (0.001, 0.0001)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_takes(command, tmp_path):
    for words in ([command, "--help"], [command, "-h"], ["help", command]):
        done = rlamort(*words, cwd=tmp_path)
        assert f"rlamort {command}" in done.stdout.splitlines()[0]
        assert not done.stderr
    if command == "list":
        for flag in ("-V", "--version"):
            assert re.fullmatch(r"rlamort [\d.]+\n", rlamort(flag, cwd=tmp_path).stdout)


def test_help_shows_no_key_that_does_nothing(tmp_path):
    said = rlamort("train", "amortize", "--help", cwd=tmp_path).stdout
    workers = ("num_envs", "vectorization", "num_workers", "env_timeout")
    for key in (*workers, "max_episode_steps", "warmup_steps", "update_after", "video"):
        assert f"  {key}=" not in said
    assert not re.search("worker|transition|replay|episode(?!s=)", said)
    assert "`rlamort amortize` also has rl" in said
    assert "  hidden=[128,128]  (a list of" in said
    assert "  tau=" not in rlamort("train", "sb3/ppo", "--help", cwd=tmp_path).stdout
    assert "  num_envs=1" in rlamort("train", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize("method", methods())
def test_whoever_forgets_the_brackets_of_a_list_is_shown_them(method):
    for field in fields(read_row(method)).values():
        if element_of(field.type) is not None:
            with pytest.raises(UserError, match=rf"{field.name}=0\.5: .*is needed(, such as {field.name}=\[.+\])?$") as error:
                convert(field.name, 0.5, field.type)
            assert "[" in str(error.value) or field.name == "track"
    with pytest.raises(UserError, match=r"hidden=64: .*hidden=\[64\]"):
        ra.SAC("Pendulum-v1", hidden=64)
    with pytest.raises(UserError, match="seed=1e100 or more: "):
        ra.SAC("Pendulum-v1", seed=10**5000)


SWEPT = [
    "env=Pendulum-v1", "steps=60", "warmup_steps=20", "batch_size=8", "hidden=[8]", "buffer_size=100", "eval_every=60",
    "eval_episodes=1", "video=false", "threads=1",
]  # fmt: skip


def test_a_job_that_fails_leaves_the_others_alone(tmp_path):
    """Hydra's own launcher: what is wrong is said once, the exit code tells it, and the other run is there."""
    done = rlamort("train", "td3", "env=NoSuch-v0,Pendulum-v1", *SWEPT[1:], "-m", cwd=tmp_path, code=2)
    assert done.stderr.count("rlamort: env=NoSuch-v0: there is no such environment") == 1
    (run,) = (tmp_path / "runs").iterdir()
    assert str(run.relative_to(tmp_path)) == done.stdout.splitlines()[-1]
    assert read_records(run)[-1]["env_step"] == 60
    assert not [path.name for path in tmp_path.iterdir() if path.name != "runs"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["seed=0,x"], "seed=x: a whole number >= 0"),
        (["seed=0,1", "hidden=[8],[0]"], r"hidden=\[0\]: a list of a whole number >= 1"),
        (["model=full,semi", "model.steps=0"], "model.steps"),
        (["model=semi", "model.steps=1,0"], "model.steps=0: a whole number >= 1"),
        (["seed=range(0,3)", "dir='x ${seed}'", "tau=2"], "tau=2"),
    ],
)
def test_what_a_later_run_would_refuse_is_said_before_the_first(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    composition, begun = Composition("td3", read_row("td3"), ["-m", "env=Pendulum-v1", *given]), []
    with pytest.raises(UserError, match=message):
        composition.run(lambda *asked: begun.append(asked) or tmp_path)
    assert not begun
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["seed=0,1", "dir='x ${seed}'"], "dir=x 1: it exists already"),
        (["seed=0,1", "dir='x ${seed}'", "resume=auto"], None),
        (["seed=0,1", "dir='${wandb_notes} ${seed}'", "wandb_notes='${now:%Y}'"], None),  # known only then
        (["dir=y,file"], "dir=file: it is a file"),
        (["dir=y,./y"], r"dir=\./y: each of several runs needs its own|dir=y: each of several runs needs its own"),
        (["seed=0,1", "dir=y,z"], "dir=y: each of several runs needs its own"),
    ],
)
def test_a_folder_that_a_later_run_cannot_have_is_said_before_the_first(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x 1").mkdir()
    (tmp_path / "x 1" / "config.yaml").write_text("kept")
    (tmp_path / "file").write_text("kept")
    composition, begun = Composition("td3", read_row("td3"), ["-m", "env=Pendulum-v1", *given]), []
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        composition.run(lambda *asked: begun.append(asked) or tmp_path)
    assert len(begun) == (0 if message else 2)
    assert {path.name for path in tmp_path.iterdir()} == {"x 1", "file"}


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        (["seed=3", "dir=x"], ["x"]),
        (["seed=1,2", "dir=null"], [None, None]),
        (["seed=1,2", "dir="], ["", ""]),
        (["seed=1,2", "dir=x-${seed}"], ["x-1", "x-2"]),
        (["dir=a,b"], ["a", "b"]),
        (["seed=1,2", "dir=x"], None),
        (["dir=x", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2"], None),
        (["dir=x", "+hydra.sweeper.params.seed='1,2'"], None),
    ],
)
def test_several_runs_have_folders_of_their_own(given, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    composition, found = Composition("td3", read_row("td3"), ["-m", "env=Pendulum-v1", *given]), []
    if folders is None:
        with pytest.raises(UserError, match="dir=x: each of several runs needs its own"):
            composition.run(lambda method, values: tmp_path)
    else:
        assert composition.run(lambda method, values: found.append(values["dir"]) or tmp_path) == 0
        assert found == folders


SEARCH = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweep.dir=sweep", "learning_rate=interval(1e-4,1e-2)"]


@pytest.mark.parametrize(
    ("command", "name", "best"),
    [
        (["td3", *SWEPT], "return", max),
        (["td3", *SWEPT, "hydra.sweeper.direction=minimize"], "return", min),
        (["sphere", "steps=4", "hidden=[8]", "eval_every=4", "eval_episodes=2", "threads=1"], "mean cost", min),
    ],
    ids=["return", "as the user says", "cost"],
)
def test_a_search_is_for_the_best_and_says_what_it_has_found(command, name, best, tmp_path):
    done = rlamort("train", *command, *SEARCH, "hydra.sweeper.n_trials=3", cwd=tmp_path)
    (file,) = (tmp_path / "runs").glob("*.json")
    found = json.loads(file.read_text())
    records = [read_records(tmp_path / one["run"])[-1] for one in found["trials"]]
    scores = [record["eval/cost" if "cost" in name else "eval/return"] for record in records]
    assert len(set(scores)) == 3
    assert [one[name] for one in found["trials"]] == pytest.approx(sorted(scores, reverse=best is max))
    assert found["best"] == found["trials"][0]
    theirs = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())  # what Optuna looked for
    assert theirs["best_value"] == pytest.approx(best(scores))
    (setting,) = found["best"]["settings"]
    assert setting == f"learning_rate={theirs['best_params']['learning_rate']}"
    *_, said, where = done.stdout.splitlines()
    assert re.fullmatch(rf"best of 3 runs: {name} -?[\d.]+.* with {setting}; all: runs/{file.name}", said)
    assert where == found["best"]["run"]
    assert f"learning_rate: {setting.partition('=')[2]}" in (tmp_path / where / "config.yaml").read_text()


def test_a_trial_that_fails_leaves_the_search_alone(tmp_path):
    chosen = [*SEARCH, "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=1"]
    done = rlamort("train", "td3", "env=NoSuch-v0,Pendulum-v1", *SWEPT[1:], *chosen, cwd=tmp_path, code=2)
    (file,) = (tmp_path / "runs").glob("*.json")
    found = json.loads(file.read_text())
    failed = [one for one in found["trials"] if "run" not in one]
    assert 1 <= len(failed) <= 3
    assert {("env=NoSuch-v0" in one["settings"], one["exit_code"]) for one in failed} == {(True, 2)}
    assert f"best of 4 runs, {len(failed)} of which have no score: return" in done.stdout
    shutil.rmtree(tmp_path / "runs")
    done = rlamort("train", "td3", "env=NoSuch-v0", *SWEPT[1:], *chosen, cwd=tmp_path, code=2)
    assert done.stderr.count("rlamort: env=NoSuch-v0: there is no such environment") == 4
    assert not (tmp_path / "runs").exists()


def test_a_search_that_is_interrupted_says_what_it_has_found_until_then(tmp_path):
    command = [RLAMORT, "train", "td3", *SWEPT, "steps=300", *SEARCH, "hydra.sweeper.n_trials=1000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for _ in range(3):
            while not process.stdout.readline().startswith("td3 on"):
                assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read().splitlines()
        assert process.wait(60) == 75
    (file,) = (tmp_path / "runs").glob("*.json")
    assert rest[-1] == json.loads(file.read_text())["best"]["run"]
    assert re.match("best of 3 runs, 1 of which have no score: return", rest[-2])


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    config = resolve("td3", {"env": "Pendulum-v1"})
    with ThreadPoolExecutor(8) as pool:
        with contextlib.ExitStack() as held:
            paths = list(pool.map(lambda _: held.enter_context(claimed(config)), range(24)))
        assert len(set(paths)) == 24
    with pytest.raises(KeyError), claimed(config) as path:
        raise KeyError
    assert not path.exists()
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(KeyError), claimed(config):
        raise KeyError
    assert not any(tmp_path.iterdir())
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match="runs: it is a file"), claimed(config):
        pass


def made_run(path, evaluations, training=(), **config):
    """A run directory with these records: step -> return, or return with its bounds, or -cost of a problem."""
    path.mkdir(parents=True)
    whole = {"method": "td3", "env": "Pendulum-v1", "seed": 0, "learning_rate": 1e-3, "eval_every": 100, "row": {}, **config}
    (path / "config.yaml").write_text(yaml.safe_dump(whole))
    records = [{"env_step": step, "eval/return": value} for step, value in evaluations.items() if isinstance(value, float)]
    bounded = [(step, value) for step, value in evaluations.items() if not isinstance(value, float)]
    for step, (mean, low, high, *cost) in bounded:
        found = {"eval/return": mean, "eval/low": low, "eval/high": high}
        records.append({"env_step": step, **found, **({"eval/cost": cost[0]} if cost else {})})
    records += [{"env_step": step, "train/return": value} for step, value in training]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def drawn(runs, axes=False):
    """What a plot of them shows: of every panel, (label, x, y) of its lines, and with `axes` ("axes", name of y, bands)."""
    shown, really = [], Figure.savefig

    def keep(figure, *arguments, **more):
        for panel in figure.axes:
            bands = [collection.get_label() for collection in panel.collections]
            lines = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]
            shown.append([*lines, ("axes", panel.get_ylabel(), bands)] if axes else lines)
        really(figure, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        plot(runs, runs[0].parent / "drawn.png")
    return shown


def test_runs_evaluated_at_different_steps_are_interpolated_where_all_are_known(tmp_path):
    one = made_run(tmp_path / "a", {100: 0.0, 200: 10.0, 300: 20.0})
    other = made_run(tmp_path / "b", {150: 10.0, 250: 30.0}, seed=1, eval_every=50)
    ((mean, *each),) = drawn([one, other])
    assert mean == ("td3: mean of 2 runs, 95 %, interpolated", [150, 200, 250], [7.5, 15.0, 22.5])
    assert [steps for _, steps, _ in each] == [[100, 200, 300], [150, 250]]  # nothing is hidden


def test_runs_without_a_common_step_are_drawn_each(tmp_path):
    one, other = made_run(tmp_path / "a", {100: 0.0}), made_run(tmp_path / "b", {200: 10.0, 300: 30.0}, seed=1)
    ((none, *each),) = drawn([one, other])
    assert none == ("td3: 2 runs, evaluated at steps without a common range", [], [])
    assert [(steps, values) for _, steps, values in each] == [([100], [0.0]), ([200, 300], [10.0, 30.0])]


def test_runs_at_equal_steps_are_a_mean_and_nothing_else(tmp_path):
    runs = [made_run(tmp_path / str(seed), {100: 0.0 + seed, 200: 10.0 + seed}, seed=seed) for seed in range(3)]
    assert drawn([*runs, runs[0]]) == [[("td3: mean of 3 runs, 95 %", [100, 200], [1.0, 11.0])]]  # one given twice counts once
    empty = made_run(tmp_path / "empty", {}, seed=9)
    (empty / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match="empty: it is left out, since it has no evaluation with a return yet"):
        assert len(drawn([*runs, empty])[0]) == 1
    with pytest.raises(UserError, match="no evaluation with a return has been recorded yet"):
        plot([empty], tmp_path / "curves.png")


def test_a_single_run_shows_its_evaluations_interval_and_its_training_return(tmp_path):
    run = made_run(tmp_path / "a", {100: (1.0, 0.0, 2.0), 200: (5.0, 3.0, 7.0)}, training=[(50, 0.5), (150, 2.5)])
    (panel,) = drawn([run], axes=True)
    assert panel == [
        ("td3", [100, 200], [1.0, 5.0]),
        ("td3: training return", [50, 150], [0.5, 2.5]),
        ("axes", "evaluation return", ["td3: 95 % over an evaluation's episodes"]),
    ]
    (panel,) = drawn([made_run(tmp_path / "b", {100: (1.0, 0.0, 2.0)})], axes=True)
    assert panel[-1][2] == ["td3: 95 % over an evaluation's episodes"]  # of one evaluation, too


def test_a_problem_is_told_as_a_cost(tmp_path):
    """In the terminal, by eval and in plots; records of old, which had returns alone, can be drawn still."""
    done = rlamort("train", "sphere", "steps=40", "hidden=[8]", "batch_size=16", "eval_episodes=8", "dir=run", cwd=tmp_path)
    assert re.search(r"step 40: mean cost [-\d.e]+ \[[-\d.e]+, [-\d.e]+\], lower is better", done.stdout)
    said = rlamort("eval", "run", cwd=tmp_path).stdout
    assert re.search(r"mean cost, lower is better: [-\d.e]+, 95 % interval \[.*\] over 8 contexts", said)
    assert "return" not in done.stdout.replace("return.png", "") + said
    assert "interval" not in rlamort("eval", "run", "--episodes", 1, cwd=tmp_path).stdout
    (record,) = [r for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "eval/cost" in r]
    assert record["eval/cost"] == pytest.approx(-record["eval/return"])
    (panel,) = drawn([tmp_path / "run"], axes=True)
    assert panel[0][1:] == ([40], [pytest.approx(record["eval/cost"])])
    assert panel[-1][1] == "mean cost (lower is better)"
    (panel,) = drawn([made_run(tmp_path / "old", {40: (-2.0, -3.0, -1.0)})], axes=True)
    assert (panel[0][2], panel[-1][1]) == ([-2.0], "evaluation return")


def test_nothing_is_written_over_unasked(run, tmp_path):
    folder, path, _ = run
    run = folder / path
    (tmp_path / "curves.png").write_text("mine")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes").touch()
    assert rlamort("plot", run, cwd=tmp_path).stdout == "curves-2.png\n"
    assert rlamort("plot", run, cwd=tmp_path).stdout == "curves-3.png\n"
    for command in (
        ["plot", run],
        ["gap", run],
        ["compare", "rlamort/Sphere-v0"],
        ["bench"],
        ["amortize", "rlamort/Sphere-v0"],
    ):
        out = "kept" if command[0] == "amortize" else "curves.png"
        said = rlamort(*command, "--out", out, cwd=tmp_path, code=2).stderr
        assert said == f"rlamort: --out {out}: it exists already; --force overwrites it\n"
        other = "curves.png" if command[0] == "amortize" else "kept"
        assert f"--out {other}: it is a f" in rlamort(*command, "--out", other, cwd=tmp_path, code=2).stderr
        said = rlamort(*command, "--out", "curves.png/new", cwd=tmp_path, code=2)
        assert said.stderr == f"rlamort: --out curves.png/new: {tmp_path}/curves.png is a file; a folder is needed\n"
        assert not said.stdout  # nothing has begun
    assert (tmp_path / "curves.png").read_text() == "mine"
    rlamort("plot", run, "--out", "curves.png", "--force", cwd=tmp_path)
    assert imageio.imread(tmp_path / "curves.png").std() > 10


def test_options_may_stand_anywhere(run, tmp_path):
    folder, path, _ = run
    said = rlamort(
        "gap", folder / path, "--out", "gap.json", "states=8", "acting=0", "resimulated=0", "episodes=1", cwd=tmp_path
    )
    assert "In its own critic" in said.stdout
    assert json.loads((tmp_path / "gap.json").read_text())["critic"]["states"] <= 8


def test_claims_are_listed_with_the_time_they_take(tmp_path):
    said = rlamort("reproduce", cwd=tmp_path).stdout
    for row in ("sac", "race", "vae"):
        assert re.search(rf"^{row} +about [\d.]+ (h|min)$", said, re.M)
    assert re.search(
        r"^ +InvertedPendulum-v5, 20,000 steps: every seed of 3 returns 950, no return below sb3/td3's shown$", said, re.M
    )
    assert not any(tmp_path.iterdir())
    assert "either a row or --all" in rlamort("reproduce", "sac", "--all", cwd=tmp_path, code=2).stderr


def test_pace_is_of_the_last_seconds_and_of_updates_once_there_are_some():
    pace = Pace()
    assert pace.steps_per_s is None
    for step in range(1, 1001):
        pace.note(step / 10_000, step, 0)
    assert pace.steps_per_s == pytest.approx(10_000)
    assert pace.left(1_000) is None  # of updates it says nothing yet
    pace.note(30.0, 1001, 1)  # the first one was compiled
    assert pace.steps_per_s is None
    pace.note(55.0, 1002, 2)  # and so was the second, which is another
    for step in range(1003, 3003):
        pace.note(55 + (step - 1002) / 100, step, step - 1000)
        if step > 1003:
            assert pace.steps_per_s == pytest.approx(100)
    for step in range(3003, 3003 + int(10 * WINDOW)):
        pace.note(75 + (step - 3002) / 10, step, step - 1000)
    assert pace.steps_per_s == pytest.approx(10, rel=0.05)
    assert pace.left(100) == pytest.approx(10, rel=0.05)
    assert [span(s) for s in (8.3, 119, 600, 3 * 3600, 60 * 3600)] == ["8 s", "119 s", "10 min", "3.0 h", "2.5 days"]


def test_pace_counts_one_fit_wherever_it_is_asked():
    pace, seconds = Pace(), 0.0
    for step in range(1, 1001):
        seconds += 20.0 if step % 200 == 0 else 0.1  # a fit takes as long as 200 steps
        pace.note(seconds, step, step, 200)
        if step > 400:
            assert pace.steps_per_s == pytest.approx(200 / (20 + 199 * 0.1), rel=1e-6)


@pytest.mark.slow
def test_warming_up_says_nothing_of_the_time_left_and_compiling_is_announced(tmp_path):
    chosen = ["steps=300", "eval_every=300", "log_every=50", "video=false", "compile=true", *QUICK, "warmup_steps=150"]
    said = rlamort("train", "sac", "env=Pendulum-v1", *chosen, "dir=run", cwd=tmp_path).stdout.splitlines()
    assert [line for line in said if "compiling" in line] == ["compiling updates (5-60 s; kept for later runs) ..."]
    at = said.index("compiling updates (5-60 s; kept for later runs) ...")
    before = [line for line in said[:at] if "of 300" in line]
    after = [line for line in said[at:] if "of 300" in line]
    assert len(before) == len(after) == 3
    assert all("no updates yet" in line and "left" not in line for line in before)
    assert all(line.endswith(" s left") for line in after)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [r for r in records if "time/seconds" in r]
    assert last["time/steps_per_s"] > 2 * last["env_step"] / last["time/seconds"]  # the latter counts the compiler
    assert first["time/updates"] == 0


@pytest.mark.parametrize("env", ["rlamort/Sphere-v0", "my_module:Good", "my_module:Plain"])
def test_what_has_no_picture_says_so_in_a_sentence(env, tmp_path):
    shutil.copy(HERE / "odd_envs.py", tmp_path / "my_module.py")
    with (tmp_path / "my_module.py").open("a") as module:
        module.write("\n\nclass Plain(Good):\n    def render(self):\n        return None\n")
    done = rlamort("train", "td3", f"env={env}", "steps=60", "dir=run", *QUICK, cwd=tmp_path)
    sentence = {
        "rlamort/Sphere-v0": "rlamort/Sphere-v0 is a problem, or a solver, and neither moves: there is nothing to film",
        "my_module:Good": "my_module:Good has no picture to give: Good defines no render()",
        "my_module:Plain": "my_module:Plain has no picture to give: its constructor takes no render_mode",
    }[env]
    assert f"no video: {sentence}" in done.stdout.splitlines()
    assert rlamort("video", "run", cwd=tmp_path, code=2).stderr == f"rlamort: no video: {sentence}\n"
    assert rlamort("video", "run", cwd=tmp_path, code=2, MUJOCO_GL="egl").stderr == f"rlamort: video: {sentence}\n"


def test_a_film_is_light_and_says_step_and_return(run):
    """InvertedPendulum-v5 has no light of its own and no sky; the film is of the episode that is evaluated."""
    folder, path, output = run
    if "no video" in output:
        pytest.skip("nothing renders on this machine")
    (video,) = (folder / path / "videos").glob("*.mp4")
    shown = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", video, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    content = subprocess.run(shown, check=True, capture_output=True).stdout
    frames = np.frombuffer(content, np.uint8).reshape(-1, 480, 480, 3).astype(float)
    assert frames.mean((1, 2, 3)).min() > 150
    corner = frames[:, :50, :240]
    assert corner[0].std() > 20  # letters
    assert abs(corner[0] - corner[-1]).max() > 100  # which change
    (total,) = re.findall(r"\(return ([\d.]+)\)", output)
    returns, lengths = ra.load(folder / path).score(1)
    assert returns == [pytest.approx(float(total), abs=0.06)]
    assert lengths == [len(frames) - 1]
    said = rlamort("video", path, cwd=folder).stdout
    assert re.fullmatch(r"video: .*step-000000300-2.mp4 \(return [\d.]+\)\n", said)  # the first one stays
    assert len(list((folder / path / "videos").glob("*.mp4"))) == 2


def test_a_finished_run_that_is_resumed_is_not_filmed_again(run):
    """As by a job that is queued again when all is done."""
    folder, path, output = run
    if "no video" in output:
        pytest.skip("nothing renders on this machine")
    film = path / "videos" / "step-000000300.mp4"
    before = (folder / film).stat().st_mtime_ns, len(list((folder / path / "videos").iterdir()))
    assert f"video: {film}" in rlamort("resume", path, cwd=folder).stdout.splitlines()
    assert ((folder / film).stat().st_mtime_ns, len(list((folder / path / "videos").iterdir()))) == before


def test_a_module_without_its_class_is_told_the_classes_of_the_file_that_is_here(tmp_path, monkeypatch):
    from rlamort.env.imports import here

    monkeypatch.chdir(tmp_path)
    (tmp_path / "thermo.py").write_text(
        "raise RuntimeError('read, not run')\n\nclass _Base: ...\nclass Thermo: ...\nclass Oven: ...\n"
    )
    assert here("thermo", "env") == "thermo.py is here: did you mean env=thermo:Thermo or env=thermo:Oven?"
    assert here("thermo.py") == "thermo.py is here: did you mean thermo:Thermo or thermo:Oven?"
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("class (\n")
    assert here("lab", "env") == "lab/__init__.py is here, and has no class; env=module:Class is needed"
    assert here("broken").startswith("broken.py is here, and cannot be read as Python: ")
    assert here("numpy") == here("../thermo") == here("Pendulum-v1") == ""
    assert "thermo.py is here: did you mean thermo:Thermo" in rlamort("check", "thermo", cwd=tmp_path, code=2).stderr


def test_runs_on_environments_with_other_keywords_are_lines_of_their_own():
    """An absent mapping, and an absent key in one, are settings, too."""
    config = {"method": "sac", "env": "Hopper-v5", "env_kwargs": None}
    configs = {
        Path(str(i)): config | {"seed": i, "env_kwargs": given} for i, given in enumerate([None, {}, {"limit": 7}, {"a": 1}])
    }
    names = ["sac env_kwargs={}", "sac env_kwargs={}", "sac env_kwargs={'limit': 7}", "sac env_kwargs={'a': 1}"]
    assert list(_names(configs).values()) == names


def test_output_that_nobody_reads_any_more_is_no_failure(tmp_path):
    command = f"set -o pipefail; {RLAMORT} list | true; echo $?"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert (ended.stdout, ended.stderr) == ("141\n", "")
    command = f"{RLAMORT} list >&-; echo $?"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert (ended.stdout, ended.stderr) == ("0\n", "")


def test_a_run_whose_output_nobody_reads_any_more_goes_on(tmp_path):
    small = "steps=300 warmup_steps=100 hidden=[8,8] batch_size=8 log_every=50 eval_every=300 eval_episodes=1 compile=false"
    command = f"set -o pipefail; {RLAMORT} train td3 env=Pendulum-v1 {small} dir=run video=false | head -1; echo $?"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert ended.stdout.splitlines()[-1] == "0"
    assert ra.load(tmp_path / "run").clock.env_step == 300
