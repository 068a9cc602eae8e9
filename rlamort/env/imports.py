"""Hints at classes of the current folder."""

import ast
import os
from pathlib import Path

import rlamort.envs  # noqa: F401  registers its problems with Gymnasium, by whose names they are found here


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
