"""Methods as rows: one YAML file each, which names an agent, a source and a loop, and the fields that those take."""

import importlib
import importlib.resources
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from rlamort.config.fields import FIXED, Field, Mark, convert, describe, fields_of, part_of
from rlamort.config.parts import KIND, Part
from rlamort.config.run import Run
from rlamort.errors import UserError, nearest


class Config(NamedTuple):
    """A method with a value for every field."""

    method: str
    row: dict[str, Any]
    run: Run
    values: dict[str, Any]  # every field, run's and method's, in the order of `fields`; parts as objects

    @property
    def of_environment(self) -> bool:
        """Whether one of its parts is made of more than the sizes and bounds of its environment."""
        return any(isinstance(value, Part) and value.of_environment for value in self.values.values())

    def keywords(self, target: Callable[..., Any]) -> dict[str, Any]:
        """The values that are keywords of `target`."""
        return {name: self.values[name] for name in fields_of(target)}

    def plain(self) -> dict[str, Any]:
        """The values as they are stored in files, with parts as nested mappings."""
        return {name: value.tree() if isinstance(value, Part) else value for name, value in self.values.items()}

    def leaves(self) -> dict[str, Any]:
        """Every value by name, the fields of parts by dotted names."""
        found: dict[str, Any] = {}
        for name, value in self.values.items():
            found.update(value.leaves(name) if isinstance(value, Part) else {name: value})
        return found


# former dotted paths, which users' rows may still have
MOVED = {
    "rlamort.envs.make.open_env": "rlamort.env.make.open_env",
    "rlamort.envs.one_step.open_problem": "rlamort.env.one_step.open_problem",
    "rlamort.agents.code.Code": "rlamort.agents.amortize.Amortize",
    "rlamort.agents.sb3.Own": "rlamort.agents.sb3.SB3Source",
}
# keywords of an opener of environments that the run itself passes; the others are fields
OPENING = {
    "count", "env_kwargs", "vectorization", "workers", "max_episode_steps", "max_faults", "timeout", "reset_options", "device",
}  # fmt: skip
TARGETS = ("opens", "source", "agent", "train")  # opens the environment; provides batches; learns; loops
# A row also has its tuple; the row whose claims it shares; fields that it does not support; short names of keys of its parts.
ROW_KEYS = ("about", "like", "f", "Y", "p(x)", "model", "loss", "claims", "unsupported", "short", *TARGETS)


def locate(path: str) -> Any:
    """The object at a dotted path. Raises UserError if there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        moved = f"; it is {MOVED[path]} now" if path in MOVED else ""
        raise UserError(f"{path}: it is named by a method, and cannot be imported: {error}{moved}") from error


def short_name(method: str) -> str:
    """A method's name in file names and legends: the row's, or that of the user's file."""
    return Path(method).stem if method.endswith((".yaml", ".yml")) else method


