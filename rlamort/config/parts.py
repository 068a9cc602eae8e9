"""Parts: constructors that a field chooses by name, each with fields of its own, nested.

A part is a frozen dataclass: its fields are read from signature and docstring like those of an agent, and calling it builds
the object that it describes. The value of such a field is a part, the name of a preset or class, or a mapping of fields whose
`kind` is such a name; without a `kind` the mapping changes the field's default.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from rlamort.config.imports import class_at, divided
from rlamort.errors import UserError, nearest

KIND = "kind"


@dataclass(frozen=True)
class Part:
    """The base of all parts. A base that a field may be typed with sets `presets`.

    Attributes:
        presets: parts by name.
    """

    presets: ClassVar[dict[str, Any]] = {}

    @property
    def of_environment(self) -> bool:
        """Whether it is made of more than the sizes and bounds of its environment, as known equations are."""
        inner = (getattr(self, field.name) for field in dataclasses.fields(self))
        return any(isinstance(part, Part) and part.of_environment for part in inner)

    @classmethod
    def names(cls) -> list[str]:
        """The names that may be chosen: of presets, and of classes."""
        return [*cls.presets, *(one.__name__ for one in cls.kinds() if one.__name__ not in cls.presets)]

    @classmethod
    def kinds(cls) -> list[type[Self]]:
        """The classes that may be chosen: those derived from it, or itself if there are none."""
        derived = cls.__subclasses__()
        return derived or [cls]

    @classmethod
    def named(cls, name: str, key: str) -> Self:
        """The part with a name: a preset, a class of rlamort, or one of the user's, `module:Class` or `module.Class`.

        Raises:
            UserError: there is none; `key` is the field.
        """
        if name in cls.presets:
            return cls.presets[name]  # type: ignore[no-any-return]
        found: Any = next((one for one in cls.kinds() if one.__name__ == name), None)
        if found is None and divided(name)[0]:
            found = class_at(name, key, (cls,), f"rlamort.parts.{cls.__name__}")
        if found is None:
            allowed = cls.names() if name[:1].isupper() or not cls.presets else list(cls.presets)
            raise UserError(f"{key}={name}: there is none of that name; your own is module:Class. {nearest(name, allowed)}")
        return found()  # type: ignore[no-any-return]

    def label(self) -> str:
        """Its shortest name: that of an equal preset, else of its class."""
        return next((name for name, one in self.presets.items() if one == self), type(self).__name__)

    def tree(self) -> dict[str, Any]:
        """This part as nested plain values, from which a field rebuilds it."""
        home = type(self).__module__
        name = type(self).__name__ if home.startswith("rlamort.") else f"{home}.{type(self).__name__}"
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {KIND: name, **{key: plain(value) for key, value in values.items()}}

    def leaves(self, key: str) -> Iterator[tuple[str, Any]]:
        """Every field, recursively, by dotted name; the class of a part by its key."""
        yield key, type(self).__name__
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), f"{key}.{field.name}"
            if isinstance(value, Part):
                yield from value.leaves(name)
            else:
                yield name, value


def plain(value: Any) -> Any:
    """Parts as trees, tuples as lists, other values unchanged."""
    if isinstance(value, Part):
        return value.tree()
    return list(value) if isinstance(value, tuple) else value


def split(value: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The `kind` of a mapping, None without one, and its other keys."""
    rest = dict(value)
    return rest.pop(KIND, None), rest
