"""Serialisation of the state of Python objects to plain values and arrays, and restoring it in objects of the same classes.

The traversal follows containers, attributes, objects and nested environments, to numbers, arrays, random
generators and MuJoCo's data; and shared state: class attributes, module globals that methods use, and their
closures. Classes, functions and modules are constants, stored by name. Anything else is reported as unreadable.

A tree consists of None, bools, numbers, text, arrays, tensors, lists of trees, and dicts of trees, so that a checkpoint can
hold it. An object with several references is written once.
"""

import contextlib
import enum
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import gymnasium
import numpy as np
import torch

from rlamort.env import Env
from rlamort.env.objects import (
    CONTAINERS,
    GENERATORS,
    HEAP_TYPE,
    LIBRARIES,
    PLAIN,
    attributes,
    constant,
    global_names,
    is_filled,
    name_of,
    value_in,
)
from rlamort.env.physics import model_arrays, read_data, write_data, write_model

Tree = Any
IN_PLACE = ("array", "tensor", "list", "set", "dict", "class")  # what a `Writer` changes


class Unlike(Exception):  # noqa: N818  # it says what the object is
    """An object has another structure than the one whose state was read."""


class Reader:
    """Reads the state of objects that may refer to each other.

    Args:
        layers: objects that are read one by one; references to them are not followed.

    Attributes:
        lost: descriptions of what could not be read.
        classes: the user's classes that were found, by name.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.lost: dict[str, None] = {}
        self.classes: dict[str, type] = {}
        self.functions: dict[str, types.FunctionType] = {}  # of the user's, by name
        self._alive = list(layers)  # an id names an object only as long as it lives
        self._seen = {id(layer): i for i, layer in enumerate(layers)}

    def objects(self) -> list[Any]:
        """The layers, and all objects found in them so far."""
        return list(self._alive)

    def layer(self, value: Any) -> Tree:
        """The class and the attributes of one of the layers."""
        return self._attributes(value, type(value).__qualname__)

    def shared(self) -> Tree:
        """State of the classes and functions found so far, which is shared in this process."""
        trees: dict[str, Tree] = {}
        while fresh := {place: (holder, name) for place, holder, name in self.places() if place not in trees}:
            for place, (holder, name) in fresh.items():  # what is found may lead to further classes
                trees[place] = self.read(value_in(holder, name), place)
        return trees

    def places(self) -> Iterator[tuple[str, Any, str]]:
        """The data in the user's classes, modules, functions and closures: a name, the holder, the key in it."""
        for path, kind in list(self.classes.items()):
            for name, value in list(vars(kind).items()):
                if not (name.startswith("__") or name == "_abc_impl" or hasattr(type(value), "__get__") or constant(value)):
                    yield f"class {path}.{name}", kind, name
        for path, function in list(self.functions.items()):
            for name in global_names(function.__code__):
                used = function.__globals__.get(name)
                if name in function.__globals__ and not name.startswith("__") and not constant(used):
                    yield f"global {function.__module__}.{name}", function.__globals__, name
            for name, value in vars(function).items():
                if not name.startswith("__") and not constant(value):
                    yield f"function {path}.{name}", function, name
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                if name != "__class__" and is_filled(cell) and not constant(cell.cell_contents):
                    yield f"closure {path}.{name}", cell, "cell_contents"

    def read(self, value: Any, where: str) -> Tree:
        """The tree of `value`; `where` is its path."""
        if type(value) in PLAIN:
            return value
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return {"scalar": np.array(value)}
        if constant(value):
            self._use(value)
            return {"constant": name_of(value)}
        if id(value) in self._seen:
            return {"again": self._seen[id(value)]}
        self._seen[id(value)] = number = len(self._alive)
        self._alive.append(value)
        return {"object": number, **self._content(value, where)}

    def _content(self, value: Any, where: str) -> dict[str, Tree]:
        if isinstance(value, np.ndarray) and type(value) is np.ndarray:
            return self._array(value, where)
        for name, kind in CONTAINERS.items():
            if isinstance(value, kind):
                items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
                return {name: [self.read(one, f"{where}[{i}]") for i, one in enumerate(items)]} | self._extra(value, where)
        if isinstance(value, dict):
            pairs = [[self.read(key, where), self.read(one, f"{where}[{key!r}]")] for key, one in list(value.items())]
            return {"dict": pairs} | self._extra(value, where)
        if isinstance(value, gymnasium.Space):
            inside = getattr(value, "spaces", ())
            parts = list(inside.values()) if isinstance(inside, dict) else list(inside)
            return {"space": [self.read(one, where) for one in (value._np_random, *parts)]}
        if isinstance(value, torch.Tensor):
            return {"tensor": value.detach().cpu().clone()}
        if isinstance(value, np.random.Generator):
            return {"generator": self.read(value.bit_generator.state, where)}
        if isinstance(value, np.random.RandomState):
            return {"random state": self.read(value.get_state(legacy=False), where)}
        if isinstance(value, random.Random):
            return {"random": self.read(value.getstate(), where)}
        if isinstance(value, torch.Generator):
            return {"torch generator": value.get_state()}
        if isinstance(value, types.MethodType):
            self._use(value.__func__)  # of its class or not, as one that a user puts in its place
            return {"method": value.__name__, "function": name_of(value.__func__), "self": self.read(value.__self__, where)}
        if type(value).__name__ == "MjData" and "mujoco" in sys.modules:
            return {"mujoco data": read_data(value)}
        if type(value).__name__ == "MjModel" and "mujoco" in sys.modules:
            return {"mujoco model": {name: array.copy() for name, array in model_arrays(value)}}
        if isinstance(value, Env):
            return {"native": self.read(value.state(), where) if hasattr(value, "x") else None}  # else it was never reset
        return self._attributes(value, where)

    def _array(self, value: np.ndarray, where: str) -> dict[str, Tree]:
        if value.dtype == object:
            return {"objects": [self.read(one, where) for one in value.ravel()], "shape": list(value.shape)}
        if value.dtype.kind in "biuf" and value.dtype.isnative and value.dtype.itemsize <= 8:
            return {"array": value.copy()}
        return self._give_up(value, where)

    def _extra(self, value: Any, where: str) -> dict[str, Tree]:
        """The attributes of a container of a user's class."""
        return self._attributes(value, where) if hasattr(value, "__dict__") else {}

    def _attributes(self, value: Any, where: str) -> dict[str, Tree]:
        c_types = [kind for kind in type(value).__mro__ if not kind.__flags__ & HEAP_TYPE and kind is not object]
        own = attributes(value)
        if (c_types and not isinstance(value, (*CONTAINERS.values(), dict))) or type(value).__mro__ == (object,):
            return self._give_up(value, where)
        for kind in type(value).__mro__:
            self._use(kind)
        return {"class": name_of(type(value)), "attributes": {k: self.read(v, f"{where}.{k}") for k, v in own.items()}}

    def _give_up(self, value: Any, where: str) -> dict[str, Tree]:
        self.lost[f"{where} holds a {type(value).__qualname__}, whose state cannot be read"] = None
        return {"lost": type(value).__qualname__}

    def _use(self, value: Any) -> None:
        """Follow a class or function of the user's to the code that it uses."""
        if not isinstance(value, type | types.FunctionType) or (value.__module__ or "").partition(".")[0] in LIBRARIES:
            return
        known: dict[str, Any] = self.classes if isinstance(value, type) else self.functions
        if name_of(value) in known:
            if known[name_of(value)] is not value and getattr(value, "__closure__", None):
                self.lost[f"several functions are called {name_of(value)}, and close over data"] = None
            return
        known[name_of(value)] = value
        if isinstance(value, type):
            for member in vars(value).values():
                for part in (member, getattr(member, "__func__", None), getattr(member, "fget", None)):
                    self._use(part)
        else:
            for name in global_names(value.__code__):
                self._use(value.__globals__.get(name))
            for cell in value.__closure__ or ():
                self._use(cell.cell_contents if is_filled(cell) else None)


