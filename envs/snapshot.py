"""The whole state of a Gymnasium environment, through its wrappers, as arrays and plain values.

What an environment is made of decides: numbers, text, arrays, containers of these, NumPy generators and MuJoCo data are read
and written; spaces, specifications, models, renderers and functions count as constant; anything else cannot be vouched for.
"""

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from rlamort.env import Env
from rlamort.errors import Fault

CONSTANT = (gymnasium.Space, EnvSpec, type, types.FunctionType, types.MethodType, types.ModuleType)
FAULT = "fault"  # the key in info under which a step that raised says so
GENERATOR, MUJOCO, NATIVE = "numpy generator", "mujoco data", "native environment"


class Snapshot(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The outermost wrapper of an environment of ours: it can give its state, and survives the environment's exceptions.

    A step that raises becomes one with a reward of NaN and the exception's text in info; the next reset is one of an
    environment made anew, from a seed of its own.

    Args:
        make: makes the environment.
        row: which of several it is.
    """

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]], row: int) -> None:
        super().__init__(make())
        self.make, self.row = make, row
        self.seed, self.raised, self.broken = 0, 0, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.seed = seed
        if self.broken:
            self.env, self.broken = self.make(), False
            seed = self.seed + 1_000_003 * self.raised if seed is None else seed
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        try:
            return self.env.step(action)
        except Exception as error:
            self.raised, self.broken = self.raised + 1, True
            nothing = np.zeros(self.observation_space.shape or (), self.observation_space.dtype)
            return nothing, float("nan"), False, True, {FAULT: f"{type(error).__name__}: {error}"}

    def snapshot(self) -> list[dict[str, Any]] | None:
        """A dict for this wrapper and for every layer below it; None where some part of one cannot be read."""
        try:
            return [
                {"seed": self.seed, "raised": self.raised, "broken": self.broken},
                *(
                    {name: _read(value) for name, value in vars(layer).items() if not _constant(value)}
                    for layer in _layers(self.env)
                ),
            ]
        except TypeError:
            return None

    def restore(self, snapshots: list[list[dict[str, Any]]]) -> None:
        """Put back what `snapshot` gave, of the list of all rows'.

        Raises:
            Fault: this environment is built otherwise than the one it was taken from.
        """
        layers, states = [self, *_layers(self.env)], snapshots[self.row]
        if len(layers) != len(states):
            raise Fault(f"env {self.env}: it has {len(layers)} layers; the checkpoint's had {len(states)}")
        for layer, state in zip(layers, states, strict=True):
            for name, value in state.items():
                _write(layer, name, value)


def _layers(env: Any) -> Iterator[Any]:
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _constant(value: Any) -> bool:
    return isinstance(value, (*CONSTANT, gymnasium.Env)) or type(value).__name__ in ("MjModel", "MujocoRenderer")


def _is_mujoco_data(value: Any) -> bool:
    """Without importing MuJoCo, which sets up rendering when it is imported, and is not every environment's affair."""
    return type(value).__name__ == "MjData" and "mujoco" in sys.modules


def _read(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return np.array(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return value.copy()
    if isinstance(value, tuple | list):
        return [_read(one) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _read(one) for key, one in value.items() if not _constant(one)}
    if isinstance(value, np.random.Generator):
        return {GENERATOR: _read(value.bit_generator.state)}
    if _is_mujoco_data(value):
        return {MUJOCO: _read_mujoco(value)}
    if isinstance(value, Env):
        return {NATIVE: value.state()}
    raise TypeError(f"{type(value).__name__}")


def _write(layer: Any, name: str, value: Any) -> None:
    own = getattr(layer, name, None)
    if isinstance(value, dict) and GENERATOR in value:
        if not isinstance(own, np.random.Generator):  # made lazily, so a fresh environment may not have its own yet
            own = np.random.Generator(getattr(np.random, value[GENERATOR]["bit_generator"])())
            setattr(layer, name, own)
        own.bit_generator.state = value[GENERATOR]
    elif isinstance(value, dict) and MUJOCO in value:
        _write_mujoco(own, value[MUJOCO])
    elif isinstance(own, Env) and isinstance(value, dict) and NATIVE in value:
        own.restore(value[NATIVE])
    elif isinstance(own, np.ndarray) and isinstance(value, np.ndarray) and own.shape == value.shape and own.flags.writeable:
        own[...] = value  # in place: it may be a view of something that others hold too
    elif isinstance(own, np.generic) and isinstance(value, np.ndarray):
        setattr(layer, name, value[()])
    elif isinstance(own, tuple) and isinstance(value, list):
        setattr(layer, name, tuple(value))
    else:
        setattr(layer, name, value)


def _mujoco_arrays(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of fixed size: beside the state proper they hold what the last step derived, which environments look at
    before the next one derives it anew (Humanoid's centre of mass, Ant's body positions)."""
    for name in dir(data):
        if name.startswith(("_", "efc_", "iefc_", "contact")):
            continue
        value = getattr(data, name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.size and value.flags.writeable:
            yield name, value


def _read_mujoco(data: Any) -> dict[str, np.ndarray]:
    import mujoco

    kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    state = np.empty(mujoco.mj_stateSize(data.model, kind))
    mujoco.mj_getState(data.model, data, state, kind)
    return {"integration state": state} | {name: value.copy() for name, value in _mujoco_arrays(data)}


def _write_mujoco(data: Any, value: dict[str, np.ndarray]) -> None:
    import mujoco

    mujoco.mj_setState(data.model, data, value["integration state"], int(mujoco.mjtState.mjSTATE_INTEGRATION))
    for name, own in _mujoco_arrays(data):
        if name in value and own.shape == value[name].shape:
            own[...] = value[name]
