"""Learners from files: saved agents, those of Stable-Baselines3, and interrupted runs."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlamort.config import FIXED, FREE, locate, marks, resolve
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.host.machine import versions
from rlamort.run.checkpoint import Checkpoints
from rlamort.run.directory import ASKED, Directory
from rlamort.run.durable import Durable
from rlamort.run.environments import INSTANCES, KEYS, environment_values
from rlamort.run.learner import Learner, learner_class
from rlamort.run.mirror import forget
from rlamort.run.sb3_file import read_sb3
from rlamort.run.stored import agent_in, run_facts, trusted, values_of
from rlamort.run.track import recorded_step


def load(path: str | Path, env: Any = None, method: str | None = None, eval_env: Any = None) -> Learner:
    """Load a saved agent of any method, as `Learner.load`; `sb3:FILE.zip` reads one saved by Stable-Baselines3.

    Nothing in the file is executed: of a Stable-Baselines3 file, tensors and plain JSON are read, never its pickles.
    """
    if str(path).startswith("sb3:"):
        return _from_sb3(Path(str(path).removeprefix("sb3:")), env, eval_env)
    facts = agent_in(Path(path)).facts
    if "method" not in facts:
        raise UserError(f"{path}: it holds a solver, which rlamort.load_solver({str(path)!r}, Problem) loads, and no agent")
    return learner_class(trusted(facts["method"], method)).load(path, env, method, eval_env)


def _from_sb3(path: Path, env: Any, eval_env: Any) -> Learner:
    foreign = read_sb3(path)
    values, unnamed = environment_values(env, eval_env, {})
    config = resolve(foreign.method, {**foreign.values, **values})
    learner = learner_class(foreign.method).unbuilt(config, env, eval_env, unnamed)
    learner.environments.require_second(must=False)
    learner.build(foreign.spec)
    foreign.fill(learner.agent)
    learner.agent.loaded = True
    return learner


def unasked(method: str, env: Any, fields: dict[str, Any]) -> Learner:
    """As the method's constructor, for tensors from a file: nothing is asked or prepared that only training needs."""
    values, unnamed = environment_values(env, None, fields)
    learner = learner_class(method).unbuilt(resolve(method, {**fields, **values}), env, None, unnamed)
    with learner.randomness():
        spec = learner.environments.training.spec
    learner.build(spec)
    return learner


EXACT, EXCEPT_EPISODE, STATISTICAL = "exact", "exact but for the episode", "statistical"


