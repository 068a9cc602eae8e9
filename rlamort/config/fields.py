"""Fields: the keywords of a constructor, with types, ranges, defaults and help from its signature and docstring."""

import dataclasses
import fractions
import inspect
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from rlamort.config.parts import KIND, Part, split
from rlamort.errors import UserError, nearest


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, inclusive; `above` and `below` exclude the ends."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'>' if self.above else '>='} {self.low}")
        if self.high < math.inf:
            parts.append(f"{'<' if self.below else '<='} {self.high}")
        return " and ".join(parts)


@dataclass(frozen=True)
class AtMost:
    """An upper limit against overflow, mentioned only if it is exceeded."""

    high: int

    def __contains__(self, value: float) -> bool:
        return value <= self.high

    def __str__(self) -> str:
        return ""


Count = Annotated[int, Range(1), AtMost(2**53)]  # integers that a double represents
Whole = Annotated[int, Range(0), AtMost(2**53)]
Size = Annotated[int, Range(1), AtMost(10**6)]  # of arrays, or of work in one step of the loop
Seed = Annotated[int, Range(0, 2**31 - 1)]  # C's int; with an environment's index added, below numpy.random.seed's 2**32
Ratio = Annotated[float, Range(1e-6), AtMost(10**6)]  # see `rational`
Seconds = Annotated[float, Range(0, above=True), AtMost(10**6)]  # the kernel waits for 2**31 milliseconds at most
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]


def rational(ratio: float) -> fractions.Fraction:
    """The nearest fraction with a denominator of at most a million: 1/10 of 0.1, and 1/3 of 0.3333333333333333."""
    return fractions.Fraction(ratio).limit_denominator(10**6)


@dataclass(frozen=True)
class Mark:
    """Whether a field may change on resume; part of its type where it is declared.

    A field without a mark may change on resume, which affects what is learned from there on, and is reported.
    """

    name: str

    def __contains__(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return ""


FREE = Mark("free")
FIXED = Mark("fixed")
T = TypeVar("T")
Free = Annotated[T, FREE]  # may change on resume: it does not affect what is learned
Fixed = Annotated[T, FIXED]  # may not: it fixes shapes of parameters, or makes another run
Widths = tuple[Size, ...]


class Field(NamedTuple):
    """One key: its type, default, help, and the constructor that declares it."""

    name: str
    type: Any
    default: Any
    help: str
    owner: str

    @property
    def mark(self) -> Mark | None:
        """Its mark for resumes; None without one."""
        return next((one for one in _annotations(self.type) if isinstance(one, Mark)), None)


def fields_of(target: Callable[..., Any]) -> dict[str, Field]:
    """The keyword fields of a class or function, with help from the Args section of its docstring."""
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function, include_extras=True)
    help_of = _arguments(inspect.getdoc(target) or "")
    return {
        p.name: Field(p.name, hints[p.name], p.default, help_of.get(p.name, ""), target.__name__)
        for p in inspect.signature(target).parameters.values()
        if p.default is not inspect.Parameter.empty
    }


def _arguments(doc: str) -> dict[str, str]:
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.S | re.M)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section.group(1), re.S | re.M) if section else []
    return {name: " ".join(text.split()) for name, text in entries}


def describe(kind: Any) -> str:
    """A field's type, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Part):
        return f"{', '.join(kind.presets)}; or a class of rlamort.parts" if kind.presets else "keys of its own"
    if origin is Annotated:
        return " ".join([describe(arguments[0]), *filter(None, map(str, arguments[1:]))])
    if origin is Literal:
        return ", ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments)
    if origin is tuple:
        return f"a list of {describe(arguments[0])}"
    if origin is dict:
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[kind]


def takes_text(kind: Any) -> bool:
    """Whether the type allows any text."""
    kind = bare(kind)
    return kind is str or (typing.get_origin(kind) in (typing.Union, types.UnionType) and str in typing.get_args(kind))


def element_of(kind: Any) -> Any:
    """The type of the items if the type allows lists, else None."""
    kind = bare(kind)
    lists = (one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is tuple)
    return next((typing.get_args(one)[0] for one in lists), None)


def bare(kind: Any) -> Any:
    """The type without ranges and marks."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def part_of(kind: Any) -> type[Part] | None:
    """The base of the parts that a type allows; None if it allows none."""
    kind = bare(kind)
    options = (kind, *typing.get_args(kind))
    return next((one for one in options if isinstance(one, type) and issubclass(one, Part)), None)