class Writer:
    """Restores a state in objects of the same classes, in place, so that other references to them stay valid.

    Args:
        layers: those of `Reader`, of the objects that are written to.
        instead: what stands for each of the layers that were read; the same ones by default.

    Raises:
        Unlike: an object has another structure, or something in the tree cannot be constructed.
    """

    def __init__(self, layers: Sequence[Any], instead: Sequence[Any] | None = None) -> None:
        self.reader = Reader(layers)  # knows the classes that may be made
        for layer in layers:
            self.reader.layer(layer)
        self._objects: dict[int, Any] = dict(enumerate(layers if instead is None else instead))
        self._filled: dict[int, Any] = {}  # by id, what was changed in place
        ours = {one.__module__ for one in (*self.reader.classes.values(), *self.reader.functions.values())}
        self._module = "" if "__main__" in ours or not layers else type(layers[-1]).__module__

    def _here(self, name: str) -> str:
        """The present name: a script's classes may have moved to a module."""
        return name.replace("__main__", self._module) if self._module else name

    def layer(self, tree: Tree, live: Any) -> None:
        """Restore a tree of `Reader.layer`."""
        if self._here(tree["class"]) != name_of(type(live)):
            raise Unlike(f"a {name_of(type(live))} stands where there was a {tree['class']}")
        self._set_attributes(tree["attributes"], live)

    def shared(self, trees: Tree) -> None:
        """Restore a tree of `Reader.shared`."""
        self.reader.shared()
        places = {place: (holder, name) for place, holder, name in self.reader.places()}
        for place, tree in trees.items():
            if self._here(place) not in places:
                raise Unlike(f"there is no {place}")
            self.put_at(*places[self._here(place)], tree)

    def put_at(self, holder: Any, name: str, tree: Tree) -> None:
        """Restore the value of one of `Reader.places`."""
        live = value_in(holder, name)
        value = self.put(tree, live)
        if value is not live and isinstance(holder, dict):
            holder[name] = value
        elif value is not live:
            setattr(holder, name, value)

    def what_fits(self, tree: Tree, live: Any) -> None:
        """Restore those attributes of a layer that match."""
        now = attributes(live)
        for name, one in tree["attributes"].items():
            with contextlib.suppress(Unlike, KeyError):
                if (value := self.put(one, now.get(name))) is not now.get(name):
                    object.__setattr__(live, name, value)

    def put(self, tree: Tree, live: Any) -> Any:
        """The value of `tree`: `live`, changed in place, where possible."""
        if type(tree) in PLAIN:
            return tree
        if "scalar" in tree:
            return tree["scalar"][()]
        if "constant" in tree:
            name = self._here(tree["constant"])
            return live if constant(live) and name_of(live) == name else self._named(name)
        if "again" in tree:
            return self._objects[tree["again"]]
        if "lost" in tree:
            raise Unlike(f"the state of a {tree['lost']} was not read")
        number, kind = tree["object"], next(key for key in tree if key != "object")
        if kind in IN_PLACE and live is not None:  # two that are one object there are not to overwrite each other
            live = None if id(live) in self._filled else self._filled.setdefault(id(live), live)
        if kind in CONTAINERS:
            return self._container(number, kind, tree, live)
        if kind in ("dict", "class"):
            value = self._like(tree, live)
            self._objects[number] = value
            if kind == "dict":
                before = dict(value)
                value.clear()
                for key, one in tree["dict"]:
                    key = self.put(key, None)
                    value[key] = self.put(one, before.get(key))
            if "attributes" in tree:
                self._set_attributes(tree["attributes"], value)
            return value
        self._objects[number] = value = self._leaf(kind, tree, live)
        return value

    def _container(self, number: int, kind: str, tree: Tree, live: Any) -> Any:
        present = list(live) if isinstance(live, CONTAINERS[kind]) else []
        olds = [*present, *[None] * len(tree[kind])]
        if kind in ("tuple", "frozenset"):
            items = [self.put(one, old) for one, old in zip(tree[kind], olds, strict=False)]
            value = type(live)(*items) if isinstance(live, tuple) and hasattr(live, "_fields") else CONTAINERS[kind](items)
            self._objects[number] = value
            return value
        own = self._like(tree, live) if "class" in tree else live
        filled = cast(Any, own if isinstance(own, CONTAINERS[kind]) else CONTAINERS[kind]())
        self._objects[number] = filled
        items = [self.put(one, old) for one, old in zip(tree[kind], olds, strict=False)]
        filled.clear()
        (filled.update if kind == "set" else filled.extend)(items)
        if "attributes" in tree:
            self._set_attributes(tree["attributes"], filled)
        return filled

    def _like(self, tree: Tree, live: Any) -> Any:
        """`live` if it has the tree's class, else an empty object of that class."""
        if "class" not in tree:
            return live if isinstance(live, dict) else {}
        name = self._here(tree["class"])
        if live is not None and name_of(type(live)) == name:
            return live
        kind = self._named(name)
        if not isinstance(kind, type):
            raise Unlike(f"{name} is no class")
        return cast(Any, kind).__new__(kind)

    def _named(self, name: str) -> Any:
        """A user's class, function or enumeration member, from a module that the live objects already use."""
        path, _, value = name.partition(" ")
        module, _, attribute = path.partition(":")
        if module in {kind.__module__ for kind in self.reader.classes.values()}:
            found: Any = sys.modules.get(module)
            for part in attribute.split("."):
                found = vars(found).get(part) if found is not None else None
            if isinstance(found, type) and issubclass(found, enum.Enum) and value:
                found = next((member for member in found if repr(member) == value), None)
            if constant(found) and name_of(found) == name:
                return found
        raise Unlike(f"{name} stood there, and cannot be made again")

    def _set_attributes(self, trees: dict[str, Tree], live: Any) -> None:
        now = attributes(live)
        for name in set(now) - set(trees):
            object.__delattr__(live, name)
        for name, tree in trees.items():
            old = now.get(name)
            value = self.put(tree, old)
            if value is not old or name not in now:
                object.__setattr__(live, name, value)

    def _leaf(self, kind: str, tree: Tree, live: Any) -> Any:
        content = tree[kind]
        if kind in ("array", "tensor"):
            same = isinstance(live, type(content)) and live.shape == content.shape and live.dtype == content.dtype
            if same and (kind == "tensor" or live.flags.writeable):
                with torch.no_grad():
                    live[...] = content  # it may be a view of what something else holds too
                return live
            return content.copy() if kind == "array" else content.clone()
        if kind == "objects":
            array = np.empty(len(content), dtype=object)
            array[:] = [self.put(one, None) for one in content]
            return array.reshape(tree["shape"])
        if kind == "generator":
            state = self.put(content, None)
            if not isinstance(live, np.random.Generator) or type(live.bit_generator).__name__ != state["bit_generator"]:
                if state["bit_generator"] not in GENERATORS:
                    raise Unlike(f"{state['bit_generator']}: no generator of NumPy's")
                live = np.random.Generator(getattr(np.random, state["bit_generator"])())  # made when it is first asked for
            live.bit_generator.state = state
            return live
        restored: dict[str, Callable[[], Any]] = {
            "space": lambda: self._space(content, live),
            "random state": lambda: live.set_state(self.put(content, None)),
            "random": lambda: live.setstate(self.put(content, None)),
            "torch generator": lambda: live.set_state(content),
            "mujoco data": lambda: write_data(live, content),
            "mujoco model": lambda: write_model(live, content),
            "native": lambda: _restore_native(live, self.put(content, None)),
        }
        if kind == "method":
            owner = self.put(tree["self"], live.__self__ if isinstance(live, types.MethodType) else None)
            found = [vars(k)[content] for k in type(owner).__mro__ if content in vars(k)][:1]
            found += [live.__func__] if isinstance(live, types.MethodType) else []
            name = self._here(tree["function"]) if "function" in tree else None  # an older rlamort saved none
            function = next((one for one in found if name in (None, name_of(one))), None)
            if not isinstance(function, types.FunctionType):
                raise Unlike(f"{content} is no method of a {type(owner).__qualname__}")
            return live if live == types.MethodType(function, owner) else types.MethodType(function, owner)
        try:
            restored[kind]()
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise Unlike(f"a {kind} was read, and a {type(live).__qualname__} stands there: {error}") from error
        return live

    def _space(self, content: list[Tree], live: gymnasium.Space[Any]) -> None:
        inside = getattr(live, "spaces", ())
        live._np_random = self.put(content[0], live._np_random)
        for tree, part in zip(content[1:], inside.values() if isinstance(inside, dict) else inside, strict=True):
            self.put(tree, part)


def _restore_native(live: Env, state: dict[str, Any] | None) -> None:
    if state is not None and not live.restore(state):
        raise ValueError("it cannot go on there")
