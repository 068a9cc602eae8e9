"""What every command has: options, and errors that are said in one message and end it with their exit code."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlamort.errors import Fault, Preempted, UserError

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """The options of one command, before, between and after its other arguments; what is wrong with them is a `UserError`."""

    def __init__(self, name: str, about: str, **more: Any) -> None:
        super().__init__(prog=f"rlamort {name}", description=about, **more)

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        return self.parse_intermixed_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('rlamort ')}: {message}; `{self.prog} --help` says what it takes")


def out_option(parser: argparse.ArgumentParser, about: str) -> None:
    """Take --out, and --force, which writes over what is there."""
    parser.add_argument("--out", type=Path, help=about)
    parser.add_argument("--force", action="store_true", help="write over what is there")


def free(given: argparse.Namespace, folder: bool = False) -> Path | None:
    """What --out names, None where it names nothing.

    Raises:
        UserError: something is there that would be lost, or no file can be there.
    """
    out: Path | None = given.out
    if out is None:
        return None
    if out.exists() and out.is_dir() != folder:
        there, needed = ("file", "folder") if folder else ("folder", "file")
        raise UserError(f"--out {out}: it is a {there}; a {needed} is needed")
    if out.exists() and not given.force and not (folder and not any(out.iterdir())):
        raise UserError(f"--out {out}: it exists already; --force writes over it")
    return out


def guarded(work: Callable[[], Any]) -> int:
    """The exit code of `work`, with what went wrong said in one message."""
    try:
        work()
    except (UserError, Fault) as error:
        return say(error, error.exit_code)
    except Preempted as end:
        return end.exit_code
    except OSError as error:
        return say(error, 4)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error))):
            raise
        asked = re.search(r"allocate [\d.]+ \w+", str(error))
        what = f"could not {asked[0]}" if asked else str(error) or "nothing is left"
        return say(UserError(f"memory: what is asked does not fit ({what}); smaller sizes may"), 2)
    return 0


def warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """One line a warning: where in the code it was raised is not what a user needs."""
    print(f"rlamort: warning: {message}", file=sys.stderr)


def say(error: Exception, code: int) -> int:
    if os.environ.get("RLAMORT_TRACEBACK"):
        traceback.print_exception(error)
    print(f"rlamort: {error}", file=sys.stderr)
    return code