def resume(
    path: str | Path,
    changes: Mapping[str, Any] = MappingProxyType({}),
    method: str | None = None,
    env: Any = None,
    eval_env: Any = None,
) -> tuple[Learner, str]:
    """A run at its newest intact checkpoint, ready to `learn`, and how exact that is.

    exact: it continues bit for bit like an uninterrupted run. Exact but for the episode: part of the environment's state cannot
    be saved, so the current episode is truncated; `learner.source.env.unsaved` names it.
    Statistical: versions, device or settings differ.
    A method that keeps no checkpoints begins anew, with a warning, unless that would lose a finished run.

    Args:
        path: the run directory.
        changes: settings that change on resume.
        method: as for `Learner.load`.
        env: the training environment, for a run whose environment cannot be constructed by name.
        eval_env: the evaluation environment, likewise.

    Raises:
        UserError: it is not a run directory, is locked by another process, or a change is not allowed; or it has learned
            something, and no checkpoint can be used.
    """
    path, changes = Path(path), dict(changes)
    facts = run_facts(path)
    method = trusted(facts["method"], method)
    before = resolve(method, values_of(method, facts["values"]))
    recorded = path / "metrics.jsonl"
    begun = Checkpoints(path / "ckpt").latest() >= 0 or (recorded.exists() and recorded.stat().st_size > 0)
    passed = {key: one for key, one in (("env", env), ("eval_env", eval_env)) if one is not None}
    passed |= {key: changes.pop(key) for key in KEYS if key in changes}
    changes = _of_environments(path, before.values, facts["unnamed"], passed, begun) | changes
    config = resolve(method, {**changes, "dir": str(path)}, before.values)
    marked, then, now = marks(config), before.leaves(), config.leaves()
    changed = [name for name, value in now.items() if marked[name] is not FREE and value != then.get(name)]
    for name in changed:
        old, new = then.get(name), now[name]
        if marked[name] is FIXED and begun:
            raise another_run(name, path, old, new)
        warnings.warn(f"{name}: {new} from here on, {old} until now", stacklevel=2)
    learner = learner_class(method).unbuilt(config, passed.get("env"), passed.get("eval_env"), facts["unnamed"])
    for key in KEYS:
        learner.environments.find(key)
    learner.environments.require_second(must=True)
    directory = Directory(path, learner.description(), fresh=False)
    learner.durable = Durable(learner, directory)
    directory.checkpoints.sweep()
    loaded = directory.checkpoints.newest()
    taken = 0 if loaded is None else loaded.saved.facts["env_step"]
    if config.run.steps < taken and config.run.steps != before.run.steps:  # the last step of all environments may go beyond
        raise UserError(f"steps={config.run.steps}: the run in {path} has taken {taken:,} already; at least as many are needed")
    learner.build(learner.source.env.spec)
    if loaded is None and begun:
        done = recorded_step(path)
        stopped = (path / ASKED).is_file() and done < min(before.run.steps, config.run.steps)  # Python may learn fewer steps
        if (path / "agent").is_dir() and (learner.source.resumable or not stopped):
            none = "has no checkpoint" if learner.source.resumable else f"has finished, and {method} keeps no checkpoints"
            raise UserError(
                f"{path}: it {none} to go on from, and beginning anew would lose its records; "
                f"rlamort.load({str(path)!r}) gives its agent, and `rlamort train` with another dir trains anew"
            )
        if not learner.source.resumable:
            warnings.warn(
                f"{path}: {method} keeps no checkpoints to go on from, so it begins anew, and the {done:,} steps that it has "
                "recorded are lost",
                stacklevel=2,
            )
    if loaded is None:  # it was killed before its first checkpoint
        directory.records.cut(0)
        forget(path)
        directory.describe(learner.description())
        return learner, EXACT
    Spec.read(loaded.saved.facts["spec"]).require(learner.agent.spec, f"env={learner.source.env.name}")
    try:
        exact = learner.durable.restore(loaded)
    except UserError as error:
        if changed:
            raise UserError(f"{', '.join(changed)}: what the run in {path} has learned does not fit this; {error}") from error
        raise
    directory.describe(learner.description())  # not before: a change that does not fit leaves the run as it was
    old_versions, new_versions = loaded.saved.facts["versions"], versions()
    for name in sorted(new_versions):
        if old_versions.get(name) != new_versions[name]:
            warnings.warn(f"{name} is {new_versions[name]} now; the run was made with {old_versions.get(name)}", stacklevel=2)
    same = old_versions == new_versions and learner.device.type == "cpu" and not changed
    return learner, (EXACT if exact else EXCEPT_EPISODE) if same else STATISTICAL


def _of_environments(
    path: Path, run: Mapping[str, Any], unnamed: dict[str, str], passed: Mapping[str, Any], begun: bool
) -> dict[str, Any]:
    """The changes that environments make to a run's configuration; `unnamed` is brought up to date.

    Args:
        path: the run directory.
        run: the configuration's values.
        unnamed: by key, why the run's environment cannot be constructed by its name.
        passed: those that are passed, by key; None takes back what the run has.
        begun: whether the training environment must stay the same.

    Raises:
        UserError: it would not.
    """
    changes: dict[str, Any] = {}
    for key, one in passed.items():
        values, reasons = environment_values(one if key == "env" else None, one if key == "eval_env" else None, {})
        if one is None:
            unnamed.pop(key, None)
        if key in unnamed:  # nothing about it is on record but that it has to be passed
            continue
        if key == "eval_env" or not begun:
            changes |= {name: value for name, value in values.items() if name not in KEYS or name == key}
            unnamed |= reasons
            continue
        if values[key] != run[key]:
            raise another_run(key, path, run[key], values[key])
        if isinstance(one, INSTANCES):
            if key in reasons:
                raise UserError(f"{key}: the run in {path} has {run[key]}, and {reasons[key]}, which would make it another run")
            for name, own in values.items():
                if name in KEYS:
                    continue
                if own != run[name] and not (own is None and name == "max_episode_steps"):  # the run's limit is put around it
                    raise another_run(name, path, run[name], own)
    return changes


def over(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a run of a method that keeps no checkpoints has finished; facts as of `run_facts`."""
    resumable = locate(facts["row"]["source"]).resumable
    return not resumable and (path / "agent").is_dir() and recorded_step(path) >= facts["values"]["steps"]


def another_run(name: str, path: Path, old: Any, new: Any) -> UserError:
    """The error for a value that a run cannot take."""
    return UserError(f"{name}: the run in {path} has {old}, and {new} would make it another run; start a new one")
