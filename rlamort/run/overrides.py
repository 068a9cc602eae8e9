"""Overrides key=value: parsed by Hydra's grammar if they are valid there, else as text."""

import math
import re
from collections.abc import Collection
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from rlamort.config import KIND, element_of, takes_text
from rlamort.errors import UserError

INTERPOLATION = re.compile(r"\$\{([^${}:]*)(:?)")


def values(arguments: Collection[str], kinds: dict[str, Any]) -> dict[str, Any]:
    """Overrides as Python values; dotted keys are nested, and `a,b` is a list.

    Args:
        arguments: key=value, as typed.
        kinds: types of known fields.

    Raises:
        UserError: an argument is not key=value.
    """
    tree: dict[str, Any] = {}
    for argument in arguments:
        key, text = split(argument)
        *parents, last = key.split(".")
        place = tree
        for parent in parents:
            inner = place.setdefault(parent, {})
            if isinstance(inner, str):  # the name of a part, beside keys of it
                inner = place[parent] = {KIND: inner}
            if not isinstance(inner, dict):
                raise UserError(f"{argument}: {parent} is given as a value, too")
            place = inner
        value, beside = read(text, kinds.get(key, Any)), place.get(last)
        place[last] = {KIND: value, **beside} if isinstance(value, str) and isinstance(beside, dict) else value
    return tree


def kinds(fields: dict[str, Any], key: str, default: str) -> list[str]:
    """The names of models or losses, removed from the fields; their keys stay there."""
    value = fields.pop(key, default)
    if isinstance(value, dict):
        kinds = value.pop(KIND, default)
        fields[key] = value
        value = kinds
    return names(value) if value else []


def names(value: Any) -> list[str]:
    """A list written as `a,b`, `[a,b]` or one value."""
    return [str(one) for one in value] if isinstance(value, list) else str(value).split(",")


def split(argument: str) -> tuple[str, str]:
    """Key and text of key=value. Raises UserError otherwise."""
    key, equals, text = argument.partition("=")
    if not (key and equals):
        raise UserError(f"{argument}: key=value is needed")
    return key, text


def read(text: str, kind: Any) -> Any:
    """The value of a text for a field of type `kind`; a list for several values."""
    parsed = _parsed(text)
    if parsed is None:
        return text if element_of(kind) is None else _items(text)
    if parsed.is_sweep_override():
        return text if takes_text(kind) else _several(parsed, text)
    value = parsed.value()
    if takes_text(kind):
        return value if isinstance(value, str | None) else text  # a folder may be called 2024 or true
    if element_of(kind) is str and isinstance(value, list) and not all(isinstance(one, str) for one in value):
        return _items(text)  # and so may a label
    return text if isinstance(value, float) and not math.isfinite(value) else value  # 1e400 is shown as it was typed


def spelled(argument: str, kind: Any, multirun: bool, known: Collection[str]) -> str:
    """key=value in Hydra's grammar: unchanged if it is valid there, else quoted.

    Args:
        argument: key=value, as typed.
        kind: the field's type.
        multirun: whether `a,b` is a run for each.
        known: keys that an interpolation `${key}` may name; otherwise it is text.

    Raises:
        UserError: several values without `multirun`, or ambiguous text with it.
    """
    key, text = split(argument)
    parsed = _parsed(text)
    several = parsed is not None and parsed.is_sweep_override()
    if several and multirun:
        return argument
    if several and not takes_text(kind):
        listed = "" if element_of(kind) is None else f"; a list is {key}=[{text}]"
        raise UserError(f"{argument}: several values are a run each, which needs -m{listed}")
    if parsed is None and multirun and "," in text and not text.startswith("["):
        raise UserError(f"{argument}: with -m a comma separates values; in quotes it is text: \"{key}='...'\"")
    value = _literal(read(text, kind), known)
    return argument if parsed is not None and not several and value == parsed.value() else f"{key}={_spell(value)}"


def swept(override: str) -> bool:
    """Whether an override in Hydra's grammar gives several values."""
    return bool(OverridesParser.create().parse_override(override).is_sweep_override())


def each(override: str) -> list[str]:
    """The overrides that one in Hydra's grammar is of several runs; it alone if it gives one value, none of an interval."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return [override]
    if not parsed.is_discrete_sweep():
        return []  # only a search chooses from it
    return [f"{split(override)[0]}={text}" for text in parsed.sweep_string_iterator()]


def resolved_late(override: str) -> bool:
    """Whether one in Hydra's grammar asks a resolver, which answers when the run is composed."""
    return any(colon for _, colon in INTERPOLATION.findall(override))


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(f"key={text}")
    except (HydraException, ValueError, RecursionError):  # a ValueError is a number of too many digits
        return None


def _several(parsed: Override, text: str) -> Any:
    try:
        return [one.text if isinstance(one, QuotedString) else one for one in parsed.sweep_iterator()]
    except HydraException:  # such as interval(0, 1), which only a sweeper of Hydra's understands
        return text


def _items(text: str) -> Any:
    """A YAML list of texts, such as [jürgen, it's, 2024], that Hydra does not parse; else the text."""
    try:
        found = yaml.compose(text)  # nothing is made of it but text
    except yaml.YAMLError:
        return text
    if not (isinstance(found, yaml.SequenceNode) and all(isinstance(one, yaml.ScalarNode) for one in found.value)):
        return text
    return [one.value for one in found.value]


def _literal(value: Any, known: Collection[str]) -> Any:
    """The value with interpolations of unknown names escaped for OmegaConf."""
    if isinstance(value, list):
        return [_literal(one, known) for one in value]
    if isinstance(value, dict):
        return {key: _literal(one, known) for key, one in value.items()}
    if isinstance(value, str) and not _resolvable(value, known):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _resolvable(text: str, known: Collection[str]) -> bool:
    setup_globals()  # Hydra's own resolvers
    try:
        OmegaConf.create([text])
    except GrammarParseError:
        return False
    named = [(name.strip(), colon) for name, colon in INTERPOLATION.findall(text)]
    return all(OmegaConf.has_resolver(name) if colon else re.split(r"[.\[]", name)[0] in known for name, colon in named)


def _spell(value: Any) -> str:
    if isinstance(value, str):
        return str(QuotedString(value, Quote.single).with_quotes())
    if isinstance(value, list):
        return f"[{','.join(_spell(one) for one in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_spell(one)}' for key, one in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
