"""The wrapper of environments that rlamort makes: it saves and restores their state, tests that, and tolerates exceptions."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import PassiveEnvChecker

from rlamort.env.objects import name_of, value_in
from rlamort.env.state import Reader, Tree, Unlike, Writer
from rlamort.errors import UserError

FAULT = "fault"  # the key in info of what went wrong in a step
TRIAL = 1_100  # steps and resets for which a copy is stepped beside the environment: more than most episodes have
PROVED = 16  # environments that are tested so, of any number of one kind
SETTLED = 5  # steps before that, so that its state differs from that of a new environment
LIBRARY = "gymnasium."
# around an instance that users make, and not around what is made here by name; it changes nothing
CHECKER = name_of(PassiveEnvChecker)


class Snapshot(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The outermost wrapper of an environment that rlamort makes.

    A step that raises returns a reward of NaN and the exception's text in info; the next reset constructs a new environment,
    with a new seed. Running statistics of its wrappers are kept.

    Args:
        make: makes the environment.
        row: its index among several.
        options: of every reset.
        env: an existing instance as the first one.

    Attributes:
        unproved: a difference between the environment and a copy restored to its state, if one was found.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env[Any, Any]],
        row: int,
        options: dict[str, Any] | None = None,
        env: gymnasium.Env[Any, Any] | None = None,
    ) -> None:
        super().__init__(make() if env is None else env)
        self.make, self.row, self.options = make, row, options
        self.seed, self.raised, self.broken = 0, 0, False
        self.keeps_globals = False  # whether it seeds and saves the global generators, as the first one of a worker process
        self.unproved: tuple[str, ...] = ()
        self._copy: Snapshot | None = None
        self._trial = self._until_proof = 0  # steps to go

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; `options`, which vector environments fill in on their own, are those of the constructor."""
        if seed is not None:
            self.seed = seed
            self._seed_all(seed)
        if self.broken:
            before = self.statistics()
            self.env, self.broken = self.make(), False
            self._copy = None
            self.take(before)
            seed = self.seed + 1_000_003 * self.raised if seed is None else seed
        return self._beside(lambda env: env.reset(seed=seed, options=self.options), seed)  # type: ignore[no-any-return]

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        action = np.asarray(action)  # vector environments make single numbers of arrays without axes
        try:
            if self._copy is None and not self._until_proof:
                return self.env.step(action)
            answer = self._beside(lambda env: env.step(action))
            if self._until_proof:
                self._until_proof -= 1
                if not self._until_proof:
                    self._prove()
            return answer  # type: ignore[no-any-return]
        except Exception as error:
            self.raised, self.broken = self.raised + 1, True
            nothing = np.zeros(self.observation_space.shape or (), self.observation_space.dtype)
            return nothing, float("nan"), False, True, {FAULT: f"it raised {type(error).__name__}: {error}"}

    def _seed_all(self, seed: int) -> None:
        """Seed the spaces of every layer, which an environment may sample from, and the global generators if it keeps them."""
        for layer in layers(self.env):
            for space in (layer.action_space, layer.observation_space):
                space.seed(seed)
        if self.keeps_globals:
            seed_globals(seed)

    def snapshot(self) -> dict[str, Tree]:
        """Every layer's state, state shared by its class, and what could not be read or was found to differ."""
        inside = layers(self.env)
        reader = Reader(inside)
        try:
            read = {"layers": [reader.layer(layer) for layer in inside], "shared": reader.shared()}
        except RecursionError:
            read, reader.lost = {}, {f"{self.env} holds objects inside each other too deep to be read": None}
        own = {"seed": self.seed, "raised": self.raised, "broken": self.broken}
        everybodys = _read_globals() if self.keeps_globals else None
        unsaved = [*reader.lost, *self.unproved]
        return {"own": own, "globals": everybodys, "unsaved": unsaved, "statistics": self.statistics(), **read}

    def restore(self, state: dict[str, Tree]) -> str:
        """Restore a `snapshot`; the reason if only a new episode can be started, else ""."""
        if "own" not in state:
            return "it was saved by an older rlamort"
        self.seed, self.raised = state["own"]["seed"], state["own"]["raised"]
        reason = str(state["unsaved"][0]) if state["unsaved"] else self._put_back(state)
        if reason:
            self.take(state["statistics"])
        else:
            self.broken = state["own"]["broken"]
            if self.keeps_globals and state["globals"] is not None:
                _write_globals(state["globals"])
        return reason

    def _put_back(self, state: dict[str, Tree]) -> str:
        inside, trees = layers(self.env), state["layers"]
        at = list(range(len(trees)))
        if len(inside) != len(trees):
            at = [sum(tree["class"] != CHECKER for tree in trees[:i]) for i in at]
            inside = [layer for layer in inside if type(layer) is not PassiveEnvChecker]
            trees = [tree for tree in trees if tree["class"] != CHECKER]
        if len(inside) != len(trees):
            return f"it has {len(inside)} layers; there were {len(trees)}"
        try:
            writer = Writer(inside, [inside[i] for i in at])
            for tree, layer in zip(trees, inside, strict=True):
                writer.layer(tree, layer)
            writer.shared(state["shared"])
        except Unlike as error:
            self.env = self.make()  # what is there may be half of either
            self.env.reset(seed=self.seed, options=self.options)  # some hold nothing before
            return str(error)
        return ""

    def statistics(self) -> Tree:
        """Running statistics of its wrappers."""
        return learned(layers(self.env))

    def take(self, statistics: Tree, frozen: bool = False) -> None:
        """Restore `statistics`; `frozen` stops their updates."""
        learn(layers(self.env), statistics, frozen)

    def prove(self) -> None:
        """Soon, step a copy restored to the same state beside it for a while, and note a difference; of many only of some."""
        self._until_proof = SETTLED if self.row < PROVED else 0

    def _prove(self) -> None:
        state = self.snapshot()
        if state["unsaved"]:
            return
        self._shared_state = SharedState(self.env)
        with self._shared_state.restoring():
            try:
                copied = Snapshot(self.make, 0, self.options)
            except UserError:  # there can be no second one
                return
            try:
                copied.reset(seed=0)
                reason = copied.restore(state)
            except Exception as error:  # whatever a user's objects raise when they are written to, the environment plays on
                reason = f"{type(error).__name__}: {error}"
        if reason:
            copied.close()
            self.unproved = (f"a copy could not be put into its state: {reason}",)
        else:
            self._copy, self._trial = copied, TRIAL

    def _beside(self, play: Callable[[gymnasium.Env[Any, Any]], Any], seed: int | None = None) -> Any:
        """The environment's result; while its state is tested, also that of the copy, compared with it."""
        if self._copy is None:
            return play(self.env)
        copied = self._copy
        before = self._shared_state.read()
        if seed is not None:
            copied._seed_all(seed)
        answer = play(self.env)
        with self._shared_state.restoring():
            self._shared_state.write(before)
            if seed is not None:
                copied._seed_all(seed)
            try:
                other = play(copied.env)
            except Exception as error:  # whatever it raises, the environment did not
                other = (error,)
        self._trial -= 1
        if what := differing(answer, other):
            self.unproved = (f"a copy in the same state gave another {what}, so it holds something that was not found",)
        if what or not self._trial:
            self._copy = None
            copied.close()
        return answer

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()
        super().close()


