"""Further environments like a user's instance, for evaluation and for several side by side.

They are deep copies, or made by the functions that made the first. Before use they are stepped beside others of their kind:
they must give the same results, and not affect each other.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.utils import EzPickle
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from rlamort.env.objects import RENDERERS, attributes, drawn
from rlamort.env.physics import model_arrays, read_data, write_data, write_model
from rlamort.env.snapshot import layers, preserved, seed_globals
from rlamort.env.state import Reader, Writer
from rlamort.errors import UserError

STEPS = 8  # that two environments are compared over
Player = gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any]
Play = list[tuple[bytes, ...]]  # the results of a reset and of steps


class Copies:
    """Copies of an environment in its present state, or, if it can no longer be copied, in its first state.

    Args:
        env: the user's environment.
        options: of every reset.

    Raises:
        UserError: it cannot be copied, or its copies are not independent, or differ from it.
    """

    def __init__(self, env: Player, options: dict[str, Any] | None = None) -> None:
        self.env, self.first = env, _copied(env)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the environment's own, which training will repeat
            alone, again = (play([_copied(self.first)], options) for _ in range(2))
            beside = play([_copied(self.first), _copied(self.first)], options)
            rows = isinstance(env.unwrapped, AsyncVectorEnv)
            original = play([env.unwrapped], options) if rows else alone
            anew = play([_copied(self.first).unwrapped], options) if rows else alone
        if alone != again:
            return  # it is not deterministic, so comparisons are not possible
        if alone != beside:
            raise UserError("its copies are not independent: what is done in one shows in another")
        if original != anew:
            raise UserError(
                "it is no longer what the functions that made it make, and what worker processes hold is out of reach"
            )

    def __call__(self) -> Any:
        """A new copy."""
        try:
            return _copied(self.env)
        except UserError:  # such as a window that has been opened since
            return _copied(self.first)


def _copied(env: Player) -> Any:
    """A deep copy; for a vector environment with worker processes, a new one of the same functions in this process."""
    base = env.unwrapped
    try:
        if isinstance(base, AsyncVectorEnv):
            mode: Any = base.observation_mode  # the two declare its type differently
            rows = SyncVectorEnv(base.env_fns, observation_mode=mode, autoreset_mode=base.autoreset_mode)
            return copy.deepcopy(env, {id(base): rows})
        copied = _deep(env)
        _bring_state(env, copied)
    except Exception as error:
        raise UserError(f"it cannot be copied ({type(error).__name__}: {error})") from error
    return copied


def _deep(env: Player) -> Any:
    """A deep copy, also of what Gymnasium's `EzPickle` makes anew, from constructor arguments, as all MuJoCo environments."""
    reader = Reader(parts := _parts(env))
    for part in parts:
        reader.layer(part)
    anew = [(one, copy.deepcopy(one)) for one in reader.objects() if _made_anew(one)]
    memo: dict[int, Any] = {id(one): other for one, other in anew}
    held = [one for part in parts for one in attributes(part).values()]
    memo |= {id(one): None for one in held if drawn(one) and not _copyable(one)}  # a window, which a copy opens of its own
    for one, other in anew:
        for name, live in attributes(other).items():
            if _bound(live) and type(value := attributes(one).get(name)) is type(live):
                _write(live, value)
                memo[id(value)] = live
    copied = copy.deepcopy(env, memo)
    memos = [memo]  # all of them, since they hold their own ids, which nothing else may have
    for one, other in anew:
        for name, value in attributes(one).items():
            memo = dict(memos[-1])  # a copy that fails leaves half-filled containers in it
            try:
                part = copy.deepcopy(value, memo)
            except Exception:  # a simulator's object in C, of which the new one has its own
                continue
            memos.append(memo)
            object.__setattr__(other, name, part)
    return copied


def _made_anew(value: Any) -> bool:
    """Whether a deep copy calls its constructor."""
    ours = isinstance(value, EzPickle) and type(value).__getstate__ is EzPickle.__getstate__
    return ours and not hasattr(value, "__deepcopy__")


