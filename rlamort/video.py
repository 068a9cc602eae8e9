"""A video of one episode, rendered without a display."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from rlamort.agent import Agent
from rlamort.envs.make import PATIENCE, factory
from rlamort.errors import UserError
from rlamort.score import SEED


def film(agent: Agent, env: Any, env_kwargs: dict[str, Any] | None, limit: int | None, out: Path) -> float:
    """Play one evaluation episode and write it to `out` as mp4; its return.

    Raises:
        UserError: a package is missing, or this environment or machine renders nothing.
    """
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise UserError(f"video: {error.name} is not installed; pip install 'rlamort[video]'") from error
    try:
        playing = factory(env, {**(env_kwargs or {}), "render_mode": "rgb_array"}, limit)()
        observation, _ = playing.reset(seed=SEED)
        first = playing.render()
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"video: {error}") from error
    except Exception as error:
        raise UserError(f"video: {env} does not render here: {type(error).__name__}: {error}") from error
    if not isinstance(first, np.ndarray):
        raise UserError(f"video: {env} renders no image ({type(first).__name__})")
    out.parent.mkdir(parents=True, exist_ok=True)
    total = 0.0
    fps = playing.metadata.get("render_fps", 30)
    partial = out.with_name(f".{out.name}")
    writer: Any
    with imageio.get_writer(partial, format="FFMPEG", mode="I", fps=fps, macro_block_size=2, codec="libx264") as writer:
        writer.append_data(first)
        for _ in range(limit or PATIENCE):
            action, _ = agent.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = playing.step(action.reshape(playing.action_space.shape))
            total += float(reward)
            frame = playing.render()
            assert isinstance(frame, np.ndarray)
            writer.append_data(frame)
            if terminated or truncated:
                break
    playing.close()
    os.replace(partial, out)
    return total


def film_apart(run: Path, method: str | None = None) -> str:
    """`rlamort video RUN` in a process of its own, since a graphics library that fails can take its process along.

    -P keeps the current folder out of its imports: a user may well be in one that holds a folder named rlamort.
    Without MUJOCO_GL in the environment, tries the ways of rendering in turn. What it printed last.
    """
    chosen = os.environ.get("MUJOCO_GL")
    ways = [chosen] if chosen else [*(["glfw"] if os.environ.get("DISPLAY") else []), "egl", "osmesa"]
    said = ""
    for way in ways:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "rlamort", "video", str(run), *(["--method", method] if method else [])],
            env={**os.environ, "MUJOCO_GL": way}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout.strip().splitlines()[-1]
        lines = done.stderr.strip().splitlines()
        said = said or next((line for line in lines if line.startswith("rlamort: ")), lines[-1] if lines else "")
    return f"no video: nothing renders here (MUJOCO_GL={', '.join(ways)} tried). {said.removeprefix('rlamort: ')}"
