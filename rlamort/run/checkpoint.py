"""Checkpoints of a run: arrays as safetensors, everything else as JSON. Reading them executes no code from the files.

    RUN/ckpt/step_000000010000/ manifest.json (checksums), agent.json, agent.safetensors, state.safetensors
    RUN/ckpt/frames/            what was added to the replay between checkpoints: later checkpoints refer to these files
    RUN/ckpt/LATEST             the newest step, as a hint: the newest folder with valid checksums is used

A step is written under a temporary name, synced, and renamed, so that it appears atomically.
"""

import contextlib
import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from rlamort.errors import UserError
from rlamort.host.machine import versions
from rlamort.host.publish import discard, published_folder, sync
from rlamort.host.saved import AGENT, FORMAT, Damaged, Saved, open_saved, read_json, ready, write_agent, write_synced

MANIFEST, LATEST, FRAMES = "manifest.json", "LATEST", "frames"
STATE = "state.safetensors"  # with the JSON that refers to its tensors in its header
FILES = (*AGENT, STATE, MANIFEST)
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a file of the folder itself: no separators, no dots in front
# only files and folders of these names are ever removed from a folder of checkpoints
STEP, SEGMENT, LEFT = (re.compile(p) for p in (r"step_\d{12}", r"\d{12}-[0-9a-f]{8}\.safetensors", r"\.tmp-[0-9a-f]+"))
ARRAY, TENSOR = "array", "tensor"


