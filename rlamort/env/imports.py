"""Import of classes by `module:Class`."""

import ast
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import rlamort.envs  # noqa: F401  registers its problems with Gymnasium, by whose names they are found here
from rlamort.errors import UserError, nearest


def module_of(path: str, field: str) -> Any:
    """The module of `module:Class`; the current folder is searched.

    Args:
        path: `module:Class`.
        field: the key that it is the value of, for messages.

    Raises:
        UserError: it cannot be imported.
    """
    name = path.partition(":")[0]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{field}={path}: no module {name!r} could be imported from {os.getcwd()}: {error}") from error


def class_at(path: str, field: str, kinds: tuple[type, ...]) -> type[Any]:
    """The class `module:Class`, derived from one of `kinds`.

    Raises:
        UserError: there is none of that name, or it is not derived from them.
    """
    module_name, _, attribute = path.partition(":")
    module = module_of(path, field)
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"{field}={path}: module {module_name!r} has no {attribute!r}. {nearest(attribute, public)}")
    found = getattr(module, attribute)
    if not (isinstance(found, type) and issubclass(found, kinds)):  # the name may be a file's: nothing is called
        wanted = " or ".join(f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in kinds)
        given = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise UserError(f"{field}={path}: it is {given}; a class derived from {wanted} is needed")
    return found


def here(name: str, key: str = "") -> str:
    """A hint for a module of the current folder that is named without a class; "" if there is no such file.

    The file is parsed, not run.

    Args:
        name: such as `thermo` or `my.thermo` or `thermo.py`.
        key: the key that it is the value of, if any.
    """
    before = f"{key}=" if key else ""
    module = name.removesuffix(".py").replace(os.sep, ".")
    if not all(part.isidentifier() for part in module.split(".")):
        return ""
    place = Path(*module.split("."))
    file = next((one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file()), None)
    if file is None:
        return ""
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        return f"{file} is here, and cannot be read as Python: {error}"
    classes = [node.name for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    if not classes:
        return f"{file} is here, and has no class; {before}module:Class is needed"
    return f"{file} is here: did you mean {' or '.join(f'{before}{module}:{one}' for one in classes[:5])}?"
