"""Demonstrations of an expert, written to a file or as a Minari data set. N steps"""

import importlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rlamort.config import Seed, Size, convert, fields_of
from rlamort.env import Spec
from rlamort.env.make import open_env
from rlamort.errors import UserError
from rlamort.host.command import require_room
from rlamort.host.publish import published_file
from rlamort.host.randomness import Randomness
from rlamort.run.experts import Expert
from rlamort.run.imitation import LABELS, Demonstrated

SEED = 2_000_000  # other episodes than those of evaluations and of training


class Shown(NamedTuple):
    """A step, or arrays of N of them."""

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    over: np.ndarray
    following: np.ndarray  # the observation after it


def demonstrate(expert: str, out: str, env: str | None = None, labels: Any = LABELS, seed: Any = SEED) -> str:
    """Let an expert play, and write what it met and did, in the environment's units; returns a line about it.

    Args:
        expert: as the key `expert` of the method bc; one who is asked.
        out: FILE.npz or minari:ID, which must not exist yet.
        env: Gymnasium id or module:Class.
        labels: N, how many steps.
        seed: of the environment and of what the expert draws.

    Raises:
        UserError: the expert does not fit the environment, or the place is taken or cannot be written.
    """
    labels, seed = convert("labels", labels, Size), convert("seed", seed, Seed)
    if env is None:
        raise UserError("env: it is missing; a Gymnasium id such as env=Pendulum-v1, or env=module:Class, is needed")
    if not (out.endswith(".npz") or out.startswith("minari:")):
        raise UserError(f"--out {out}: FILE.npz or minari:ID is needed")
    taken = out in _local() if out.startswith("minari:") else Path(out).exists()
    if taken:
        raise UserError(f"--out {out}: it exists already")
    if not out.startswith("minari:"):
        require_room(Path(out))
    with Randomness(seed, torch.device("cpu"))():
        opened = open_env(env)
        opened.reset(seed)
        chosen = convert("expert", expert, fields_of(Demonstrated)["expert"].type)
        assert isinstance(chosen, Expert), "it is text"
        advice, spec = chosen.advice(opened), opened.spec
        steps: list[Shown] = []
        while len(steps) < labels:
            x = opened.x
            y = advice(x)
            step = opened.step(y)
            action = spec.units.decode(y.numpy(force=True))[0]
            if step.valid[0]:
                met = (x, action, step.reward, step.terminated, step.over, step.x_next)
                steps.append(Shown(*(np.asarray(one) for one in met)))
            advice.begin(step.over)
        opened.close()
    shown = Shown(*(np.stack(column) for column in zip(*steps, strict=True)))
    observations, following = (x.reshape(-1, *spec.observation.shape) for x in (shown.observation, shown.following))
    over = shown.over[:, 0]
    episode = np.concatenate([[0], np.cumsum(over)[:-1]])
    if out.startswith("minari:"):
        whole = shown._replace(observation=observations, following=following)
        _to_minari(out.removeprefix("minari:"), whole, episode, env, spec)
    else:
        box = spec.action.box()
        with published_file(Path(out)) as fresh, fresh.open("wb") as file:
            np.savez(file, observations=observations, actions=shown.action, episode=episode, low=box.low, high=box.high)
    ended = np.flatnonzero(over)
    mean = (
        f", mean return {shown.reward[: ended[-1] + 1].sum() / len(ended):.1f} over {len(ended)} episodes" if len(ended) else ""
    )
    return f"{out}: {labels:,} labels of {chosen.name} on {env}{mean}"


def _minari(module: str = "minari") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"minari: it is needed to write its data sets, pip install 'rlamort[minari]' ({error})") from error


def _local() -> list[str]:
    """The data sets of Minari's on this machine, as `--out` names them."""
    return [f"minari:{identifier}" for identifier in _minari().list_local_datasets()]


def _to_minari(identifier: str, shown: Shown, episode: np.ndarray, env: str, spec: Spec) -> None:
    buffers: list[dict[str, Any]] = []
    for at in np.split(np.arange(len(episode)), np.flatnonzero(np.diff(episode)) + 1):
        terminated = shown.terminated[at, 0]
        truncated = np.zeros_like(terminated)
        truncated[-1] = not terminated[-1]
        buffers.append({
            "id": len(buffers), "observations": np.concatenate([shown.observation[at], shown.following[at[-1:]]]),
            "actions": shown.action[at], "rewards": shown.reward[at, 0], "terminations": terminated, "truncations": truncated,
            "infos": {},
        })  # fmt: skip
    about = {"algorithm_name": "expert", "author": "rlamort", "description": f"Demonstrations on {env}"}
    spaces = {"observation_space": spec.observation.box(), "action_space": spec.action.box()}
    kind = _minari("minari.data_collector").EpisodeBuffer
    try:
        with warnings.catch_warnings():  # of what a published data set ought to say, too
            warnings.simplefilter("ignore")
            _minari().create_dataset_from_buffers(identifier, [kind(**one) for one in buffers], env=env, **about, **spaces)
    except (ValueError, OSError) as error:
        raise UserError(f"minari:{identifier}: {' '.join(str(error).split())}") from error
