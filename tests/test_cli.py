"""The commands, as a user types them, in a process of their own."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import pytest
import yaml

from rlamort.config import resolve
from rlamort.errors import UserError

HERE = Path(__file__).parent
RLAMORT = Path(sys.executable).parent / "rlamort"
QUICK = ["hidden=[16,16]", "warmup_steps=50", "batch_size=16", "buffer_size=5000", "eval_episodes=2", "device=cpu", "threads=1"]


def rlamort(*arguments, cwd, code=0, **env):
    done = subprocess.run(
        [RLAMORT, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **env}
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training with everything it leaves behind."""
    folder = tmp_path_factory.mktemp("user")
    done = rlamort(
        "train", "td3", "env=InvertedPendulum-v5", "steps=300", "seed=1", "eval_every=100", "log_every=100", *QUICK, cwd=folder
    )
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
    runs = sorted((tmp_path / "runs").iterdir())
    assert [yaml.safe_load((r / "config.yaml").read_text())["seed"] for r in runs] == [0, 1]
    assert done.stdout.count("evaluation return") == 4
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
    assert "RuntimeError: the robot fell apart; that is failure 11, and max_env_faults=10 are forgiven" in done.stderr


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
    assert "f = Soft(-min Q, alpha) · Y = squashed Gaussian · p(x) = replay · model = Full · loss = objective" in said


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
    done = rlamort("train", "td3", "env=InvertedPendulum-v5", "steps=60", "dir=run", "track=tensorboard", *QUICK, cwd=tmp_path)
    assert "the wrong one" not in done.stdout
    assert "video: run/videos" in done.stdout or "does not render here" in done.stdout
    assert list((tmp_path / "run" / "tensorboard").iterdir())
