"""MuJoCo's data and model as arrays."""

from collections.abc import Iterator
from typing import Any

import numpy as np

NOT_PHYSICS = ("tex_", "mesh_", "skin_", "bvh_", "oct_", "text_", "plugin")  # large parts of a MuJoCo model


def _mujoco_arrays(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of fixed size: the state and what the last step derived from it, which some environments read
    before the next step computes it again (Humanoid's centre of mass, Ant's body positions)."""
    for name in dir(data):
        if name.startswith(("_", "efc_", "iefc_", "contact")):
            continue
        value = getattr(data, name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.size and value.flags.writeable:
            yield name, value


def model_arrays(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """What a randomised environment may change: masses, frictions, gains, heights, gravity, the time step, the solver."""
    for holder, prefix in ((model, ""), (model.opt, "opt."), (model.stat, "stat.")):
        for name in dir(holder):
            if name.startswith(("_", *NOT_PHYSICS)):
                continue
            value = getattr(holder, name)
            if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.size and value.flags.writeable:
                yield prefix + name, value
            elif prefix and isinstance(value, int | float):
                yield prefix + name, np.array(value)


def write_model(model: Any, content: dict[str, np.ndarray]) -> None:
    """Restore what `model_arrays` gave of a model of the same sizes."""
    for name, own in model_arrays(model):
        holder, _, field = name.rpartition(".")
        if holder and name not in content:  # an older rlamort saved it
            continue
        if own.shape != content[name].shape:
            raise ValueError(f"its MuJoCo model has {own.shape} numbers in {name}; there were {content[name].shape}")
        if not np.array_equal(own, content[name]):
            if own.ndim or not holder:
                own[...] = content[name]
            else:
                setattr(getattr(model, holder), field, content[name].item())


def read_data(data: Any) -> dict[str, np.ndarray]:
    import mujoco

    kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
    state = np.empty(mujoco.mj_stateSize(data.model, kind))
    mujoco.mj_getState(data.model, data, state, kind)
    return {"integration state": state} | {name: value.copy() for name, value in _mujoco_arrays(data)}


def write_data(data: Any, content: dict[str, np.ndarray]) -> None:
    import mujoco

    mujoco.mj_setState(data.model, data, content["integration state"], int(mujoco.mjtState.mjSTATE_INTEGRATION))
    for name, own in _mujoco_arrays(data):
        if name in content and own.shape == content[name].shape:
            own[...] = content[name]
