"""X with dynamics: environments. B environments side by side · d = x_dim · n = dim of an action"""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rlamort.domain import Domain, unit_box
from rlamort.errors import UserError
from rlamort.problem import Problem

Policy = Callable[[Tensor], Tensor]  # x (B, d) -> y (B, n)


class Step(NamedTuple):
    """The results of a step in B environments. Tensors are where x is, flags on the host."""

    x_next: Tensor  # (B, d) the true successor, also at the end of an episode
    reward: Tensor  # (B,)
    terminated: np.ndarray  # (B,) bool: a terminal state, whose value is zero
    truncated: np.ndarray  # (B,) bool: a time limit; the successor bootstraps
    valid: np.ndarray  # (B,) bool: False for a reset without a transition (NEXT_STEP autoreset), or a fault
    violation: Tensor | None = None  # (B,) of the constraints of a problem that has some

    @property
    def over(self) -> np.ndarray:
        """(B,) bool: what follows belongs to another episode; also where a forgiven fault has ended one."""
        over: np.ndarray = self.terminated | self.truncated | ~self.valid
        return over


class Episode(NamedTuple):
    """One finished episode: undiscounted return, and length in steps."""

    total: float
    length: int


class Space(NamedTuple):
    """A box of observations or actions, as Gymnasium declares it."""

    shape: tuple[int, ...]
    dtype: str
    low: list[float]  # flat; one number where all are equal
    high: list[float]

    @classmethod
    def of(cls, box: gymnasium.spaces.Box) -> Self:
        """From Gymnasium's space, without its random generator."""
        low, high = (np.unique(bound).tolist() if bound.min() == bound.max() else bound.ravel().tolist()
                     for bound in (box.low, box.high))  # fmt: skip
        return cls(box.shape, str(box.dtype), low, high)

    def box(self) -> gymnasium.spaces.Box:
        """As Gymnasium's space."""
        low, high = (np.broadcast_to(bound, self.dim).reshape(self.shape) for bound in (self.low, self.high))
        dtype = np.dtype(self.dtype)
        return gymnasium.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype.type)

    @classmethod
    def flat(cls, low: list[float], high: list[float]) -> Self:
        """Vectors in float32, as native environments have them."""
        return cls((len(low),), "float32", low, high)

    @property
    def dim(self) -> int:
        """The size of an element."""
        return math.prod(self.shape)

    def facts(self) -> dict[str, Any]:
        """As JSON values, with infinities as text."""
        bounds = {name: [x if math.isfinite(x) else str(x) for x in getattr(self, name)] for name in ("low", "high")}
        return {"shape": list(self.shape), "dtype": self.dtype, **bounds}

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Self:
        """From the values of `facts`."""
        low, high = ([float(x) for x in facts[name]] for name in ("low", "high"))
        return cls(tuple(facts["shape"]), facts["dtype"], low, high)

    def rows(self, elements: Any, what: str, dtype: Any = np.float32) -> tuple[np.ndarray, bool]:
        """An element, or a batch along the first axis -> (B, d), and whether it is a batch.

        Args:
            elements: in the space's own shape, or flat.
            what: their name, for messages.
            dtype: of the result.

        Raises:
            ValueError: it has another shape.
        """
        if isinstance(elements, dict):
            raise ValueError(f"{what}: a dict given; an array of its parts in one, as FlattenObservation makes, is needed")
        x, d = np.asarray(elements, dtype=dtype), self.dim
        for shape in (self.shape, (d,)):
            if x.shape == shape:
                return x.reshape(1, d), False
            if x.shape[1:] == shape and x.ndim:
                return x.reshape(-1, d), True
        raise ValueError(f"{what}: shape {x.shape} given; {self.shape} or {('batch', *self.shape)} is needed".replace("'", ""))

    def __str__(self) -> str:
        dtype = self.dtype if self.dtype.startswith("float") else None  # with all digits that tell its numbers apart
        bounds = (np.array(bound, dtype) for bound in (self.low, self.high))
        low, high = (np.array2string(bound, threshold=20, floatmode="unique") for bound in bounds)
        return f"Box({low}, {high}, {self.shape}, {self.dtype})"


