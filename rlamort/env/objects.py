"""State of Python objects: what may change, what is constant, and the names of constants."""

import collections
import enum
import functools
import logging
import pathlib
import re
import sys
import types
from typing import Any

import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec

PLAIN = (bool, int, float, str, type(None))
CONTAINERS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, collections.deque)}
CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
VALUES = (enum.Enum, pathlib.PurePath, re.Pattern, range, slice, bytes, complex, np.dtype, torch.dtype, torch.device)
SILENT = (EnvSpec, functools.partial, logging.Logger, types.MappingProxyType, property)  # of no consequence to a step
DRAWING = ("pygame", "glfw", "OpenGL", "PIL", "matplotlib", "imageio", "moviepy", "mujoco._render")
RENDERERS = ("MujocoRenderer", "OffScreenViewer", "WindowViewer", "Renderer")
LIBRARIES = {"gymnasium", "numpy", "torch", "mujoco", "rlamort", "scipy", "stable_baselines3", *sys.stdlib_module_names} - {
    "__main__"
}  # their classes and globals hold nothing that an environment changes
GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
HEAP_TYPE = 1 << 9  # of a class that is written in Python


def constant(value: Any) -> bool:
    """Whether `value` is constant for an environment."""
    if isinstance(value, (*CODE, *VALUES, *SILENT)) or type(value).__name__ in RENDERERS:
        return True
    return drawn(value) or type(value).__module__.startswith("rlamort.run")  # an environment may know who learns in it


def drawn(value: Any) -> bool:
    """Whether it is part of a window or a picture."""
    return type(value).__module__.startswith(DRAWING)


def name_of(value: Any) -> str:
    """A constant's name, which identifies it in another process."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, CODE):
        return f"{value.__module__}:{value.__qualname__}"
    return f"{name_of(type(value))} {value!r}" if isinstance(value, VALUES) else name_of(type(value))


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an instance, slots included, without the cached spec of Gymnasium's wrappers."""
    slots = [name for kind in type(value).__mro__ for name in _words(vars(kind).get("__slots__", ()))]
    in_slots = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
    own = getattr(value, "__dict__", {})
    return in_slots | {name: one for name, one in own.items() if isinstance(name, str) and name != "_cached_spec"}


def _words(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def global_names(code: types.CodeType) -> set[str]:
    """Global names that a function uses, and the functions inside it."""
    inner = (global_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*inner)


def is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def value_in(holder: Any, name: str) -> Any:
    """One of `Reader.places`."""
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)