def convert(name: str, value: Any, kind: Any, current: Any = None) -> Any:
    """`value` converted to the field's type.

    Args:
        name: of the field.
        value: the new value.
        kind: the field's type.
        current: the present value, which is changed by a mapping without a `kind`.

    Raises:
        UserError: it has another type, or is out of range.
    """
    base = part_of(kind)
    none = value is None or value == {KIND: None}  # as a row or Python say it, and as the command line does
    if base is not None and none and type(None) in typing.get_args(bare(kind)):
        return None
    if base is not None:
        return _part(name, value, base, current)
    try:
        return _convert(value, kind)
    except (TypeError, ValueError, ArithmeticError):
        most = min((one.high for one in _annotations(kind) if isinstance(one, AtMost)), default=math.inf)
        items = value if isinstance(value, list | tuple) else [value]
        limit = f", at most {most}" if any(isinstance(one, int | float) and one > most for one in items) else ""
        element = element_of(kind)
        listed = "" if element is None else _example(value, element)
        example = f", such as {name}=[{listed}]" if listed else ""
        long = isinstance(value, int) and abs(value) >= 10**100  # Python itself refuses to write out some of these
        raise UserError(f"{name}={'1e100 or more' if long else value}: {describe(kind)} is needed{limit}{example}") from None


def _part(name: str, value: Any, base: type[Part], current: Part | None) -> Part:
    if isinstance(value, base):
        return _with(name, value, {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}, base)
    if isinstance(value, str):
        return base.named(value, name)
    if isinstance(value, Mapping):
        kind, rest = split(value)
        start = current if kind is None else _part(name, kind, base, None)
        if start is None:
            raise UserError(f"{name}.{KIND}: it is missing; allowed: {', '.join(base.names())}")
        return _with(name, start, rest, base)
    raise UserError(f"{name}={value}: {', '.join(base.names())}, or a mapping of keys with a `kind` among them, is needed")


def _with(name: str, part: Part, changes: dict[str, Any], base: type[Part]) -> Part:
    """A part with some fields changed, each checked."""
    known = fields_of(type(part))
    for key in changes:
        if key not in known:
            owners = [f"{kind.__name__} has it" for kind in _reachable(base) if key in fields_of(kind)]
            hint = ", ".join(dict.fromkeys(owners)) or nearest(key, list(known))
            raise UserError(f"{name}.{key}: {type(part).__name__} has no such key, only {', '.join(known) or 'none'}. {hint}")
    return dataclasses.replace(
        part,
        **{key: convert(f"{name}.{key}", value, known[key].type, getattr(part, key)) for key, value in changes.items()},
    )


def _reachable(base: type[Part], seen: tuple[type[Part], ...] = ()) -> list[type[Part]]:
    """The kinds of a base, and, recursively, of the bases of their fields."""
    found = [kind for kind in base.kinds() if kind not in seen]
    for kind in list(found):
        for field in fields_of(kind).values():
            inner = part_of(field.type)
            if inner is not None:
                found += [one for one in _reachable(inner, (*seen, *found)) if one not in found]
    return found


def _annotations(kind: Any) -> Iterable[Any]:
    """The annotations of a type and of its arguments."""
    return itertools.chain(getattr(kind, "__metadata__", ()), *map(_annotations, typing.get_args(kind)))


def _example(value: Any, element: Any) -> str:
    """An example of a list of such items: of the value itself, if only the brackets are missing."""
    try:
        _convert(value or None, element)
    except (TypeError, ValueError, ArithmeticError):
        return {int: "256,256", float: "0.1,0.2", str: "a,b"}.get(bare(element), "")
    return str(value)


def _convert(value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = _convert(value, arguments[0])
        if any(value not in constraint for constraint in arguments[1:]):
            raise ValueError
        return value
    if origin in (typing.Union, types.UnionType):
        for one in sorted(arguments, key=lambda a: a is str):  # text takes anything, so it is asked last
            try:
                return _convert(value, one)
            except (TypeError, ValueError, ArithmeticError):
                continue
        raise ValueError
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ValueError
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError
        return tuple(_convert(one, arguments[0]) for one in value)
    if origin is dict:
        return dict(value)
    if kind is type(None):
        if value is not None:
            raise ValueError
        return None
    if isinstance(value, bool) != (kind is bool) or value is None:
        raise ValueError
    if kind is int:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    if kind is float:
        number = float(fractions.Fraction(value) if isinstance(value, str) and "/" in value else value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, kind):
        raise ValueError
    return value