class Units:
    """The affine map from [-1, 1]^n, where agents act, to an action space, in its dtype and shape, and its inverse.

    Args:
        space: of actions, with finite bounds.
    """

    def __init__(self, space: Space) -> None:
        self.shape, self.dtype = space.shape, np.dtype(space.dtype)
        low, high = (np.broadcast_to(np.array(bound, np.float64), space.dim) for bound in (space.low, space.high))
        self._low, self._high = low.astype(self.dtype), high.astype(self.dtype)
        wide = np.float64 if self.dtype == np.float64 else np.float32
        self._scale, self._offset = ((high - low) / 2).astype(wide), ((high + low) / 2).astype(wide)

    def decode(self, y: np.ndarray) -> np.ndarray:
        """y (B, n) in [-1, 1] -> actions (B, *shape), clipped to the bounds of the space against rounding."""
        action: np.ndarray = (y * self._scale + self._offset).astype(self.dtype, copy=False)
        np.maximum(action, self._low, out=action)
        np.minimum(action, self._high, out=action)
        return action.reshape(-1, *self.shape)

    def encode(self, action: np.ndarray) -> np.ndarray:
        """Actions (B, *shape) -> y (B, n) in [-1, 1], in float32."""
        y: np.ndarray = (action.reshape(len(action), -1) - self._offset) / self._scale
        return y.clip(-1, 1).astype(np.float32)


class Solutions:
    """The units of a problem: the identity on solutions y (B, n)."""

    def decode(self, y: np.ndarray) -> np.ndarray:
        """y unchanged."""
        return y

    def encode(self, action: np.ndarray) -> np.ndarray:
        """The action unchanged."""
        return action


class Spec(NamedTuple):
    """What an agent needs to know of an environment: the size of x, and the action bounds in the environment's units."""

    x_dim: int
    low: list[float]
    high: list[float]
    problem: Problem | None = None  # of a problem's environment, with the known objective
    declared: tuple[Space, Space] | None = None  # of observations and of actions, unless they are plain vectors
    equations: Callable[..., Any] | None = None  # of its dynamics, where they are known: see `rlamort.env.known`
    longest: int | None = None  # steps until a time limit ends an episode, where one is known
    simulator: Callable[[], Any] | None = None  # makes its `rlamort.env.simulate.Simulator`, or raises UserError
    frozen: Callable[[], None] | None = None  # raises UserError where rewards leave parameters of its problem untrained

    @classmethod
    def of(cls, observation: Space, action: Space) -> Self:
        """From the declared spaces."""
        low, high = (np.broadcast_to(bound, action.dim).tolist() for bound in (action.low, action.high))
        return cls(observation.dim, low, high, None, (observation, action))

    @property
    def domain(self) -> Domain:
        """Y, the domain of an agent's actions: of a problem its own domain, of other environments [-1, 1]^n."""
        return unit_box(len(self.low)) if self.problem is None else self.problem.domain

    @property
    def units(self) -> Units | Solutions:
        """The map from Y to the environment's actions, or to solutions."""
        return Units(self.action) if self.problem is None else Solutions()

    @property
    def observation(self) -> Space:
        """The space of observations."""
        return self.declared[0] if self.declared else Space((self.x_dim,), "float32", [-math.inf], [math.inf])

    @property
    def action(self) -> Space:
        """The space of actions."""
        return self.declared[1] if self.declared else Space.flat(self.low, self.high)

    def apart(self) -> Self:
        """The same with a copy of its problem that shares its tensors, for trials without side effects."""
        if self.problem is None:
            return self
        shared = {id(tensor): tensor for tensor in (*self.problem.parameters(), *self.problem.buffers())}
        return self._replace(problem=copy.deepcopy(self.problem, shared))

    def facts(self) -> dict[str, Any]:
        """As JSON values, without the problem but for its name."""
        named = {} if self.problem is None else {"problem": type(self.problem).__name__}
        spaces = {"declared": [space.facts() for space in self.declared]} if self.declared else {}
        limit = {} if self.longest is None else {"longest": self.longest}
        return {"x_dim": self.x_dim, "low": self.low, "high": self.high, **named, **spaces, **limit}

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Self:
        """From the values of `facts`, without a problem. Raises KeyError, TypeError or ValueError for other values."""
        spaces = [Space.read(one) for one in facts.get("declared", ())]
        if spaces and [space.dim for space in spaces] != [facts["x_dim"], len(facts["low"])]:
            raise ValueError("sizes that agree: its spaces have others than x_dim and low")
        declared, longest = (spaces[0], spaces[1]) if spaces else None, facts.get("longest")
        return cls(
            facts["x_dim"], facts["low"], facts["high"], None, declared, longest=None if longest is None else int(longest)
        )

    def require(self, other: "Spec", where: str) -> None:
        """Raises UserError if an environment `where` has other spaces than an agent of this one was built for."""
        pairs: list[tuple[str, Any, Any]]
        if self.declared and other.declared:
            pairs = list(zip(("observation space", "action space"), self.declared, other.declared, strict=True))
        else:  # older files have sizes and bounds only, and so have Stable-Baselines3's, in which a bound has eight decimals
            one, another = (np.transpose([spec.low, spec.high]).tolist() for spec in (self, other))  # (n, 2)
            pairs = [("observation size", self.x_dim, other.x_dim), ("action size", len(one), len(another))]
            ranges = enumerate(zip(one, another, strict=False))
            pairs += [(f"range of action[{i}]", a, b) for i, (a, b) in ranges if not np.allclose(a, b, rtol=1e-6, atol=0)]
        for what, ours, theirs in pairs:
            if ours != theirs:
                raise UserError(f"{where}: its {what} is {theirs}; the agent's is {ours}, and they must be the same")


