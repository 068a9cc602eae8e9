"""Contents of files of agents and runs, validated before anything is built from them."""

from pathlib import Path
from typing import Any

import yaml

from rlamort.config import methods
from rlamort.errors import UserError
from rlamort.host.plain import revived
from rlamort.host.saved import Saved, open_saved
from rlamort.run.checkpoint import Checkpoints


def trusted(named: Any, given: str | None) -> str:
    """The method that a file names, if it is one of rlamort's; else the user's, since files never cause its import.

    Raises:
        UserError: the file names a method that is not rlamort's, and the user names none.
    """
    if named in methods():
        return str(named)
    if given is None:
        raise UserError(f"method: {named} is not one of rlamort's; name its file yourself to have it imported (method=FILE)")
    return str(Path(given).resolve())


def agent_in(path: Path) -> Saved:
    """The agent in a folder, or in a run directory: the finished one, or that of the newest checkpoint."""
    if (path / "agent").is_dir():
        return open_saved(path / "agent")
    if (path / "ckpt").is_dir() and (loaded := Checkpoints(path / "ckpt").newest()) is not None:
        return loaded.saved
    return open_saved(path)


def run_facts(path: Path) -> dict[str, Any]:
    """The config.yaml of a run directory: its method, values, and why an environment cannot be constructed by name.

    Raises:
        UserError: it is not a run directory.
    """
    file = path / "config.yaml"
    facts = yaml.safe_load(file.read_text()) if file.is_file() else None
    if not isinstance(facts, dict) or not {"method", "row"} <= set(facts):
        lacking = "with a config.yaml" if facts is None else "whose config.yaml has a method and its row"
        raise UserError(f"{path}: it is not a run directory; one that `rlamort train` made, {lacking}, is needed")
    values = {name: value for name, value in facts.items() if name not in ("method", "row", "unnamed")}
    return {"method": facts["method"], "unnamed": dict(facts.get("unnamed", {})), "values": revived(values)}