def methods() -> list[str]:
    """The names of all rows."""
    root = importlib.resources.files("rlamort.configs") / "method"
    with importlib.resources.as_file(root) as folder:
        return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def read_row(method: str) -> dict[str, Any]:
    """The YAML of a method: a name in configs/method, or the path of a user's file."""
    if method.endswith((".yaml", ".yml")):
        path = Path(method)
        if not path.is_file():
            raise UserError(f"method {method}: there is no such file")
        if str(path.resolve().parent) not in sys.path:
            sys.path.insert(0, str(path.resolve().parent))  # its agent may be a module beside it
        text = path.read_text()
    elif method in methods():
        text = (importlib.resources.files("rlamort.configs") / "method" / f"{method}.yaml").read_text()
    else:
        raise UserError(f"method {method!r} is unknown. {nearest(method, methods())}")
    row = yaml.safe_load(text) or {}
    if isinstance(row, dict) and "like" in row:
        row = _merged(read_row(str(row["like"])), row)
    missing = [key for key in TARGETS if key not in row]
    if missing:
        raise UserError(f"method {method}: its file lacks {', '.join(missing)}")
    return dict(row)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings of parts are merged key by key, unless `over` has a `kind`."""
    merged = {**base, **over}
    for key, value in over.items():
        before = base.get(key)
        if isinstance(value, dict) and KIND not in value and before is not None and key not in ("env_kwargs", "reset_options"):
            merged[key] = _merged(before if isinstance(before, dict) else {KIND: before}, value)
    return merged


def as_call(value: Any) -> str:
    """A part of a row as a call: its kind, with nested parts as arguments."""
    if not isinstance(value, dict):
        return str(value)
    calls = (as_call(one) for key, one in value.items() if key != KIND and isinstance(one, str | dict))
    inner = [call for call in calls if call]  # a mapping of numbers alone has no name
    return f"{value.get(KIND, '')}({', '.join(inner)})" if inner else str(value.get(KIND, ""))


def config_of(run: Path) -> dict[str, Any]:
    """The resolved configuration of a run directory.

    Raises:
        UserError: it is not a run directory.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: it is not a run directory; one that `rlamort train` made, with a config.yaml, is needed")
    try:
        return dict(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{file}: it cannot be read: {' '.join(str(error).split())}") from error


def fields(row: dict[str, Any]) -> dict[str, Field]:
    """Every field of a method, the run's first; a name that two constructors share is one field.

    A source's `meaning` replaces the help of the fields that it lists.
    """
    source = locate(row["source"])
    gathered: dict[str, Field] = {}
    opened = {name: field for name, field in fields_of(locate(row["opens"])).items() if name not in OPENING}
    for owned in (fields_of(Run), fields_of(locate(row["agent"])), fields_of(source), opened):
        for name, field in owned.items():
            first = gathered.setdefault(name, field)
            if (first.type, first.default) != (field.type, field.default):
                raise UserError(
                    f"{name}: {first.owner} declares {describe(first.type)}, {first.default!r} by default, and {field.owner} "
                    f"{describe(field.type)}, {field.default!r}; two owners of one name must agree"
                )
    meaning: dict[str, str] = getattr(source, "meaning", {})
    return {name: field._replace(help=meaning.get(name, field.help)) for name, field in gathered.items()}


def opening(config: Config) -> dict[str, Any]:
    """The fields of the opener of environments, by name."""
    return {name: config.values[name] for name in fields_of(locate(config.row["opens"])) if name not in OPENING}


def unsupported(row: dict[str, Any]) -> list[str]:
    """The fields that keep their defaults: those that the row lists, and those that have no effect with its source."""
    return [*row.get("unsupported", ()), *getattr(locate(row["source"]), "unsupported", ())]


def defaults(row: dict[str, Any]) -> dict[str, Any]:
    """The default of each field: the row's, or the signature's."""
    known = fields(row)
    values = nested({key: value for key, value in row.items() if key not in ROW_KEYS or key in known})
    check_names(values, known)
    return {
        name: (
            field.default
            if name not in values
            else values[name]
            if part_of(field.type) is None
            else convert(name, values[name], field.type, field.default)
        )
        for name, field in known.items()
    }


def check_names(names: Iterable[str], known: Iterable[str], renamed: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raises UserError for the first unknown key; `renamed` maps former names to present ones."""
    known = list(known)
    for name in names:
        if name not in known:
            hint = f"It is {renamed[name]} now" if name in renamed else nearest(name, known)
            raise UserError(f"{name}: there is no such key. {hint}")


def renamed(row: dict[str, Any]) -> Mapping[str, str]:
    """The present names of a method's former keys."""
    names: Mapping[str, str] = getattr(locate(row["agent"]), "renamed", {})
    return names


def short(row: dict[str, Any]) -> Mapping[str, str]:
    """The short names of keys of a method's parts, such as planner for model.update."""
    names: Mapping[str, str] = row.get("short", {})
    return names


def full(key: str, names: Mapping[str, str]) -> str:
    """A dotted key, or key=value, in full, where it begins with one of the short `names`."""
    return re.sub(r"^\w+", lambda first: names.get(first[0], first[0]), key)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings; the name of a part with further keys becomes its `kind`."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        place = found
        for parent in parents:
            inner = place.get(parent, {})
            if isinstance(inner, Part):
                inner = inner.tree()
            place[parent] = place = dict(inner) if isinstance(inner, Mapping) else {KIND: inner}
        beside = place.get(last)
        if isinstance(beside, dict) and isinstance(value, str | Part):
            value = {KIND: value, **beside}
        place[last] = value
    return found


def resolve(method: str, overrides: dict[str, Any], base: dict[str, Any] | None = None) -> Config:
    """A method with overrides on the row's values on the signatures' defaults; every value is checked.

    Args:
        method: a row's name, or the path of a user's file.
        overrides: by key; keys of parts are dotted or nested.
        base: the values that are overridden; None takes the defaults.

    Raises:
        UserError: an unknown key, or a value of the wrong type or out of range, with its name, value and what is allowed.
    """
    row = read_row(method)
    known, names = fields(row), short(row)
    overrides = nested({full(name, names): value for name, value in overrides.items()})
    check_names(overrides, known, renamed(row))
    usual = defaults(row)
    chosen = usual if base is None else base
    values = {name: convert(name, value, known[name].type, chosen[name]) for name, value in {**chosen, **overrides}.items()}
    for name in unsupported(row):
        if values[name] != usual[name]:
            raise UserError(f"{name}={values[name]}: {method} has no choice there; only {usual[name]} is allowed")
    run = Run(**{name: values[name] for name in fields_of(Run)})
    return Config(method, row, run, values)


def marks(config: Config) -> dict[str, Mark | None]:
    """The mark of every value, by the names of `Config.leaves`; a part's kind is fixed."""
    found: dict[str, Mark | None] = {}
    for name, field in fields(config.row).items():
        found |= _marks(name, field, config.values[name])
    return found


def _marks(name: str, field: Field, value: Any) -> dict[str, Mark | None]:
    if not isinstance(value, Part):
        return {name: field.mark}
    found: dict[str, Mark | None] = {name: FIXED}
    for key, inner in fields_of(type(value)).items():
        found |= _marks(f"{name}.{key}", inner, getattr(value, key))
    return found
