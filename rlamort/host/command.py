"""Shared parts of all commands: options, and errors as one message with an exit code."""

import argparse
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlamort.errors import Fault, Preempted, UserError

INTERRUPTED = 130
STDOUT = 1  # its descriptor
UNREAD = 141  # as a shell counts a process that SIGPIPE ended


class Parser(argparse.ArgumentParser):
    """The options of one command, intermixed with its other arguments; errors are a `UserError`."""

    def __init__(self, name: str, about: str, **more: Any) -> None:
        super().__init__(prog=f"rlamort {name}", description=about, **more)

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        return self.parse_intermixed_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('rlamort ')}: {message}; `{self.prog} --help` says what it takes")


def out_option(parser: argparse.ArgumentParser, about: str) -> None:
    """Add --out, and --force, which overwrites it."""
    parser.add_argument("--out", type=Path, help=about)
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def free(options: argparse.Namespace, folder: bool = False) -> Path | None:
    """The path of --out, None without it.

    Raises:
        UserError: it exists and would be overwritten, is of the wrong kind, or cannot be written there.
    """
    out: Path | None = options.out
    if out is None:
        return None
    if out.exists() and out.is_dir() != folder:
        there, needed = ("file", "folder") if folder else ("folder", "file")
        raise UserError(f"--out {out}: it is a {there}; a {needed} is needed")
    if out.exists() and not options.force and not (folder and not any(out.iterdir())):
        raise UserError(f"--out {out}: it exists already; --force overwrites it")
    require_room(out)
    return out


def require_room(out: Path) -> None:
    """Whether --out can be written, asked before the work, whose result would be lost.

    Raises:
        UserError: what is there of its path is no folder, or may not be written to.
    """
    above = next(place for place in out.absolute().parents if place.exists())
    if not above.is_dir():
        raise UserError(f"--out {out}: {above} is a file; a folder is needed")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: nothing may be written to {above}")


def guarded(work: Callable[[], Any]) -> int:
    """Run `work` and return its exit code; errors are printed as one message."""
    try:
        work()
        if sys.stdout is not None:  # as in a process whose output was closed
            sys.stdout.flush()
    except (UserError, Fault) as error:
        return say(error, error.exit_code)
    except Preempted as end:
        return end.exit_code
    except OSError as error:
        return UNREAD if unread() else say(error, 4)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error))):
            raise
        size = re.search(r"allocate [\d.]+ \w+", str(error))
        what = f"could not {size[0]}" if size else str(error) or "nothing is left"
        return say(UserError(f"memory: it does not suffice ({what}); smaller sizes may fit"), 2)
    return 0


def unread() -> bool:
    """Whether nobody reads standard output any more, as after `| head`; then the rest of it goes nowhere, without a word."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    broken = any(event & select.POLLERR for _, event in poll.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return broken


def warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """Print a warning in one line, without its place in the code."""
    print(f"rlamort: warning: {message}", file=sys.stderr)


def say(error: Exception, code: int) -> int:
    if os.environ.get("RLAMORT_TRACEBACK"):
        traceback.print_exception(error)
    print(f"rlamort: {error}", file=sys.stderr)
    return code
