"""The text of `rlamort train --help`: a method's keys, with meanings and defaults."""

import itertools
from collections.abc import Iterable
from typing import Any

from rlamort.config import Field, Part, Run, defaults, describe, fields, fields_of, methods, short, unsupported

AFTER_KEYS = """
-m key=a,b,c runs each value and plots all runs; hydra/launcher=... selects a launcher. hydra/sweeper=optuna looks for the
highest mean return in the last evaluation, or the lowest mean cost, in hydra.sweeper.n_trials=20 runs; the best is printed
last, and all are in a file beside them. --cfg job prints the configuration."""


def train_help() -> None:
    """`rlamort train --help`."""
    print("rlamort train METHOD env=ENV key=value ...\n\nTrain a method, into a run directory of its own.\n")
    print(f"METHOD is one of {', '.join(methods())},\nwhich `rlamort list` describes, or the YAML file of a method of yours.")
    print("`rlamort train METHOD --help` lists the keys of that method, and their defaults, too.\n")
    known = fields_of(Run)
    _show("keys of every run", known.values(), {name: field.default for name, field in known.items()})
    print(AFTER_KEYS)


def method_help(method: str, row: dict[str, Any]) -> None:
    print(f"rlamort train {method} key=value ...\n\n{row['about']}\n")
    shown = [field for field in fields(row).values() if field.name not in unsupported(row)]
    for owner, group in itertools.groupby(shown, key=lambda field: field.owner):
        _show("keys of every run" if owner == "Run" else f"keys of {owner}", group, defaults(row))
    for name, key in short(row).items():
        print(f"\n{name}=... is short for {key}=...", end="")
    print(AFTER_KEYS)


def _show(title: str, shown: Iterable[Field], chosen: dict[str, Any]) -> None:
    print(f"{title}:")
    for field in shown:
        value = chosen[field.name]
        print(f"  {field.name}={_typed(value)}  ({describe(field.type)})\n      {field.help}")
        if isinstance(value, Part):
            _show_part(field.name, value)


def _show_part(name: str, part: Part) -> None:
    """The keys of a part with its present choices, recursively."""
    for field in fields_of(type(part)).values():
        key, value = f"{name}.{field.name}", getattr(part, field.name)
        print(f"    {key}={_typed(value)}  ({describe(field.type)})\n        {field.help}")
        if isinstance(value, Part):
            _show_part(key, value)


def _typed(value: Any) -> str:
    """A value as it is typed in an override."""
    if isinstance(value, Part):
        return value.label()
    if isinstance(value, tuple | list):
        return f"[{','.join(map(_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