class Loaded(NamedTuple):
    """A checkpoint with valid checksums."""

    saved: Saved
    state: dict[str, Any]
    segments: list[dict[str, Any]]  # of the replay, in the order they were written
    folder: Path

    def frames(self) -> Iterator[dict[str, Any]]:
        """The replay's parts, one at a time."""
        for segment in self.segments:
            yield _unpack(*_read_pair(self.folder / FRAMES / segment["name"]))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the checkpoints.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.segments: list[dict[str, Any]] = []  # that the next checkpoint will name

    def write(
        self, env_step: int, agent: dict[str, Tensor], facts: dict[str, Any], state: dict[str, Any], frames: dict[str, Any]
    ) -> int:
        """Publish one checkpoint; returns its size in bytes.

        Args:
            env_step: in its name.
            agent: the agent's `state_dict`.
            facts: the JSON values that `load` needs.
            state: everything else but frames.
            frames: what was added to the replay since the last one; of every ring of `slots`, slots up to `high`.
        """
        (self.folder / FRAMES).mkdir(parents=True, exist_ok=True)
        segment = self._write_frames(env_step, frames)
        live = frames["high"] + 1 - frames["slots"]
        segments = [s for s in [*self.segments, segment] if (np.array(s["high"]) >= live).any()]
        path = self.folder / f"step_{env_step:012d}"
        try:
            with published_folder(path, FILES, lambda _: True) as fresh:  # a damaged one may be written again
                write_agent(fresh, agent, facts)
                _write_pair(fresh / STATE, *_pack(state))
                files = {file.name: _checksum(file) for file in sorted(fresh.iterdir())}
                manifest = {
                    "format": FORMAT,
                    "env_step": env_step,
                    "files": files,
                    "segments": segments,
                    "versions": versions(),
                }
                write_synced(fresh / MANIFEST, json.dumps(manifest, indent=1).encode())
                size = sum(file.stat().st_size for file in fresh.iterdir())
        except BaseException:
            self._drop_unnamed()  # or each further try would leave more on a full disk
            raise
        self.segments = segments
        pointer = self.folder / f".{LATEST}"
        write_synced(pointer, path.name.encode())
        os.replace(pointer, self.folder / LATEST)
        self._prune()
        return size + int(segment["bytes"])

    def latest(self) -> int:
        """Environment steps at the newest checkpoint, intact or not; -1 if there is none."""
        return max((int(path.name.removeprefix("step_")) for path in self._steps()), default=-1)

    def newest(self) -> Loaded | None:
        """The newest intact checkpoint, with a warning for each damaged one. None if none was ever published.

        Raises:
            UserError: all are damaged.
        """
        steps = self._steps()
        for path in reversed(steps):
            try:
                loaded = self._read(path)
            except Damaged as damage:
                instead = "there is no earlier one" if path == steps[0] else "an earlier one is used"
                warnings.warn(f"checkpoint {path}: {damage}; {instead}", stacklevel=2)
                continue
            self.segments = loaded.segments
            return loaded
        if steps:
            raise UserError(f"{self.folder}: none of its {len(steps)} checkpoints can be used")
        return None

    def sweep(self) -> None:
        """Remove temporary files of a killed process."""
        for place in (self.folder, self.folder / FRAMES):
            for path in place.glob(".tmp-*") if place.is_dir() else []:
                if LEFT.fullmatch(path.name):
                    discard(path, FILES) if path.is_dir() else path.unlink(missing_ok=True)

    def _read(self, path: Path) -> Loaded:
        manifest = read_json(path / MANIFEST)
        try:
            if manifest["format"] != FORMAT:
                raise Damaged(f"its format is {manifest['format']}; this rlamort reads format {FORMAT}")
            files = {path / _plain(name): digest for name, digest in manifest["files"].items()}
            segments = [dict(segment) for segment in manifest["segments"]]
            files |= {self.folder / FRAMES / _plain(segment["name"]): segment["sha256"] for segment in segments}
        except (KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{MANIFEST} lacks {error}") from error
        for file, digest in files.items():
            if file.is_symlink() or not file.is_file():
                raise Damaged(f"{file.name} is missing, or no plain file")
            if _checksum(file) != digest:
                raise Damaged(f"{file.name} is not what was written: its checksum differs")
        try:
            return Loaded(open_saved(path), _unpack(*_read_pair(path / STATE)), segments, self.folder)
        except UserError as error:
            raise Damaged(str(error)) from error

    def _write_frames(self, env_step: int, frames: dict[str, Any]) -> dict[str, Any]:
        temporary = self.folder / FRAMES / f".tmp-{uuid.uuid4().hex}"
        try:
            _write_pair(temporary, *_pack(frames))
            digest = _checksum(temporary)
            name = f"{env_step:012d}-{digest[:8]}.safetensors"
            os.replace(temporary, self.folder / FRAMES / name)
            sync(self.folder / FRAMES)
        finally:
            temporary.unlink(missing_ok=True)
        size = (self.folder / FRAMES / name).stat().st_size
        return {"name": name, "sha256": digest, "bytes": size, "high": frames["high"].tolist()}

    def _steps(self) -> list[Path]:
        """Oldest first."""
        found = self.folder.glob("step_*") if self.folder.is_dir() else ()
        return sorted(path for path in found if STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink())

    def _prune(self) -> None:
        for path in self._steps()[: -self.keep]:
            discard(path, FILES)
        self._drop_unnamed()

    def _drop_unnamed(self) -> None:
        """Remove what no checkpoint refers to of the replay's parts."""
        with contextlib.suppress(Damaged, KeyError, TypeError):
            manifests = self.folder.glob(f"*/{MANIFEST}")  # of copies that a user has made as well
            named = {segment["name"] for file in manifests for segment in read_json(file)["segments"]}
            for file in (self.folder / FRAMES).glob("*.safetensors"):
                if SEGMENT.fullmatch(file.name) and file.name not in named:
                    file.unlink(missing_ok=True)


def _plain(name: str) -> str:
    if not NAME.fullmatch(name):
        raise Damaged(f"{MANIFEST} names {name!r}, which is no file of this checkpoint")
    return name


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write_pair(file: Path, tensors: dict[str, Tensor], facts: Any) -> None:
    """Write tensors, with JSON values in the header of the file."""
    write_synced(file, save(tensors, metadata={"facts": json.dumps(facts)}))


def _read_pair(file: Path) -> tuple[dict[str, Tensor], Any]:
    try:
        with safe_open(file, framework="pt") as content:
            facts = json.loads((content.metadata() or {})["facts"])
        return load(file.read_bytes()), facts
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise Damaged(f"{file.name} cannot be read: {error}") from error


def _pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Plain values, arrays and tensors, nested -> the tensors, and JSON that refers to them."""
    tensors: dict[str, Tensor] = {}

    def packed(value: Any) -> Any:
        if isinstance(value, Tensor | np.ndarray):
            name = str(len(tensors))
            array = isinstance(value, np.ndarray)
            tensors[name] = ready(torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.clone())
            return {ARRAY if array else TENSOR: name}
        if isinstance(value, dict):
            return {"dict": {key: packed(one) for key, one in value.items()}}
        if isinstance(value, list | tuple):
            return [packed(one) for one in value]
        return value

    return tensors, packed(tree)


def _unpack(tensors: dict[str, Tensor], facts: Any) -> Any:
    if isinstance(facts, list):
        return [_unpack(tensors, one) for one in facts]
    if isinstance(facts, dict):
        ((kind, content),) = facts.items()
        if kind == "dict":
            return {key: _unpack(tensors, one) for key, one in content.items()}
        return tensors[content].numpy() if kind == ARRAY else tensors[content]
    return facts
