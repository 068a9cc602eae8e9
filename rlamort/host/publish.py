"""Folders and files that appear whole or not at all, and never in place of something that rlamort did not write."""

import contextlib
import ctypes
import os
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from rlamort.errors import UserError

EXCHANGE, HERE = 2, -100  # Linux's RENAME_EXCHANGE and AT_FDCWD


@contextlib.contextmanager
def published_folder(path: Path, names: Collection[str], ours: Callable[[Path], bool]) -> Iterator[Path]:
    """An empty folder that takes the place of `path` once the block has succeeded; until then, and if it fails, all stays.

    Args:
        path: what is published; its parents are made.
        names: of the files that such a folder may hold.
        ours: whether a folder that holds nothing else was written by rlamort.

    Raises:
        UserError: something that rlamort did not write is there, or the folder is the current one.
    """
    _refuse_foreign(path, names, ours)
    path = path.resolve()  # of a link, what it points to
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.parent / f".tmp-{uuid.uuid4().hex}"
    fresh.mkdir()
    useless = fresh
    try:
        yield fresh
        sync(fresh)
        if path.exists():
            useless = _replace(path, fresh)
        else:
            os.rename(fresh, path)
        sync(path.parent)
    finally:
        discard(useless, names)
        if useless.exists():
            warnings.warn(f"{useless}: it holds what was put into {path} while that was written", stacklevel=3)


def _refuse_foreign(path: Path, names: Collection[str], ours: Callable[[Path], bool]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path}: it is a file; the name of a new folder is needed")
    if path.resolve() in (here := Path.cwd(), *here.parents):
        raise UserError(f"{path}: the current folder lies there; the name of a folder inside it is needed, which may be new")
    held = sorted(path.iterdir())
    odd = [file.name for file in held if file.name not in names or file.is_symlink() or not file.is_file()]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise UserError(f"{path}: it holds {odd[0]}{more}, which rlamort did not save there; give a new or empty folder")
    if held and not ours(path):
        raise UserError(f"{path}: its {held[0].name} is not one that rlamort wrote; give a new or empty folder")


def _replace(path: Path, fresh: Path) -> Path:
    """Put `fresh` in the place of the folder `path`, in one step on Linux, elsewhere in two; where the old one is then."""
    system = ctypes.CDLL(None, use_errno=True)
    if hasattr(system, "renameat2"):
        one, other = (ctypes.c_char_p(os.fsencode(folder)) for folder in (fresh, path))
        if system.renameat2(HERE, one, HERE, other, EXCHANGE) == 0:
            return fresh
    aside = path.parent / f".tmp-{uuid.uuid4().hex}"
    os.rename(path, aside)
    try:
        os.rename(fresh, path)
    except OSError:
        os.rename(aside, path)
        raise
    return aside


def discard(folder: Path, names: Collection[str]) -> None:
    """Remove a folder of rlamort's: the files of these names, and then the folder, unless something else is in it."""
    if not folder.is_symlink():
        with contextlib.suppress(OSError):
            for name in names:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


@contextlib.contextmanager
def published_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file that takes its place once the block has succeeded; if it fails, all stays.

    It ends as `path` does, since writers choose their format by that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".tmp-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