def layers(env: Any) -> list[Any]:
    """An environment's wrappers, outermost first, and itself."""
    found = [env]
    while isinstance(env, gymnasium.Wrapper):
        env = env.env
        found.append(env)
    return found


def learned(inside: Sequence[Any]) -> Tree:
    """State of wrappers that may hold running statistics, by class."""
    reader = Reader(inside)
    found: dict[str, list[Tree]] = {}
    for layer in inside:
        if isinstance(layer, gymnasium.Wrapper | gymnasium.vector.VectorWrapper) and _learns(layer):
            found.setdefault(name_of(type(layer)), []).append(reader.layer(layer))
    return {"layers": found, "unsaved": list(reader.lost)}


def learn(inside: Sequence[Any], statistics: Tree, frozen: bool) -> None:
    """Restore the state from `learned` to wrappers of the same classes; `frozen` stops their updates.

    Raises:
        UserError: one of Gymnasium's normalising wrappers is missing.
    """
    writer = Writer(inside)
    for kind, trees in statistics["layers"].items():
        same = [layer for layer in inside if name_of(type(layer)) == kind]
        if len(same) != len(trees) and kind.startswith(LIBRARY):
            raise UserError(
                f"env: it has {len(same)} wrappers {kind.partition(':')[2]}, and the one that was trained in {len(trees)}; "
                f"their statistics are part of what was learned (or take normalise=true, which is part of the agent)"
            )
        for tree, layer in zip(trees, same, strict=False):
            writer.what_fits(tree, layer)
    if frozen:
        for layer in inside:
            if hasattr(layer, "update_running_mean"):
                layer.update_running_mean = False


