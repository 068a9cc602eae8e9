"""Errors a user can act on. The command line prints them as one message, without a traceback, and exits with their code."""

import difflib
from collections.abc import Iterable, Sequence

LISTED = 80  # names: all keys of any method, and not all environments


class UserError(ValueError):
    """An invalid request: names the field, its value and what is allowed."""

    exit_code = 2


class Fault(RuntimeError):  # noqa: N818  # as in fault injection
    """An environment or an agent failed at runtime: names it, the step, and the failure."""

    exit_code = 3


class Diverged(Fault):
    """The agent's own numbers are no longer finite."""


class Preempted(Exception):  # noqa: N818  # an end, not an error
    """The run was stopped by a signal, after a checkpoint."""

    exit_code = 75  # EX_TEMPFAIL: what schedulers take as "start it again"


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The hint after an unknown name: close matches among the allowed names, or all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.6)
    if not near:  # HalfCheeta -> HalfCheetah-v5: compare without versions and case as well
        plain = {name.lower().split("-v")[0]: name for name in names}
        near = [plain[n] for n in difflib.get_close_matches(given.lower().split("-v")[0], plain, n=3, cutoff=0.7)]
    if near:
        return "Did you mean " + " or ".join(near) + "?"
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return "Allowed: " + ", ".join(names[:LISTED]) + more + "."


def first_of(names: Sequence[str]) -> str:
    """The first of some names, and how many there are besides."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
