"""Users' values as JSON and YAML, and back, with arrays, NumPy scalars, paths and tuples preserved."""

from pathlib import Path, PurePath
from typing import Any

import numpy as np

ARRAY, PATH, TUPLE = "(array)", "(path)", "(tuple)"  # keys that no keyword can have


def plain(value: Any) -> Any:
    """`value` of None, bools, numbers, text, arrays, paths, lists, tuples and dicts with text as keys, as JSON values.

    Raises:
        TypeError: it contains another type; the message says where.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufU":
        return {ARRAY: np.asarray(value).tolist(), "dtype": value.dtype.str, "scalar": isinstance(value, np.generic)}
    if isinstance(value, PurePath):
        return {PATH: str(value)}
    if isinstance(value, bool | int | float | str):  # of a class derived from one of these
        return plain(next(kind for kind in (bool, int, float, str) if isinstance(value, kind))(value))
    if isinstance(value, tuple):
        return {TUPLE: [_at(i, one) for i, one in enumerate(value)]}
    if isinstance(value, list):
        return [_at(i, one) for i, one in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) and key not in (ARRAY, PATH, TUPLE) for key in value):
        return {key: _at(key, one) for key, one in value.items()}
    raise TypeError(f": a {type(value).__name__}")


def _at(where: str | int, value: Any) -> Any:
    try:
        return plain(value)
    except TypeError as error:
        raise TypeError((f".{where}" if isinstance(where, str) else f"[{where}]") + str(error)) from None


def revived(value: Any) -> Any:
    """The value of which `plain` made these JSON values."""
    if isinstance(value, list):
        return [revived(one) for one in value]
    if not isinstance(value, dict):
        return value
    if ARRAY in value:
        array = np.array(value[ARRAY], dtype=value["dtype"])
        return array[()] if value["scalar"] else array
    if PATH in value:
        return Path(value[PATH])
    if TUPLE in value:
        return tuple(revived(one) for one in value[TUPLE])
    return {key: revived(one) for key, one in value.items()}