def _learns(layer: Any) -> bool:
    """Whether a wrapper may hold statistics: Gymnasium's normalising ones do, users' may."""
    return hasattr(layer, "update_running_mean") or not type(layer).__module__.startswith(LIBRARY)


def differing(one: Sequence[Any], other: Sequence[Any]) -> str:
    """The first difference between two results of `reset` or `step`, apart from info; "" if there is none."""
    names = ("observation", "reward", "terminated flag", "truncated flag") if len(one) == 5 else ("first observation",)
    if len(one) != len(other):
        return names[0]
    same = (np.asarray(ours).tobytes() == np.asarray(theirs).tobytes() for ours, theirs in zip(one, other, strict=True))
    return next((name for name, equal in zip(names, same, strict=False) if not equal), "")


def _read_globals() -> Tree:
    return {"numpy": np.random.get_state(legacy=False), "python": random.getstate(), "torch": torch.get_rng_state()}


def _write_globals(state: Tree) -> None:
    np.random.set_state(state["numpy"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])


def seed_globals(seed: int) -> None:
    """Seed the global generators of NumPy, Python and torch."""
    np.random.seed(seed % 2**32)
    random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """A context that restores the state of the global generators of NumPy, Python and torch at its end."""
    state = _read_globals()
    try:
        yield
    finally:
        _write_globals(state)


def drawn_from(snapshot: dict[str, Tree]) -> bool:
    """Whether the global generators in a snapshot were drawn from since they were seeded."""
    with preserved():
        seed_globals(snapshot["own"]["seed"])
        fresh, held = _read_globals(), snapshot["globals"]
    same = torch.equal(fresh["torch"], held["torch"]) and list(fresh["python"][1]) == list(held["python"][1])
    return not same or str(fresh["numpy"]) != str(held["numpy"])


class SharedState:
    """State that an environment shares with others in this process: of its classes and modules, and the global generators.

    Args:
        env: the environment.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.layers = layers(env)
        reader = Reader(self.layers)
        for layer in self.layers:
            reader.layer(layer)
        reader.shared()
        self.places = [(holder, name) for _, holder, name in reader.places()]

    def read(self) -> Tree:
        """The present state."""
        reader = Reader(self.layers)
        return [_read_globals(), *(reader.read(value_in(holder, name), name) for holder, name in self.places)]

    def write(self, state: Tree) -> None:
        """Restore a state from `read`."""
        _write_globals(state[0])
        writer = Writer(self.layers) if self.places else None
        for (holder, name), tree in zip(self.places, state[1:], strict=True):
            with contextlib.suppress(Unlike):
                assert writer is not None
                writer.put_at(holder, name, tree)

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """A context that restores the state at its end."""
        state = self.read()
        try:
            yield
        finally:
            self.write(state)
