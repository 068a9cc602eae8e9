"""Saved agents: tensors as safetensors, everything else as JSON. Reading them executes no code from the files."""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rlamort.errors import UserError
from rlamort.host.machine import state_dict_on_meta
from rlamort.host.publish import published_folder

FORMAT = 1
TENSORS = "agent.safetensors"
FACTS = "agent.json"
AGENT = (FACTS, TENSORS)
LARGEST_JSON = 64 * 2**20  # bytes


class Damaged(Exception):  # noqa: N818  # it says what the checkpoint is
    """A checkpoint or an agent is damaged; the message says how."""


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file.

    Raises:
        Damaged: it cannot be read, as where it was cut off.
    """
    try:
        with path.open("rb") as file:  # np.load leaves a damaged file open
            opened = np.load(file, allow_pickle=False)
            if not isinstance(opened, np.lib.npyio.NpzFile):
                raise Damaged("it holds one array, without a name; `numpy.savez` writes arrays with names")
            with opened:
                return {name: opened[name] for name in opened.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise Damaged(str(error)) from error


class Saved(NamedTuple):
    """The folder of a saved agent."""

    path: Path
    facts: dict[str, Any]

    def require_fit(self, make: Callable[[], nn.Module]) -> None:
        """Compare names and shapes with an agent on the meta device, before one is allocated.

        Raises:
            UserError: the file cannot be read, or its tensors are another agent's.
        """
        try:
            own = state_dict_on_meta(make)
        except OverflowError as error:
            raise UserError(f"{self.path / FACTS}: the agent that it describes is too large to exist: {error}") from error
        if own is not None:
            with self._tensors() as tensors:
                self._compare(tensors, own)

    def fill(self, agent: nn.Module) -> None:
        """Copy the tensors into `agent`, after comparing all names and shapes.

        Raises:
            UserError: as `require_fit`.
        """
        own = agent.state_dict()
        with self._tensors() as tensors, torch.no_grad():
            self._compare(tensors, own)
            for name, tensor in own.items():
                tensor.copy_(tensors.get_tensor(name))

    @contextlib.contextmanager
    def _tensors(self) -> Iterator[Any]:
        file = self.path / TENSORS
        try:
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: it cannot be read as safetensors: {error}") from error

    def _compare(self, tensors: Any, own: dict[str, Tensor]) -> None:
        file, names = self.path / TENSORS, set(tensors.keys())
        if names != set(own):
            odd = sorted(names ^ set(own))[0]
            raise UserError(f"{file}: it does not fit the agent that {FACTS} describes: {odd!r} is on one side only")
        for name in names:
            shape = tensors.get_slice(name).get_shape()
            if list(shape) != list(own[name].shape):
                raise UserError(f"{file}: {name!r} has shape {shape}; {list(own[name].shape)} is needed")


def save_agent(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write an agent to the folder `path`, atomically.

    Raises:
        UserError: the folder holds other files than a saved agent's.
        OSError: it cannot be written; the previous content is unchanged.
    """
    with published_folder(path, AGENT, _holds_agent) as fresh:
        write_agent(fresh, tensors, facts)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with copies of those that share memory, which safetensors refuses to write."""
    taken: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return found


def _holds_agent(folder: Path) -> bool:
    try:
        return isinstance(read_json(folder / FACTS)["format"], int)
    except (Damaged, KeyError, TypeError):
        return False


def open_saved(path: Path) -> Saved:
    """Open the folder of a saved agent.

    Raises:
        UserError: there is none, or a newer rlamort wrote it.
    """
    if path.is_file():
        raise UserError(
            f"{path}: a file, of a foreign format; a saved agent is a folder with {FACTS} and {TENSORS}. "
            f"Files of Stable-Baselines3 are read by rlamort.load('sb3:{path}')"
        )
    if not (path / FACTS).is_file():
        raise UserError(f"{path}: no agent is saved there; a folder with {FACTS} and {TENSORS} is needed")
    try:
        facts = read_json(path / FACTS)
        written = facts["format"]
    except (Damaged, KeyError, TypeError) as error:
        raise UserError(f"{path / FACTS}: it is not a description of an agent: {error}") from error
    if written != FORMAT:
        raise UserError(f"{path / FACTS}: its format is {written}; this rlamort reads format {FORMAT}")
    return Saved(path, facts)


def write_agent(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    write_synced(folder / TENSORS, save(_apart({name: ready(tensor) for name, tensor in tensors.items()})))
    write_synced(folder / FACTS, (json.dumps({"format": FORMAT, **facts}, indent=1) + "\n").encode())


def ready(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().cpu()


def write_synced(file: Path, content: bytes) -> None:
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def read_json(file: Path) -> Any:
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise Damaged(f"{file.name} has {file.stat().st_size} bytes; {LARGEST_JSON} are allowed")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{file.name} cannot be read as JSON: {error}") from error