def _copyable(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # whatever the library says
        return False
    return True


def _bound(value: Any) -> bool:
    """Whether it belongs to one environment's simulator, so that another has to keep its own."""
    return type(value).__name__ in ("MjModel", "MjData", *RENDERERS)


def _write(live: Any, value: Any) -> None:
    if type(value).__name__ == "MjModel":
        write_model(live, dict(model_arrays(value)))
    elif type(value).__name__ == "MjData":
        write_data(live, read_data(value))


def _bring_state(env: Player, copied: Any) -> None:
    """Restore in a copy what a `__deepcopy__` of its class loses."""
    ours, theirs = _parts(env), _parts(copied)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, gymnasium.Env) and one is one.unwrapped and other.spec is None:
            other.spec = one.spec
    state = _read(ours)
    if not equal(state, _read(theirs)):
        writer = Writer(theirs)
        for tree, part in zip(state, theirs, strict=True):
            writer.what_fits(tree, part)


def _parts(env: Player) -> list[Any]:
    """Its layers, and those of its rows."""
    rows = env.unwrapped.envs if isinstance(env.unwrapped, SyncVectorEnv) else []
    return [*layers(env), *(layer for row in rows for layer in layers(row))]


def _read(parts: Sequence[Any]) -> list[Any]:
    reader = Reader(parts)
    return [reader.layer(part) for part in parts]


def play(envs: Sequence[Any], options: dict[str, Any] | None = None) -> Play:
    """The results of the first of several environments in a reset and a few steps, interleaved with those of the others.

    An exception is a result, and ends its environment's steps.
    """
    with preserved():
        seed_globals(0)
        plays = [_play(env, i, options) for i, env in enumerate(envs)]
        return [answers[0] for answers in itertools.zip_longest(*plays) if answers[0] is not None]


def same_results(envs: Sequence[gymnasium.Env[Any, Any]]) -> bool:
    """Whether environments give the same results from the same seed and actions; copies of them are stepped.

    Raises:
        UserError: one of several cannot be copied.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plays = (play([_copied(env)]) for env in (envs if len(envs) > 1 else ()))
        first = next(plays, None)
        return all(one == first for one in plays)


def _play(env: Any, seed: int, options: dict[str, Any] | None) -> Iterator[tuple[bytes, ...]]:
    space = copy.deepcopy(env.action_space)
    space.seed(seed)
    try:
        yield _bytes(env.reset(seed=seed, options=options))
        for _ in range(STEPS):
            answer = env.step(space.sample())
            yield _bytes(answer)
            if np.any(answer[2]) or np.any(answer[3]):
                yield _bytes(env.reset(options=options))
    except Exception as error:
        yield (type(error).__name__.encode(),)


def _bytes(answer: tuple[Any, ...]) -> tuple[bytes, ...]:
    return tuple(np.asarray(part).tobytes() for part in answer[:-1])


def alike(one: gymnasium.Env[Any, Any], make: Callable[[], gymnasium.Env[Any, Any]]) -> bool:
    """Whether `make` makes an environment with the same wrappers, attributes and results; steps both."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = make()
            if play([one]) != play([other]) or _spaces(one) != _spaces(other):
                return False
        trees = []
        for inside in (layers(one), layers(other)):
            for layer in inside:  # vector environments draw from those of their rows, and every training seeds them
                layer.action_space.seed(0)
                layer.observation_space.seed(0)
            reader = Reader(inside)
            trees.append([reader.layer(layer) for layer in inside])
            if reader.lost:
                return False
        return equal(*trees)
    except Exception:  # whatever a user's environment raises, it is not known to be the same
        return False


def _spaces(env: Any) -> list[Any]:
    return [(layer.observation_space, layer.action_space) for layer in layers(env)]


def equal(one: Any, other: Any) -> bool:
    """Whether two trees of `rlamort.env.state` are equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)
