"""Atomic writes of folders and files, which never replace anything that rlamort did not write."""

import contextlib
import ctypes
import itertools
import os
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from rlamort.errors import UserError

EXCHANGE, HERE = 2, -100  # Linux's RENAME_EXCHANGE and AT_FDCWD


@contextlib.contextmanager
def published_folder(path: Path, names: Collection[str], ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary folder that atomically replaces `path` when the block succeeds; if it fails, `path` is unchanged.

    Args:
        path: the destination; its parents are created.
        names: of the files that such a folder may hold.
        ours: whether a folder with such files was written by rlamort.

    Raises:
        UserError: it holds files that rlamort did not write, or is the current folder.
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
    content = sorted(path.iterdir())
    odd = [file.name for file in content if file.name not in names or file.is_symlink() or not file.is_file()]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise UserError(f"{path}: it holds {odd[0]}{more}, which rlamort did not save there; choose a new or empty folder")
    if content and not ours(path):
        raise UserError(f"{path}: its {content[0].name} is not one that rlamort wrote; choose a new or empty folder")


def _replace(path: Path, fresh: Path) -> Path:
    """Replace the folder `path` by `fresh`, atomically on Linux, elsewhere in two steps; returns the path of the old one."""
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
    """Remove the files of these names, and then the folder if it is empty."""
    if not folder.is_symlink():
        with contextlib.suppress(OSError):
            for name in names:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


@contextlib.contextmanager
def published_file(path: Path) -> Iterator[Path]:
    """A temporary file that atomically replaces `path` when the block succeeds; if it fails, `path` is unchanged.

    It has the same suffix, since writers choose their format by that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".tmp-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def unused(path: Path) -> Path:
    """The first of NAME, NAME-2, NAME-3 and so on that does not exist."""
    names = itertools.chain([path], (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(2)))
    return next(one for one in names if not one.exists())


def sync(folder: Path) -> None:
    """Sync a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
