"""Contents of files of agents and runs, validated before anything is built from them."""

import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlamort.config import KIND, defaults, methods, read_row
from rlamort.config.imports import divided
from rlamort.errors import UserError
from rlamort.host.machine import device_of, require_products
from rlamort.host.plain import revived
from rlamort.host.saved import Saved, open_saved
from rlamort.run.checkpoint import Checkpoints
from rlamort.run.older import modern

NAMING = "method=FILE in Python, --method FILE of a command"


def trusted(name: Any, file: str | None) -> str:
    """A saved agent's method `name`, if it is one of rlamort's; else the user's `file`, since saved names are not imported.

    Raises:
        UserError: the method is not one of rlamort's, and the user names no file; or either is, and the user names another.
    """
    if file not in (None, name) and (name in methods() or file in methods()):
        raise UserError(f"method: what is saved there is of {name}, not of {file}; leave method out, or give that")
    if name in methods():
        return str(name)
    if file is None:
        raise UserError(f"method: {name} is not one of rlamort's; name its file yourself to have it imported ({NAMING})")
    return str(Path(file).resolve())


FUNCTION = re.compile(r"[\w.]+:[A-Za-z_]\w*")  # module:function, as parts take it


def values_of(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a method's keys, in today's names.

    Raises:
        UserError: a part is of a class that is neither rlamort's nor imported, as those of the row of `method` are.
    """
    row = read_row(method)
    defaults(row)  # imports the parts that the row names: the user has named the row
    found = modern(row, values)
    for key, value in found.items():
        _require_imported(key, value)
    return found


def as_here(values: Mapping[str, Any]) -> dict[str, Any]:
    """A saved agent's values, with a device and products that this machine has: it need not be the one of its training."""
    here = {"device": "auto", "matmul": "float32"}
    asked = here | {key: str(values[key]) for key in here if key in values}
    try:
        require_products(asked["matmul"], device_of(asked["device"]))
        return dict(values)
    except UserError:
        return {**values, **{key: value for key, value in here.items() if key in values}}


def _require_imported(key: str, value: Any) -> None:
    if not isinstance(value, dict) or KIND not in value:
        return
    for name, inner in value.items():
        _require_imported(f"{key}.{name}", inner)
        module = divided(str(inner))[0] if name == KIND else ""
        if isinstance(inner, str) and FUNCTION.fullmatch(inner):
            module = inner.partition(":")[0]
        if module and module not in sys.modules:
            raise UserError(
                f"{key}: it is a {inner}, which is not one of rlamort's, and what a file names is not imported; import "
                f"{module} first, or name a method's file that has it ({NAMING})"
            )


def agent_in(path: Path) -> Saved:
    """The agent in a folder, or the newest one in a run directory: that of a session's end, or of a checkpoint since then.

    Raises:
        UserError: there is none, or it is damaged.
    """
    checkpoints = Checkpoints(path / "ckpt")
    ended = open_saved(path / "agent") if (path / "agent").is_dir() else None
    if ended is not None and checkpoints.latest() <= _steps(ended):
        return ended
    try:
        loaded = checkpoints.newest()
    except UserError as damage:
        if ended is None:
            raise
        warnings.warn(f"{damage}; the agent of step {_steps(ended):,} in {ended.path} is loaded", stacklevel=1)
        return ended
    found = [saved for saved in (ended, loaded and loaded.saved) if saved is not None]
    return max(found, key=_steps) if found else open_saved(path)


def _steps(saved: Saved) -> int:
    """Environment steps that an agent has learned from; -1 if its description lacks them."""
    return int(saved.facts.get("env_step", -1))


def run_facts(path: Path) -> dict[str, Any]:
    """The config.yaml of a run directory: its method, row, values, and why an environment cannot be constructed by name.

    Raises:
        UserError: it is not a run directory.
    """
    file = path / "config.yaml"
    facts = yaml.safe_load(file.read_text()) if file.is_file() else None
    if not isinstance(facts, dict) or not {"method", "row"} <= set(facts):
        lacking = "with a config.yaml" if facts is None else "whose config.yaml has a method and its row"
        raise UserError(f"{path}: it is not a run directory; one that `rlamort train` made, {lacking}, is needed")
    values = {name: value for name, value in facts.items() if name not in ("method", "row", "unnamed")}
    known = {"method": facts["method"], "row": facts["row"], "unnamed": dict(facts.get("unnamed", {}))}
    return known | {"values": revived(values)}
