"""An agent on disk: tensors as safetensors, everything else as JSON. Reading one runs no code that it brings."""

import json
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlamort.errors import UserError

FORMAT = 1
TENSORS, FACTS = "agent.safetensors", "agent.json"


class Saved(NamedTuple):
    """What a saved agent says of itself."""

    path: Path
    facts: dict[str, Any]

    def fill(self, agent: nn.Module) -> None:
        """Copy the tensors into `agent`, after every name, shape and dtype has been compared.

        Raises:
            UserError: the file is not one of these, or its tensors are another agent's.
        """
        own = agent.state_dict()
        file = self.path / TENSORS
        try:
            with safe_open(file, framework="pt") as tensors:
                names = set(tensors.keys())
                if names != set(own):
                    odd = sorted(names ^ set(own))[0]
                    raise UserError(f"{file}: it does not fit the agent that {FACTS} describes: {odd!r} is on one side only")
                for name in names:
                    part = tensors.get_slice(name)
                    if list(part.get_shape()) != list(own[name].shape):
                        raise UserError(f"{file}: {name!r} has shape {part.get_shape()}; {list(own[name].shape)} is needed")
                with torch.no_grad():
                    for name in names:
                        own[name].copy_(tensors.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: it cannot be read as safetensors: {error}") from error


def save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write an agent to the folder `path`, whole or not at all: it is made beside it and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, fresh / TENSORS)
        (fresh / FACTS).write_text(json.dumps({"format": FORMAT, **facts}, indent=2) + "\n", encoding="utf-8")
        fresh.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def open_saved(path: Path) -> Saved:
    """Read what the folder `path` says of the agent in it.

    Raises:
        UserError: there is none, or a newer rlamort wrote it.
    """
    file = path / FACTS
    if path.is_file():
        raise UserError(f"{path}: a file, of a foreign format; a saved agent is a folder with {FACTS} and {TENSORS}")
    if not file.is_file():
        raise UserError(f"{path}: no agent is saved there; a folder with {FACTS} and {TENSORS} is needed")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        written = facts["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file}: it is not a description of an agent: {error}") from error
    if written != FORMAT:
        raise UserError(f"{file}: its format is {written}; this rlamort reads format {FORMAT}")
    return Saved(path, facts)


def versions() -> dict[str, str]:
    """Of everything that a result depends on."""
    found = {}
    for name in ("rlamort", "torch", "gymnasium", "mujoco", "numpy", "stable-baselines3"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
