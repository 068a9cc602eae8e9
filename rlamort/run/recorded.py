"""Data sets of demonstrations, read from disk. N steps · d = x_dim · n = dim of an action"""

import importlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from rlamort.env import Space, Spec
from rlamort.errors import UserError
from rlamort.host.saved import Damaged, read_arrays

ARRAYS, BOUNDS = ("observations", "actions", "episode"), ("low", "high")  # of steps, and of an action space
TOLERANCE = 1e-4  # of the larger bound, by which rounding may carry an action out of its box


class Recorded(NamedTuple):
    """Demonstrations in the order in which they were shown."""

    x: np.ndarray  # (N, d) float32
    y: np.ndarray  # (N, n) float32, in [-1, 1]^n
    episode: np.ndarray  # (N,) int64, from 0, never falling


class Episode(NamedTuple):
    """One episode of a data set, in the environment's units."""

    observations: np.ndarray  # (T, ...) or, with the one after the last action, (T + 1, ...)
    actions: np.ndarray  # (T, ...)


def from_npz(path: Path, name: str, spec: Spec) -> Recorded:
    """Arrays `observations` (N, ...) and `actions` (N, ...), and perhaps `episode` (N,), whole numbers that never fall.

    Without `episode` all are one. `low` and `high`, if they are there, are the bounds of the action space that it was made in.
    What else is there is named in a warning: it may be a slip, or say where episodes end.

    Raises:
        UserError: it cannot be read, or does not fit the environment of `spec`.
    """
    try:
        arrays = read_arrays(path)
    except Damaged as error:
        raise UserError(f"{name}: it cannot be read: {error}") from error
    lacking = [key for key in ("observations", "actions") if key not in arrays]
    if lacking:
        raise UserError(f"{name}: it lacks {', '.join(lacking)}, and has {', '.join(arrays) or 'nothing'}")
    if len(bounds := [key for key in BOUNDS if key in arrays]) == 1:
        raise UserError(f"{name}: it has {bounds[0]} alone; both low and high, or neither, are needed")
    if unread := [key for key in arrays if key not in (*ARRAYS, *BOUNDS)]:
        one = "" if "episode" in arrays else "; without `episode` all steps are one episode"
        warnings.warn(f"{name}: nothing reads its {', '.join(unread)}, only {', '.join((*ARRAYS, *BOUNDS))}{one}", stacklevel=2)
    observations, actions = arrays["observations"], arrays["actions"]
    for key, array in arrays.items():
        if not array.ndim and key not in BOUNDS:
            raise UserError(f"{name}: {key} is one value, {array}; an array of one for every step is needed")
    number = arrays.get("episode", np.zeros(len(actions), dtype=np.int64))
    if not len(observations) == len(actions) == len(number) or number.ndim != 1 or not len(number):
        lengths = f"{len(observations)} observations, {len(actions)} actions and {number.shape} episodes"
        raise UserError(f"{name}: {lengths} are given; equally many, and at least one, are needed")
    if number.dtype.kind not in "iu" or (np.diff(number) < 0).any():
        raise UserError(f"{name}: `episode` holds {number.dtype}; whole numbers that never fall, step by step, are needed")
    if all(key in arrays for key in BOUNDS):
        low, high = (_bound(name, key, arrays[key], spec.action) for key in BOUNDS)
        theirs = Space.of(gymnasium.spaces.Box(low.astype("f4"), high.astype("f4")))._replace(shape=spec.action.shape)
        _require_box(name, theirs, spec)
    cuts = np.flatnonzero(np.diff(number)) + 1
    parts = zip(np.split(observations, cuts), np.split(actions, cuts), strict=True)
    return joined([Episode(*part) for part in parts], name, spec)


def _bound(name: str, key: str, array: np.ndarray, action: Space) -> np.ndarray:
    """A bound of the action space that a file was made in, (n,)."""
    try:
        bound = np.broadcast_to(array.astype(np.float64), action.shape).ravel()
    except ValueError as error:
        raise UserError(f"{name}: {key} has shape {array.shape}, of {array.dtype}; numbers in {action} are needed") from error
    if np.isnan(bound).any():
        raise UserError(f"{name}: {key} is {bound}; numbers are needed, in {action}")
    return bound


