"""Agents as a row makes them, without an environment to train in."""

from rlamort.config import locate, resolve


def drawn(method, spec, **fields):
    """The agent of a method for a spec; keys of parts have dots, or are nested."""
    config = resolve(method, fields)
    kind = locate(config.row["agent"])
    return kind(spec, **config.keywords(kind))
