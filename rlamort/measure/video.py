"""Videos of one episode, rendered without a display."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from rlamort.config import config_of
from rlamort.env.make import PATIENCE, factory
from rlamort.env.native import NativeEnv
from rlamort.env.snapshot import layers, learn
from rlamort.errors import UserError
from rlamort.host.plain import revived
from rlamort.host.publish import published_file
from rlamort.host.randomness import Randomness
from rlamort.score import SEED

if TYPE_CHECKING:
    from rlamort.run.learner import Learner

LIGHT = 0.35  # at least, of what falls on every side of everything
SKYBOX = 2  # mjTEXTURE_SKYBOX
SKY = (225, 232, 240)  # where a MuJoCo model has none, and black would be all there is


def film(learner: "Learner", out: Path) -> float:
    """Record one evaluation episode to `out` as mp4, with step and return in each frame; returns its return.

    Raises:
        UserError: a package is missing, or this environment or machine renders nothing.
    """
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise UserError(f"video: {error.name} is not installed; pip install 'rlamort[video]'") from error
    total = 0.0
    with Randomness(SEED, learner.device)():
        playing, observation, first = _begun(learner)
        codec: dict[str, Any] = {"codec": "libx264", "macro_block_size": 2, "fps": playing.metadata.get("render_fps", 30)}
        writer: Any
        with published_file(out) as partial, imageio.get_writer(partial, "FFMPEG", "I", **codec) as writer:
            writer.append_data(_captioned(playing, first, f"step 0   return {total:.1f}"))
            state = None
            for step in range(1, (learner.config.run.max_episode_steps or PATIENCE) + 1):
                action, state = learner.agent.predict(observation, state, deterministic=True)
                observation, reward, terminated, truncated, _ = playing.step(action)
                total += float(reward)
                frame = playing.render()
                assert isinstance(frame, np.ndarray)
                writer.append_data(_captioned(playing, frame, f"step {step:,}   return {total:,.1f}"))
                if terminated or truncated:
                    break
        playing.close()
    return total


def _begun(learner: "Learner") -> tuple[gymnasium.Env[Any, Any], Any, np.ndarray]:
    """The evaluation environment with rendering, after a reset: it, the first observation, the first frame."""
    run = learner.config.run
    env, kwargs = _filmed(learner.environments.find, run.env_kwargs)
    if reason := unfilmable(env, kwargs):
        raise UserError(f"video: {reason}")
    make = factory(env, {**(kwargs or {}), "render_mode": "rgb_array"}, run.max_episode_steps)
    try:
        try:
            playing = make()
        except TypeError as error:  # it has just been made without
            raise UserError(f"video: {env} has no picture to give: its constructor takes no render_mode") from error
        if (statistics := learner.environments.statistics()) is not None:
            learn([], statistics["around"], frozen=True)
            learn(layers(playing), statistics["rows"][0], frozen=True)
        observation, _ = playing.reset(seed=SEED, options=run.reset_options)
        _lighten(playing)
        first = playing.render()
    except UserError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"video: {error}") from error
    except Exception as error:
        raise UserError(f"video: {env} does not render here: {type(error).__name__}: {error}") from error
    if not (isinstance(first, np.ndarray) and first.dtype == np.uint8):
        what = f"numbers of type {first.dtype}" if isinstance(first, np.ndarray) else f"a {type(first).__name__}"
        raise UserError(f"video: {env} renders {what}; an image is needed, an array of uint8")
    return playing, observation, first


def _filmed(find: Callable[[str], Any], env_kwargs: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """The evaluation environment, and the keywords of its constructor."""
    theirs = find("eval_env")
    return (theirs, None) if theirs is not None else (find("env"), env_kwargs)


def unfilmable(env: Any, env_kwargs: dict[str, Any] | None) -> str:
    """Why an environment cannot be rendered; "" if it may."""
    try:
        instance = factory(env, env_kwargs)()
        instance.close()
    except UserError as error:
        return str(error)
    except Exception:  # it is its constructor's to say, where it is made to be filmed
        return ""
    plain = instance.unwrapped
    if isinstance(plain, NativeEnv):
        return f"{env} is a problem, or a solver, and neither moves: there is nothing to film"
    if type(plain).render is gymnasium.Env.render:
        return f"{env} has no picture to give: {type(plain).__name__} defines no render()"
    return ""


def _model(env: gymnasium.Env[Any, Any]) -> Any:
    """Its MuJoCo model, None if it has none. MuJoCo is not imported here, since that fails without a renderer."""
    mujoco, model = sys.modules.get("mujoco"), getattr(env.unwrapped, "model", None)
    return model if mujoco is not None and isinstance(model, mujoco.MjModel) else None


def _lighten(env: gymnasium.Env[Any, Any]) -> None:
    """Brighten MuJoCo's scene, which does not affect the dynamics of this copy."""
    if (model := _model(env)) is not None:
        model.vis.headlight.active = 1
        model.vis.headlight.ambient[:] = np.maximum(model.vis.headlight.ambient, LIGHT)


def _captioned(env: gymnasium.Env[Any, Any], frame: np.ndarray, caption: str) -> np.ndarray:
    """A frame (H, W, 3) with a caption in its corner, and a light sky behind a MuJoCo model without one."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(frame).convert("RGB")
    model = _model(env)
    if model is not None and SKYBOX not in model.tex_type:
        pixels = np.array(image)
        pixels[(pixels == 0).all(-1)] = SKY
        image = Image.fromarray(pixels)
    size = max(10, image.height // 20)
    font, edge = ImageFont.load_default(size), max(1, size // 12)
    ImageDraw.Draw(image).text((size // 2, size // 2), caption, "white", font, stroke_width=edge, stroke_fill="black")
    return np.asarray(image)


def film_apart(run: Path, method: str | None = None, places: Sequence[str] = ()) -> str:
    """`rlamort video RUN` in its own process, since a failing graphics library may crash it.

    -P keeps the current folder out of its imports: a user may well be in one that holds a folder named rlamort.
    Without MUJOCO_GL in the environment, tries the ways of rendering in turn. What it printed last.

    Args:
        run: the run directory.
        method: as for `Learner.load`.
        places: env=... and eval_env=..., where the run's own names do not make them again.
    """
    config = config_of(run)
    if not places:
        unnamed = config.get("unnamed", {}) | {}
        key = "eval_env" if config.get("eval_env") or "eval_env" in unnamed else "env"
        reason = f"{key}: {unnamed[key]}; rlamort video {run} {key}=... films it" if key in unnamed else ""
        kwargs = revived(config["env_kwargs"]) if key == "env" else None
        if reason := reason or unfilmable(config[key], kwargs):
            return f"no video: {reason}"
    chosen = os.environ.get("MUJOCO_GL")
    ways = [chosen] if chosen else [*(["glfw"] if os.environ.get("DISPLAY") else []), "egl", "osmesa"]
    said = ""
    for way in ways:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "rlamort", "video", str(run), *places, *(["--method", method] if method else [])],
            env={**os.environ, "MUJOCO_GL": way}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout.strip().splitlines()[-1]
        lines = done.stderr.strip().splitlines()
        line = next((line for line in lines if line.startswith("rlamort: ")), lines[-1] if lines else "")
        reason = line.removeprefix("rlamort: ").removeprefix("video: ")
        if done.returncode == UserError.exit_code and "does not render here" not in reason:
            return f"no video: {reason}"
        said = said or reason
    return f"no video: nothing renders here (MUJOCO_GL={', '.join(ways)} tried). {said}"