def from_minari(identifier: str, name: str, spec: Spec) -> Recorded:
    """A data set of Minari's on this machine; nothing is downloaded.

    Raises:
        UserError: Minari is not installed, there is no such data set, or it does not fit the environment of `spec`.
    """
    try:
        minari: Any = importlib.import_module("minari")
        found = minari.load_dataset(identifier, download=False)
    except ImportError as error:
        raise UserError(f"{name}: Minari is needed to read it, pip install 'rlamort[minari]' ({error})") from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name}: it cannot be read: {' '.join(str(error).split())}") from error
    space = found.action_space
    if not isinstance(space, gymnasium.spaces.Box) or np.dtype(space.dtype).kind != "f":
        raise UserError(f"{name}: its action space is {space}; a Box of bounded floats is needed, {spec.action} here")
    if not isinstance(found.observation_space, gymnasium.spaces.Box):
        raise UserError(f"{name}: its observation space is {found.observation_space}; {spec.observation} is needed")
    _require_box(name, Space.of(space), spec)
    return joined([Episode(one.observations, one.actions) for one in found.iterate_episodes()], name, spec)


def _require_box(name: str, theirs: Space, spec: Spec) -> None:
    ours = spec.action
    same = theirs.shape == ours.shape and all(
        np.allclose(a, b, atol=TOLERANCE) for a, b in ((theirs.low, ours.low), (theirs.high, ours.high))
    )
    if not same:
        raise UserError(f"{name}: its actions are of {theirs}, and the environment's of {ours}; the units must be the same")


def joined(episodes: Sequence[Episode], name: str, spec: Spec) -> Recorded:
    """Episodes one after another, checked.

    Raises:
        UserError: an episode is cut off or of other shapes, holds numbers that are not finite, or actions in other units.
    """
    if not episodes:
        raise UserError(f"{name}: it has no episodes")
    whole = list(_whole(episodes, name))
    x = np.concatenate(list(_rows(name, "observations", spec.observation, [one.observations for one in whole])))
    u = np.concatenate(list(_rows(name, "actions", spec.action, [one.actions for one in whole])))
    for what, rows in (("observations", x), ("actions", u)):
        odd = np.flatnonzero(~np.isfinite(rows).all(-1))
        if len(odd):
            raise UserError(f"{name}: {what} are not finite in {len(odd)} of {len(rows)} steps, of which {odd[0]} is the first")
    low, high = (np.array(bound, dtype=np.float64) for bound in (spec.action.low, spec.action.high))
    margin = TOLERANCE * np.maximum(1, np.maximum(np.abs(low), np.abs(high)))
    if ((u < low - margin) | (u > high + margin)).any():
        theirs = Space(spec.action.shape, str(u.dtype), u.min(0).tolist(), u.max(0).tolist())
        raise UserError(f"{name}: its actions span {theirs}, the environment's {spec.action}; the units must be the same")
    y = spec.units.encode(u.reshape(len(u), *spec.action.shape))
    number = np.repeat(np.arange(len(episodes)), [len(one.actions) for one in episodes])
    return Recorded(x, y, number)


def _whole(episodes: Iterable[Episode], name: str) -> Iterable[Episode]:
    """Each with as many observations as actions: the one after the last action is left out."""
    for number, one in enumerate(episodes):
        steps, seen = len(one.actions), len(one.observations)
        if seen not in (steps, steps + 1):
            raise UserError(
                f"{name}: episode {number} is cut off, with {seen} observations for {steps} actions; {steps} or {steps + 1} "
                "are needed"
            )
        yield one._replace(observations=one.observations[:steps])


def _rows(name: str, what: str, space: Space, arrays: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """Each array (T, ...) as float32 rows (T, dim)."""
    for number, array in enumerate(arrays):
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            kind = getattr(array, "dtype", type(array).__name__)
            raise UserError(f"{name}: {what} of episode {number} are {kind}; numbers are needed")
        if what == "actions" and array.dtype.kind != "f":
            raise UserError(f"{name}: its actions are {array.dtype}, which are discrete; floats are needed, in {space}")
        if array.shape[1:] not in (space.shape, (space.dim,)):
            raise UserError(
                f"{name}: {what} of episode {number} have shape {array.shape}; (T, {', '.join(map(str, space.shape))}) is "
                f"needed, in {space}"
            )
        yield array.reshape(len(array), -1).astype(np.float32)