class Env:
    """`count` environments side by side. Actions y lie in `domain`; an environment resets itself after an episode.

    Attributes:
        name: for messages and records.
        count: B.
        device: of the agents that act in it.
        place: of x, and of what a step returns: the device itself, or the CPU where environments are stepped there.
        x: (B, d), the contexts to act on now.
        domain: Y, that of its `spec`, on the device.
        units: map y to the environment's own actions.
        unsaved: state that no checkpoint can hold, for messages; empty if `restore` is exact.
    """

    unsaved: tuple[str, ...] = ()

    name: str
    count: int
    x: Tensor

    def __init__(self, spec: Spec, device: torch.device, place: torch.device | None = None) -> None:
        self.spec, self.device, self.place = spec, device, place or device
        self.units = spec.units
        self.domain = spec.domain.to(device)

    def reset(self, seed: int) -> Tensor:
        """Reset all environments, environment i with seed + i; returns x (B, d)."""
        raise NotImplementedError

    def step(self, y: Tensor) -> Step:
        """Step with y (B, n) in Y, on the device or in its place."""
        raise NotImplementedError

    def episodes(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """The state for `restore`, as plain values, arrays and tensors."""
        raise NotImplementedError

    def restore(self, state: dict[str, Any]) -> bool:
        """Restore `state`; False if only new episodes could be started."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Any] | None:
        """Running statistics of its wrappers; None if there are none."""
        return None

    def take(self, statistics: dict[str, Any], frozen: bool) -> None:
        """Restore the values of `statistics`; `frozen` stops their updates."""

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """A context in which other environments of its kind may be stepped without affecting this one."""
        return contextlib.nullcontext()

    def prove(self) -> None:
        """Test during the next steps whether `restore` is exact; a difference is noted in its state."""

    def held_out(self) -> "Env":
        """The environment for evaluation: over held-out contexts if there are such, else itself."""
        return self

    def close(self) -> None:
        """Release the environments' resources."""
