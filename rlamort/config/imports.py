"""Import of a user's modules by name, from the current folder or a package."""

import importlib
import os
import sys
from typing import Any

from rlamort.errors import UserError, nearest


def divided(path: str) -> tuple[str, str]:
    """The module of `module:Class` or `module.Class`, and what follows it; no module where there is no separator."""
    module, _, name = path.rpartition(":" if ":" in path else ".")
    return module, name


def module_of(path: str, field: str) -> Any:
    """The module of `module:Class` or `module.Class`; the current folder is searched.

    Args:
        path: such as `thermo:Boiler`.
        field: the key that it is the value of, for messages.

    Raises:
        UserError: it cannot be imported.
    """
    name, _ = divided(path)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except (ImportError, ValueError, TypeError) as error:  # ValueError: an empty name; TypeError: one that begins with a dot
        raise UserError(f"{field}={path}: no module {name!r} could be imported from {os.getcwd()}: {error}") from error


def class_at(path: str, field: str, kinds: tuple[type, ...], wanted: str) -> type[Any]:
    """The class `module:Class` or `module.Class`, derived from one of `kinds`, which messages call `wanted`.

    Raises:
        UserError: there is none of that name, or it is not derived from them.
    """
    module, (name, attribute) = module_of(path, field), divided(path)
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"{field}={path}: module {name!r} has no {attribute!r}. {nearest(attribute, public)}")
    found = getattr(module, attribute)
    if not (isinstance(found, type) and issubclass(found, kinds)):  # the name may be a file's: nothing is called
        what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise UserError(f"{field}={path}: it is {what}; a class derived from {wanted} is needed")
    return found
